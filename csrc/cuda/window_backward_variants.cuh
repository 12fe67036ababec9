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

  template <int HeadDim, int Window, class Queries, int KeyWarps, int QueriesAtATime, int PairTiles>
  static constexpr BackwardVariant split() {
    using Backward = SplitBackward<Queries, Shape<T, HeadDim, Window, KeyWarps, QueriesAtATime>, PairTiles>;
    return {HeadDim, Window, kMaxWindowTokens, &Backward::plan, &Backward::run};
  }

  template <int HeadDim, int Window, int Warps, int Keys>
  using Streamed = StreamedQueries<Shape<T, HeadDim, Window, Warps, Keys>>;
  // Keys: all of a window.
  template <int Window, int Warps, int Keys, int Group>
  using Kept = KeptQueries<Shape<T, 32, Window, Warps, Keys>, Group>;

  static bool fits(const WindowLaunch& p, const BackwardVariant& v) {
    return p.geometry.tokens() <= v.tokens && swin_moe::fits(p, v.head_dim, v.window);
  }

  static const BackwardVariant* find(const WindowLaunch& p) {
    if constexpr (Fixed) {
      static constexpr BackwardVariant kFixed[] = {
          whole<32, 7>(), whole<32, 8>(), split<32, 12, Kept<12, 3, 144, 3>, 3, 48, 9>(),
          split<32, 16, Kept<16, 4, 256, 4>, 4, 64, 16>(), split<32, 24, Streamed<32, 24, 6, 64>, 6, 64, 0>()};
      for (const auto& v : kFixed)
        if (fits(p, v)) return &v;
      static constexpr BackwardVariant kAny[] = {
          whole<16, 0>(), whole<32, 0>(), whole<48, 0>(), whole<64, 0>(),
          split<16, 0, Streamed<16, 0, 4, 32>, 4, 64, 0>(), split<32, 0, Streamed<32, 0, 4, 32>, 4, 64, 0>(),
          split<48, 0, Streamed<48, 0, 4, 32>, 4, 64, 0>(), split<64, 0, Streamed<64, 0, 4, 32>, 4, 64, 0>()};
      for (const auto& v : kAny)
        if (fits(p, v)) return &v;
    } else {
      // float32, whose products are many instructions, would take minutes to compile with more.
      static constexpr BackwardVariant kFew[] = {whole<32, 0>(), whole<64, 0>(),
                                                 split<32, 0, Streamed<32, 0, 4, 32>, 4, 64, 0>(),
                                                 split<64, 0, Streamed<64, 0, 4, 32>, 4, 64, 0>()};
      for (const auto& v : kFew)
        if (fits(p, v)) return &v;
    }
    return nullptr;
  }
};

}  // namespace swin_moe
