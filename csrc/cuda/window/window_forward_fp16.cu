#include "window_forward_variants.cuh"

namespace swin_moe {

const ForwardVariant* find_forward_fp16(const WindowLaunch& p, size_t most) {
  return ForwardVariants<Float16, true>::find(p, most);
}

}  // namespace swin_moe
