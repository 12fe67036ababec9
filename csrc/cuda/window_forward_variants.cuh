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
    return {HeadDim, Window, &window_forward<Shape<T, HeadDim, Window, Warps, Keys>>};
  }

  static const ForwardVariant* find(const WindowLaunch& p) {
    if constexpr (Fixed) {
      static constexpr ForwardVariant kFixed[] = {variant<32, 7, 4, 64>(), variant<32, 8, 4, 64>(),
                                                  variant<32, 12, 9, 48>(), variant<32, 16, 8, 64>(),
                                                  variant<32, 24, 9, 48>()};
      for (const auto& v : kFixed)
        if (fits(p, v.head_dim, v.window)) return &v;
    }
    static constexpr ForwardVariant kAny[] = {variant<16, 0, 4, 64>(), variant<32, 0, 4, 64>(), variant<48, 0, 4, 64>(),
                                              variant<64, 0, 4, 64>()};
    for (const auto& v : kAny)
      if (fits(p, v.head_dim, v.window)) return &v;
    return nullptr;
  }
};

}  // namespace swin_moe
