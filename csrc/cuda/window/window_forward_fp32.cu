#include "window_forward_variants.cuh"

namespace swin_moe {

const ForwardVariant* find_forward_fp32(const WindowLaunch& p, size_t most) {
  return ForwardVariants<float, false>::find(p, most);
}

}  // namespace swin_moe
