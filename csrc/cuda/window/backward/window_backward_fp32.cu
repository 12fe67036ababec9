#include "window_backward_variants.cuh"

namespace swin_moe {

const BackwardVariant* find_backward_fp32(const WindowLaunch& p, size_t most) {
  return BackwardVariants<float, false>::find(p, most);
}

}  // namespace swin_moe
