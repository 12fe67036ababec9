// The backward kernels of one element.
#pragma once

#include "window_backward.cuh"
#include "cuda/window/window_variants.h"

namespace swin_moe {

// Fixed: also the kernels whose window is a constant.
template <class T, bool Fixed>
struct BackwardVariants {
  static constexpr int kWhole = 64;  // the most tokens of a window that a block takes in one piece

  template <int HeadDim, int Window>
  static constexpr BackwardVariant whole() {
    using Backward = WholeBackward<WholeKernel<Shape<T, HeadDim, Window, 4, kWhole>>>;
    return {HeadDim, Window, kWhole, &Backward::plan, &Backward::run, &Backward::shared_bytes, false};
  }

  // Queries: whose gradients of scores are in shared memory at a time.
  template <int Window, int Queries>
  static constexpr BackwardVariant once() {
    using Backward = WholeBackward<OnceKernel<Shape<T, 32, Window, Window * Window / kTile, Queries>>>;
    return {32, Window, Window * Window, &Backward::plan, &Backward::run, &Backward::shared_bytes, true};
  }

  template <int HeadDim, int Window, int Warps, int KeysAtATime, int QueriesAtATime>
  static constexpr BackwardVariant split() {
    using Backward = SplitBackward<Shape<T, HeadDim, Window, Warps, KeysAtATime>,
                                   Shape<T, HeadDim, Window, Warps, QueriesAtATime>>;
    return {HeadDim, Window, kMaxWindowTokens, &Backward::plan, &Backward::run, &Backward::shared_bytes, false};
  }

  static const BackwardVariant* find(const WindowLaunch& p, size_t most) {
    if constexpr (Fixed) {
      // Of two in one pass, the second is for devices with the shared memory of an A100.
      static constexpr BackwardVariant kFixed[] = {
          whole<32, 7>(), whole<32, 8>(), once<12, 144>(), once<12, 48>(), once<16, 128>(), once<16, 64>(),
          split<32, 24, 6, 64, 64>()};
      if (const auto* found = first_fit(kFixed, p, most)) return found;
      static constexpr BackwardVariant kAny[] = {
          whole<16, 0>(), whole<32, 0>(), whole<48, 0>(), whole<64, 0>(),
          split<16, 0, 4, 32, 64>(), split<32, 0, 4, 32, 64>(), split<48, 0, 4, 32, 64>(), split<64, 0, 4, 32, 64>()};
      return first_fit(kAny, p, most);
    } else {
      // float32, whose products are many instructions, would take minutes to compile with more. Windows in one piece of
      // long heads need 107 KiB, so devices with less take the last row for them; with 64 queries at a time that row
      // would need 137.
      static constexpr BackwardVariant kFew[] = {whole<32, 0>(), whole<64, 0>(), split<32, 0, 4, 32, 64>(),
                                                 split<64, 0, 4, 32, 32>()};
      return first_fit(kFew, p, most);
    }
  }
};

}  // namespace swin_moe
