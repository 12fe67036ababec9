// The bias of a hidden layer and exact GELU of bfloat16 rows, and their gradients.
#pragma once

#include "half_rows.h"

namespace swin_moe {
namespace SWIN_MOE_CAPABILITY {

using Integers = Vector<int32_t>;
constexpr float kFarthest = 6.5f;  // beyond it the normal distribution has less than 4e-11, which counts as none

// kMany vectors, whose operations take turns: each waits for the one before it, four cycles long, and a processor looks
// ahead by some 100 of them.
template <int kMany>
struct Several {
  Floats v[kMany];
};

#define SWIN_MOE_EACH _Pragma("GCC unroll 4") for (int i = 0; i < kMany; ++i)

// y = y * x + c
template <int kMany>
SWIN_MOE_INLINE void multiply_add(Several<kMany>& y, const Several<kMany>& x, float c) {
  SWIN_MOE_EACH y.v[i] = y.v[i] * x.v[i] + c;
}

// Phi(-u), the normal distribution's share below -u, for 0 <= u <= kFarthest: 2 to the power of a polynomial of degree
// 7 (log2 Phi(-u) within 7e-6), and 2 to a fraction as one of degree 4 (within 8e-6). Least maximal errors, found by
// reweighted least squares in float64.
template <int kMany>
SWIN_MOE_INLINE Several<kMany> share_below(const Several<kMany>& u) {
  Several<kMany> power, f, y;
  SWIN_MOE_EACH power.v[i] = u.v[i] * -1.757777035e-06f + 5.993658943e-05f;
  multiply_add(power, u, -9.163629952e-04f);
  multiply_add(power, u, 8.447385632e-03f);
  multiply_add(power, u, -5.382450185e-02f);
  multiply_add(power, u, -4.586157073e-01f);
  multiply_add(power, u, -1.151180166e+00f);
  multiply_add(power, u, -1.000003873e+00f);
  const float rounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  Floats shifted[kMany];
  SWIN_MOE_EACH shifted[i] = power.v[i] + rounder;
  SWIN_MOE_EACH f.v[i] = power.v[i] - (shifted[i] - rounder);
  SWIN_MOE_EACH y.v[i] = f.v[i] * 9.554079760e-03f + 5.587055326e-02f;
  multiply_add(y, f, 2.402469823e-01f);
  multiply_add(y, f, 6.931280131e-01f);
  multiply_add(y, f, 9.999994391e-01f);
  SWIN_MOE_EACH y.v[i] = (Floats)((Integers)y.v[i] + ((Integers)shifted[i] << 23));
  return y;
}

template <int kMany>
SWIN_MOE_INLINE Several<kMany> magnitude_of(const Several<kMany>& x) {
  Several<kMany> u;
  SWIN_MOE_EACH u.v[i] = (Floats)((Integers)x.v[i] & 0x7fffffff);
  SWIN_MOE_EACH u.v[i] = u.v[i] < kFarthest ? u.v[i] : broadcast(kFarthest);
  return u;
}

// x Phi(x)
template <int kMany>
SWIN_MOE_INLINE Several<kMany> gelu_of(const Several<kMany>& x) {
  Several<kMany> y = share_below(magnitude_of(x));
  SWIN_MOE_EACH y.v[i] = x.v[i] < -kFarthest ? Floats{} : y.v[i];
  SWIN_MOE_EACH y.v[i] = x.v[i] * (x.v[i] < 0.0f ? y.v[i] : 1.0f - y.v[i]);
  return y;
}

// Phi(x) + x phi(x). With l(u) = phi(u) / Phi(-u), of which 1 - u l(u) is a polynomial here, it is Phi(-u) (1 - u l(u))
// at -u, and 1 less that at u. x that is not finite gives NaN, as PyTorch's does.
template <int kMany>
SWIN_MOE_INLINE Several<kMany> slope_of(const Several<kMany>& x) {
  const Several<kMany> u = magnitude_of(x);
  Several<kMany> s;
  SWIN_MOE_EACH s.v[i] = u.v[i] * 9.673115918e-05f - 2.172775207e-03f;
  multiply_add(s, u, 2.043342630e-02f);
  multiply_add(s, u, -1.078556649e-01f);
  multiply_add(s, u, -6.381099771e-01f);
  multiply_add(s, u, -7.974904738e-01f);
  multiply_add(s, u, 9.999858929e-01f);
  const Several<kMany> share = share_below(u);
  SWIN_MOE_EACH s.v[i] *= share.v[i];
  SWIN_MOE_EACH s.v[i] = (x.v[i] < 0.0f ? s.v[i] : 1.0f - s.v[i]) + (x.v[i] - x.v[i]);
  return s;
}

// The last channels of a row, in a vector whose other lanes are 0.
template <class T>
SWIN_MOE_INLINE Floats load_last(const T* from, int64_t count) {
  float lanes[kFloats] = {};
  load_row(from, lanes, int(count));
  return load(lanes);
}

SWIN_MOE_INLINE void store_last(BFloat16* to, Floats x, int64_t count) {
  BFloat16 lanes[kFloats];
  store_half(lanes, x);
  std::memcpy(to, lanes, count * sizeof(BFloat16));
}

template <int kMany>
SWIN_MOE_INLINE Several<kMany> sum_of(const BFloat16* x, const float* bias) {
  Several<kMany> sum;
  SWIN_MOE_EACH sum.v[i] = load_as_float(x + i * kFloats) + load(bias + i * kFloats);
  return sum;
}

inline void gelu_rows(const BFloat16* x, const float* bias, int64_t rows, int64_t channels, BFloat16* y) {
  constexpr int kMany = 4;
  for (int64_t row = 0; row < rows; ++row, x += channels, y += channels) {
    int64_t c = 0;
    for (; c + kMany * kFloats <= channels; c += kMany * kFloats) {
      const Several<kMany> found = gelu_of(sum_of<kMany>(x + c, bias + c));
      SWIN_MOE_EACH store_half(y + c + i * kFloats, found.v[i]);
    }
    for (; c + kFloats <= channels; c += kFloats) store_half(y + c, gelu_of(sum_of<1>(x + c, bias + c)).v[0]);
    if (c < channels) {
      const Several<1> sum{{load_last(x + c, channels - c) + load_last(bias + c, channels - c)}};
      store_last(y + c, gelu_of(sum).v[0], channels - c);
    }
  }
}

inline void gelu_gradients(const BFloat16* grad, const BFloat16* x, const float* bias, int64_t rows,
                                    int64_t channels, BFloat16* to, float* sums) {
  constexpr int kMany = 4;
  for (int64_t row = 0; row < rows; ++row, grad += channels, x += channels, to += channels) {
    int64_t c = 0;
    for (; c + kMany * kFloats <= channels; c += kMany * kFloats) {
      Several<kMany> given = slope_of(sum_of<kMany>(x + c, bias + c));
      SWIN_MOE_EACH given.v[i] *= load_as_float(grad + c + i * kFloats);
      SWIN_MOE_EACH store_half(to + c + i * kFloats, given.v[i]);
      SWIN_MOE_EACH store(sums + c + i * kFloats, load(sums + c + i * kFloats) + given.v[i]);
    }
    for (; c + kFloats <= channels; c += kFloats) {
      const Floats given = load_as_float(grad + c) * slope_of(sum_of<1>(x + c, bias + c)).v[0];
      store_half(to + c, given);
      store(sums + c, load(sums + c) + given);
    }
    if (c < channels) {
      const int64_t rest = channels - c;
      const Several<1> sum{{load_last(x + c, rest) + load_last(bias + c, rest)}};
      const Floats given = load_last(grad + c, rest) * slope_of(sum).v[0];
      store_last(to + c, given, rest);
      for (int64_t i = 0; i < rest; ++i) sums[c + i] += given[i];
    }
  }
}

}  // namespace SWIN_MOE_CAPABILITY
}  // namespace swin_moe
