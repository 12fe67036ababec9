// LayerNorm of bfloat16 rows, and its gradients.
#pragma once

#include "half_rows.h"

namespace swin_moe {
namespace SWIN_MOE_CAPABILITY {

// kRows rows, whose sums take turns: each addition waits for the one before it.
template <int kRows>
SWIN_MOE_INLINE void norm_of(const BFloat16* x, const float* weight, const float* bias, float eps, int64_t channels,
                              BFloat16* y, float* mean, float* rstd) {
  Floats sums[kRows]{}, squares[kRows]{};
  float sum[kRows]{}, square[kRows]{};
  int64_t c = 0;
  for (; c + kFloats <= channels; c += kFloats)
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) sums[i] += load_as_float(x + i * channels + c);
  for (; c < channels; ++c)
    for (int i = 0; i < kRows; ++i) sum[i] += widen(x[i * channels + c]);
  for (int i = 0; i < kRows; ++i) mean[i] = (sum[i] + sum_of_lanes<float>(sums[i])) / float(channels);
  for (c = 0; c + kFloats <= channels; c += kFloats)
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const Floats off = load_as_float(x + i * channels + c) - mean[i];
      squares[i] += off * off;
    }
  for (; c < channels; ++c)
    for (int i = 0; i < kRows; ++i) {
      const float off = widen(x[i * channels + c]) - mean[i];
      square[i] += off * off;
    }
  for (int i = 0; i < kRows; ++i)
    rstd[i] = 1.0f / std::sqrt((square[i] + sum_of_lanes<float>(squares[i])) / float(channels) + eps);
  for (c = 0; c + kFloats <= channels; c += kFloats) {
    const Floats w = load(weight + c), b = load(bias + c);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i)
      store_half(y + i * channels + c, (load_as_float(x + i * channels + c) - mean[i]) * rstd[i] * w + b);
  }
  for (; c < channels; ++c)
    for (int i = 0; i < kRows; ++i)
      y[i * channels + c] = narrow((widen(x[i * channels + c]) - mean[i]) * rstd[i] * weight[c] + bias[c], BFloat16{});
}

inline void norm_rows(const BFloat16* x, const float* weight, const float* bias, float eps, int64_t rows,
                               int64_t channels, BFloat16* y, float* mean, float* rstd) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4)
    norm_of<4>(x + row * channels, weight, bias, eps, channels, y + row * channels, mean + row, rstd + row);
  for (; row < rows; ++row)
    norm_of<1>(x + row * channels, weight, bias, eps, channels, y + row * channels, mean + row, rstd + row);
}

// kRows rows: sums (2, channels) of the gradients of weight and bias, and the gradient of x.
template <int kRows>
SWIN_MOE_INLINE void norm_gradients_of(const NormGradients& at, int64_t row, int64_t channels, float* sums) {
  const BFloat16 *grad = as_half(at.grad) + row * channels, *x = as_half(at.x) + row * channels;
  const float *mean = at.mean + row, *rstd = at.rstd + row;
  Floats means[kRows]{}, slopes[kRows]{};
  float mean_sum[kRows]{}, slope_sum[kRows]{};
  int64_t c = 0;
  for (; c + kFloats <= channels; c += kFloats) {
    const Floats w = load(at.weight + c);
    Floats of_weight{}, of_bias{};
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const Floats g = load_as_float(grad + i * channels + c);
      const Floats normed = (load_as_float(x + i * channels + c) - mean[i]) * rstd[i];
      of_weight += g * normed;
      of_bias += g;
      means[i] += g * w;
      slopes[i] += g * w * normed;
    }
    store(sums + c, load(sums + c) + of_weight);
    store(sums + channels + c, load(sums + channels + c) + of_bias);
  }
  for (; c < channels; ++c)
    for (int i = 0; i < kRows; ++i) {
      const float g = widen(grad[i * channels + c]), normed = (widen(x[i * channels + c]) - mean[i]) * rstd[i];
      sums[c] += g * normed;
      sums[channels + c] += g;
      mean_sum[i] += g * at.weight[c];
      slope_sum[i] += g * at.weight[c] * normed;
    }
  if (!at.to) return;
  for (int i = 0; i < kRows; ++i) {
    BFloat16* to = as_half(at.to) + (row + i) * channels;
    const BFloat16 *g = grad + i * channels, *from = x + i * channels;
    const float r = rstd[i], m = mean[i];
    const float shift = (mean_sum[i] + sum_of_lanes<float>(means[i])) / float(channels);
    const float slope = (slope_sum[i] + sum_of_lanes<float>(slopes[i])) / float(channels);
    for (c = 0; c + kFloats <= channels; c += kFloats) {
      const Floats normed = (load_as_float(from + c) - m) * r;
      store_half(to + c, (load_as_float(g + c) * load(at.weight + c) - shift - normed * slope) * r);
    }
    for (; c < channels; ++c) {
      const float normed = (widen(from[c]) - m) * r;
      to[c] = narrow((widen(g[c]) * at.weight[c] - shift - normed * slope) * r, BFloat16{});
    }
  }
}

inline void norm_gradients(const NormGradients& at, int64_t first, int64_t rows, int64_t channels, float* sums) {
  int64_t row = first;
  for (; row + 4 <= first + rows; row += 4) norm_gradients_of<4>(at, row, channels, sums);
  for (; row < first + rows; ++row) norm_gradients_of<1>(at, row, channels, sums);
}

}  // namespace SWIN_MOE_CAPABILITY
}  // namespace swin_moe
