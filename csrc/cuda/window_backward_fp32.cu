#include "window_backward_variants.cuh"

namespace swin_moe {

const BackwardVariant* find_backward_fp32(const WindowLaunch& p) { return BackwardVariants<float, false>::find(p); }

}  // namespace swin_moe
