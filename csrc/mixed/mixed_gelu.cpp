// The bias of a hidden layer and exact GELU of bfloat16 rows, and their gradients in one pass over the rows.
// swin_moe/ops/mixed/gelu.py says what each argument means and has the reference.
#include "rows_of_half.h"

#include "kept_memory.h"

#include <torch/library.h>

#include <tuple>

namespace swin_moe {
namespace {

using at::Tensor;
using clones::load;
using clones::load_as_float;
using clones::store;
using clones::store_narrow;

using Integers = clones::Vector<int32_t>;
constexpr float kFarthest = 6.5f;  // beyond it the normal distribution has less than 4e-11, which counts as none

// kMany vectors, whose operations take turns: each waits for the one before it, four cycles long, and a processor looks
// ahead by some 100 of them (0.5 ns a number with one vector, less than half with four).
template <int kMany>
struct Several {
  Floats v[kMany];
};

#define SWIN_MOE_EACH _Pragma("GCC unroll 4") for (int i = 0; i < kMany; ++i)

// y = y * x + c
template <int kMany>
SWIN_MOE_INLINED void multiply_add(Several<kMany>& y, const Several<kMany>& x, float c) {
  SWIN_MOE_EACH y.v[i] = y.v[i] * x.v[i] + c;
}

// Phi(-u), the normal distribution's share below -u, for 0 <= u <= kFarthest: 2 to the power of a polynomial of degree 7
// (log2 Phi(-u) within 7e-6), and 2 to a fraction as one of degree 4 (within 8e-6). Least maximal errors, found by
// reweighted least squares in float64.
template <int kMany>
SWIN_MOE_INLINED Several<kMany> share_below(const Several<kMany>& u) {
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
SWIN_MOE_INLINED Several<kMany> magnitude_of(const Several<kMany>& x) {
  Several<kMany> u;
  SWIN_MOE_EACH u.v[i] = (Floats)((Integers)x.v[i] & 0x7fffffff);
  SWIN_MOE_EACH u.v[i] = u.v[i] < kFarthest ? u.v[i] : clones::broadcast(kFarthest);
  return u;
}

// x Phi(x)
template <int kMany>
SWIN_MOE_INLINED Several<kMany> gelu_of(const Several<kMany>& x) {
  Several<kMany> y = share_below(magnitude_of(x));
  SWIN_MOE_EACH y.v[i] = x.v[i] < -kFarthest ? Floats{} : y.v[i];
  SWIN_MOE_EACH y.v[i] = x.v[i] * (x.v[i] < 0.0f ? y.v[i] : 1.0f - y.v[i]);
  return y;
}

// Phi(x) + x phi(x). With l(u) = phi(u) / Phi(-u), of which 1 - u l(u) is a polynomial here, it is Phi(-u) (1 - u l(u))
// at -u, and 1 less that at u. x that is not finite gives NaN, as PyTorch's does.
template <int kMany>
SWIN_MOE_INLINED Several<kMany> slope_of(const Several<kMany>& x) {
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
SWIN_MOE_INLINED Floats load_last(const T* from, int64_t count) {
  float lanes[kFloats] = {};
  clones::load_row(from, lanes, int(count));
  return load(lanes);
}

SWIN_MOE_INLINED void store_last(BFloat16* to, Floats x, int64_t count) {
  BFloat16 lanes[kFloats];
  store_narrow(lanes, x);
  std::memcpy(to, lanes, count * sizeof(BFloat16));
}

template <int kMany>
SWIN_MOE_INLINED Several<kMany> sum_of(const BFloat16* x, const float* bias) {
  Several<kMany> sum;
  SWIN_MOE_EACH sum.v[i] = load_as_float(x + i * kFloats) + load(bias + i * kFloats);
  return sum;
}

SWIN_MOE_CLONES void gelu_rows(const BFloat16* x, const float* bias, int64_t rows, int64_t channels, BFloat16* y) {
  constexpr int kMany = 4;
  for (int64_t row = 0; row < rows; ++row, x += channels, y += channels) {
    int64_t c = 0;
    for (; c + kMany * kFloats <= channels; c += kMany * kFloats) {
      const Several<kMany> found = gelu_of(sum_of<kMany>(x + c, bias + c));
      SWIN_MOE_EACH store_narrow(y + c + i * kFloats, found.v[i]);
    }
    for (; c + kFloats <= channels; c += kFloats) store_narrow(y + c, gelu_of(sum_of<1>(x + c, bias + c)).v[0]);
    if (c < channels) {
      const Several<1> sum{{load_last(x + c, channels - c) + load_last(bias + c, channels - c)}};
      store_last(y + c, gelu_of(sum).v[0], channels - c);
    }
  }
}

SWIN_MOE_CLONES void gelu_gradients(const BFloat16* grad, const BFloat16* x, const float* bias, int64_t rows,
                                    int64_t channels, BFloat16* to, float* sums) {
  constexpr int kMany = 4;
  for (int64_t row = 0; row < rows; ++row, grad += channels, x += channels, to += channels) {
    int64_t c = 0;
    for (; c + kMany * kFloats <= channels; c += kMany * kFloats) {
      Several<kMany> given = slope_of(sum_of<kMany>(x + c, bias + c));
      SWIN_MOE_EACH given.v[i] *= load_as_float(grad + c + i * kFloats);
      SWIN_MOE_EACH store_narrow(to + c + i * kFloats, given.v[i]);
      SWIN_MOE_EACH store(sums + c + i * kFloats, load(sums + c + i * kFloats) + given.v[i]);
    }
    for (; c + kFloats <= channels; c += kFloats) {
      const Floats given = load_as_float(grad + c) * slope_of(sum_of<1>(x + c, bias + c)).v[0];
      store_narrow(to + c, given);
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

void check(const char* name, const Tensor& x, const Tensor& bias) {
  TORCH_CHECK_VALUE(x.dim() >= 1 && bias.dim() == 1 && bias.size(0) == x.size(-1) && bias.size(0) > 0, name,
                    ": x must be (..., channels) and bias (channels,), got ", x.sizes(), " and ", bias.sizes());
  TORCH_CHECK_TYPE(x.scalar_type() == at::kBFloat16 && bias.scalar_type() == at::kFloat, name,
                   ": x must be bfloat16 and bias float32, got ", x.scalar_type(), " and ", bias.scalar_type());
}

Tensor mixed_gelu_cpu(const Tensor& x_, const Tensor& bias_) {
  check("mixed_gelu", x_, bias_);
  const Tensor x = x_.contiguous(), bias = bias_.contiguous(), y = empty_kept(x.sizes(), at::kBFloat16);
  const int64_t channels = bias.size(0), rows = x.numel() / channels;
  const BFloat16* from = half_data(x);
  BFloat16* to = half_data_to_write(y);
  const float* b = bias.const_data_ptr<float>();
  at::parallel_for(0, rows, std::max<int64_t>(1, kLeastElements / channels), [&](int64_t begin, int64_t end) {
    gelu_rows(from + begin * channels, b, end - begin, channels, to + begin * channels);
  });
  return y;
}

std::tuple<Tensor, Tensor> mixed_gelu_backward_cpu(const Tensor& grad_, const Tensor& x_, const Tensor& bias_) {
  check("mixed_gelu_backward", x_, bias_);
  TORCH_CHECK_VALUE(grad_.sizes() == x_.sizes() && grad_.scalar_type() == x_.scalar_type(),
                    "mixed_gelu_backward: grad must be of the shape and dtype of x, got ", grad_.sizes(), " of ",
                    grad_.scalar_type(), " and ", x_.sizes());
  const Tensor grad = grad_.contiguous(), x = x_.contiguous(), bias = bias_.contiguous();
  const Tensor grad_x = empty_kept(x.sizes(), at::kBFloat16);
  const int64_t channels = bias.size(0), rows = x.numel() / channels;
  const BFloat16 *given = half_data(grad), *from = half_data(x);
  BFloat16* to = half_data_to_write(grad_x);
  const float* b = bias.const_data_ptr<float>();
  const Tensor sums = sums_of_runs(rows, channels, channels, [&](int64_t first, int64_t count, float* sum) {
    const int64_t at = first * channels;
    gelu_gradients(given + at, from + at, b, count, channels, to + at, sum);
  });
  return {grad_x, sums.clone()};
}

}  // namespace
}  // namespace swin_moe

TORCH_LIBRARY_FRAGMENT(swin_moe, m) {
  m.def("mixed_gelu(Tensor x, Tensor bias) -> Tensor");
  m.def("mixed_gelu_backward(Tensor grad, Tensor x, Tensor bias) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(swin_moe, CPU, m) {
  m.impl("mixed_gelu", &swin_moe::mixed_gelu_cpu);
  m.impl("mixed_gelu_backward", &swin_moe::mixed_gelu_backward_cpu);
}
