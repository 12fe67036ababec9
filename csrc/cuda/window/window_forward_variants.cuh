// The forward kernels of one element.
#pragma once

#include "window_forward.cuh"
#include "window_variants.h"

namespace swin_moe {

// Fixed: also the kernels whose window is a constant.
template <class T, bool Fixed>
struct ForwardVariants {
  template <int HeadDim, int Window, int Warps, int Keys>
  static constexpr ForwardVariant variant() {
    using S = Shape<T, HeadDim, Window, Warps, Keys>;
    return {HeadDim, Window, &window_forward<S>, &forward_shared_bytes<S>};
  }

  static const ForwardVariant* find(const WindowLaunch& p, size_t most) {
    if constexpr (Fixed) {
      static constexpr ForwardVariant kFixed[] = {variant<32, 7, 4, 64>(), variant<32, 8, 4, 64>(),
                                                  variant<32, 12, 9, 48>(), variant<32, 16, 8, 64>(),
                                                  variant<32, 24, 9, 48>()};
      if (const auto* found = first_fit(kFixed, p, most)) return found;
    }
    static constexpr ForwardVariant kAny[] = {variant<16, 0, 4, 64>(), variant<32, 0, 4, 64>(), variant<48, 0, 4, 64>(),
                                              variant<64, 0, 4, 64>()};
    if (const auto* found = first_fit(kAny, p, most)) return found;
    if constexpr (sizeof(T) == 4) {
      static constexpr ForwardVariant kFewKeys[] = {variant<64, 0, 4, 32>()};
      return first_fit(kFewKeys, p, most);
    }
    return nullptr;
  }
};

}  // namespace swin_moe
