// The backward kernels of one element.
#pragma once

#include "window_backward.cuh"
#include "window_variants.h"

namespace swin_moe {

// Fixed: also the kernels whose window is a constant.
template <class T, bool Fixed>
struct BackwardVariants {
  static constexpr int kWhole = 64;  // the most tokens of a window that a block takes in one piece

  template <int HeadDim, int Window>
  static constexpr BackwardVariant whole() {
    using Backward = WholeBackward<Shape<T, HeadDim, Window, 4, kWhole>>;
    return {HeadDim, Window, kWhole, &Backward::plan, &Backward::run};
  }

  // Warps and the other side's rows of the kernels for queries and for keys; see SplitBackward.
  template <int HeadDim, int Window, int QueryWarps, int Keys, int KeyWarps, int Queries, int PairTiles>
  static constexpr BackwardVariant split() {
    using Backward = SplitBackward<Shape<T, HeadDim, Window, QueryWarps, Keys>,
                                   Shape<T, HeadDim, Window, KeyWarps, Queries>, PairTiles>;
    return {HeadDim, Window, kMaxWindowTokens, &Backward::plan, &Backward::run};
  }

  static bool fits(const WindowLaunch& p, const BackwardVariant& v) {
    return p.geometry.tokens() <= v.tokens && swin_moe::fits(p, v.head_dim, v.window);
  }

  static const BackwardVariant* find(const WindowLaunch& p) {
    if constexpr (Fixed) {
      static constexpr BackwardVariant kFixed[] = {whole<32, 7>(), whole<32, 8>(), split<32, 12, 9, 48, 9, 48, 9>(),
                                                   split<32, 16, 8, 64, 4, 64, 16>(), split<32, 24, 9, 64, 9, 64, 0>()};
      for (const auto& v : kFixed)
        if (fits(p, v)) return &v;
    }
    static constexpr BackwardVariant kAny[] = {
        whole<16, 0>(), whole<32, 0>(), whole<48, 0>(), whole<64, 0>(),
        split<16, 0, 4, 32, 4, 64, 0>(), split<32, 0, 4, 32, 4, 64, 0>(), split<48, 0, 4, 32, 4, 64, 0>(),
        split<64, 0, 4, 32, 4, 64, 0>()};
    for (const auto& v : kAny)
      if (fits(p, v)) return &v;
    return nullptr;
  }
};

}  // namespace swin_moe
