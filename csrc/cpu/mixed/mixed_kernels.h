// The kernels of one set of instructions, as a table. See vector.h for what is defined before this is included.
#pragma once

#include "gelu_rows.h"
#include "norm_rows.h"

namespace swin_moe {
namespace SWIN_MOE_CAPABILITY {

// Weights come from far away: pages that are not there yet are asked for in time.
inline void narrow_all(const float* from, int64_t count, BFloat16* to) {
  constexpr int64_t kAhead = 1024;
  int64_t i = 0;
  for (; i + kFloats <= count; i += kFloats) {
    __builtin_prefetch(from + i + kAhead);
    store_narrow(to + i, load(from + i));
  }
  for (; i < count; ++i) to[i] = narrow(from[i], BFloat16{});
}

// Large gradients go past the caches, which would read what is overwritten: the update of weights comes much later.
inline void widen_all(const BFloat16* from, int64_t count, float* to) {
  int64_t i = 0;
#if defined(SWIN_MOE_HAS_AVX512_BF16)
  constexpr int64_t kLarge = 64 << 10;
  if (count >= kLarge && reinterpret_cast<uintptr_t>(to) % kVectorBytes == 0) {
    for (; i + kFloats <= count; i += kFloats) _mm512_stream_ps(to + i, (__m512)load_as_float(from + i));
    _mm_sfence();
  }
#endif
  for (; i + kFloats <= count; i += kFloats) store(to + i, load_as_float(from + i));
  for (; i < count; ++i) to[i] = widen(from[i]);
}

// x + factor * branch, rounded once; without x, factor * branch.
template <bool kAdds>
inline void add_scaled(const BFloat16* x, const BFloat16* branch, float factor, int64_t count, BFloat16* to) {
  int64_t i = 0;
  for (; i + kFloats <= count; i += kFloats) {
    const Floats scaled = load_as_float(branch + i) * factor;
    store_half(to + i, kAdds ? load_as_float(x + i) + scaled : scaled);
  }
  for (; i < count; ++i) to[i] = narrow((kAdds ? widen(x[i]) : 0.0f) + widen(branch[i]) * factor, BFloat16{});
}

inline void add_rows(const BFloat16* x, int64_t rows, int64_t channels, float* sums) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4, x += 4 * channels) {
    const BFloat16 *a = x, *b = x + channels, *c = x + 2 * channels, *d = x + 3 * channels;
    int64_t i = 0;
    for (; i + kFloats <= channels; i += kFloats)
      store(sums + i, load(sums + i) + ((load_as_float(a + i) + load_as_float(b + i)) +
                                        (load_as_float(c + i) + load_as_float(d + i))));
    for (; i < channels; ++i) sums[i] += (widen(a[i]) + widen(b[i])) + (widen(c[i]) + widen(d[i]));
  }
  for (; row < rows; ++row, x += channels)
    for (int64_t i = 0; i < channels; ++i) sums[i] += widen(x[i]);
}

inline const MixedKernels* mixed_kernels_here() {
  static constexpr MixedKernels kernels{
      [](const uint16_t* x, const float* weight, const float* bias, float eps, int64_t rows, int64_t channels,
         uint16_t* y, float* mean, float* rstd) {
        norm_rows(as_half(x), weight, bias, eps, rows, channels, as_half(y), mean, rstd);
      },
      [](const NormGradients& at, int64_t first, int64_t rows, int64_t channels, float* sums) {
        norm_gradients(at, first, rows, channels, sums);
      },
      [](const uint16_t* x, const float* bias, int64_t rows, int64_t channels, uint16_t* y) {
        gelu_rows(as_half(x), bias, rows, channels, as_half(y));
      },
      [](const uint16_t* grad, const uint16_t* x, const float* bias, int64_t rows, int64_t channels, uint16_t* to,
         float* sums) { gelu_gradients(as_half(grad), as_half(x), bias, rows, channels, as_half(to), sums); },
      [](const float* from, int64_t count, uint16_t* to) { narrow_all(from, count, as_half(to)); },
      [](const uint16_t* from, int64_t count, float* to) { widen_all(as_half(from), count, to); },
      [](const uint16_t* x, int64_t rows, int64_t channels, float* sums) {
        add_rows(as_half(x), rows, channels, sums);
      },
      [](const uint16_t* x, const uint16_t* branch, float factor, int64_t count, uint16_t* to) {
        if (x)
          add_scaled<true>(as_half(x), as_half(branch), factor, count, as_half(to));
        else
          add_scaled<false>(nullptr, as_half(branch), factor, count, as_half(to));
      },
  };
  return &kernels;
}

}  // namespace SWIN_MOE_CAPABILITY
}  // namespace swin_moe
