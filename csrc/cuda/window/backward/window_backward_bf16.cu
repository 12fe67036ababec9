#include "window_backward_variants.cuh"

namespace swin_moe {

const BackwardVariant* find_backward_bf16(const WindowLaunch& p, size_t most) {
  return BackwardVariants<BFloat16, true>::find(p, most);
}

}  // namespace swin_moe
