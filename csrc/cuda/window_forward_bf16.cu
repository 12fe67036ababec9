#include "window_forward_variants.cuh"

namespace swin_moe {

const ForwardVariant* find_forward_bf16(const WindowLaunch& p) { return ForwardVariants<BFloat16, true>::find(p); }

}  // namespace swin_moe
