#include "window_forward_variants.cuh"

namespace swin_moe {

const ForwardVariant* find_forward_fp32(const WindowLaunch& p) { return ForwardVariants<float, false>::find(p); }

}  // namespace swin_moe
