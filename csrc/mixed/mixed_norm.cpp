// LayerNorm of bfloat16 rows with float32 weights, and its gradients in one pass over the rows.
// swin_moe/ops/mixed/norm.py says what each argument means and has the reference.
#include "rows_of_half.h"

#include "kept_memory.h"

#include <torch/library.h>

#include <array>
#include <tuple>

namespace swin_moe {
namespace {

using at::Tensor;
using clones::load;
using clones::load_as_float;
using clones::narrow;
using clones::store;
using clones::store_narrow;
using clones::sum_of_lanes;
using clones::widen;

// kRows rows, whose sums take turns: each addition waits for the one before it.
template <int kRows>
SWIN_MOE_INLINED void norm_of(const BFloat16* x, const float* weight, const float* bias, float eps, int64_t channels,
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
      store_narrow(y + i * channels + c, (load_as_float(x + i * channels + c) - mean[i]) * rstd[i] * w + b);
  }
  for (; c < channels; ++c)
    for (int i = 0; i < kRows; ++i)
      y[i * channels + c] = narrow((widen(x[i * channels + c]) - mean[i]) * rstd[i] * weight[c] + bias[c], BFloat16{});
}

SWIN_MOE_CLONES void norm_rows(const BFloat16* x, const float* weight, const float* bias, float eps, int64_t rows,
                               int64_t channels, BFloat16* y, float* mean, float* rstd) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4)
    norm_of<4>(x + row * channels, weight, bias, eps, channels, y + row * channels, mean + row, rstd + row);
  for (; row < rows; ++row)
    norm_of<1>(x + row * channels, weight, bias, eps, channels, y + row * channels, mean + row, rstd + row);
}

struct Gradients {
  const BFloat16 *grad, *x;
  const float *mean, *rstd, *weight;
  BFloat16* to;  // the gradient of x; null = not asked for
};

// kRows rows: sums (2, channels) of the gradients of weight and bias, and the gradient of x.
template <int kRows>
SWIN_MOE_INLINED void norm_gradients_of(const Gradients& at, int64_t row, int64_t channels, float* sums) {
  const BFloat16 *grad = at.grad + row * channels, *x = at.x + row * channels;
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
    BFloat16* to = at.to + (row + i) * channels;
    const BFloat16 *g = grad + i * channels, *from = x + i * channels;
    const float r = rstd[i], m = mean[i];
    const float shift = (mean_sum[i] + sum_of_lanes<float>(means[i])) / float(channels);
    const float slope = (slope_sum[i] + sum_of_lanes<float>(slopes[i])) / float(channels);
    for (c = 0; c + kFloats <= channels; c += kFloats) {
      const Floats normed = (load_as_float(from + c) - m) * r;
      store_narrow(to + c, (load_as_float(g + c) * load(at.weight + c) - shift - normed * slope) * r);
    }
    for (; c < channels; ++c) {
      const float normed = (widen(from[c]) - m) * r;
      to[c] = narrow((widen(g[c]) * at.weight[c] - shift - normed * slope) * r, BFloat16{});
    }
  }
}

SWIN_MOE_CLONES void norm_gradients(Gradients at, int64_t first, int64_t rows, int64_t channels, float* sums) {
  int64_t row = first;
  for (; row + 4 <= first + rows; row += 4) norm_gradients_of<4>(at, row, channels, sums);
  for (; row < first + rows; ++row) norm_gradients_of<1>(at, row, channels, sums);
}

void check(const char* name, const Tensor& x, const Tensor& weight, std::initializer_list<Tensor> wide) {
  TORCH_CHECK_VALUE(x.dim() >= 1 && weight.dim() == 1 && weight.size(0) == x.size(-1) && weight.size(0) > 0, name,
                    ": x must be (..., channels) and weight (channels,), got ", x.sizes(), " and ", weight.sizes());
  TORCH_CHECK_TYPE(x.scalar_type() == at::kBFloat16, name, ": x must be bfloat16, got ", x.scalar_type());
  for (const Tensor& w : wide)
    TORCH_CHECK_TYPE(w.scalar_type() == at::kFloat, name, ": all but the rows must be float32, got ", w.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> mixed_norm_cpu(const Tensor& x_, const Tensor& weight_, const Tensor& bias_,
                                                  double eps) {
  check("mixed_norm", x_, weight_, {weight_, bias_});
  TORCH_CHECK_VALUE(bias_.sizes() == weight_.sizes(), "mixed_norm: bias must be of the shape of weight, got ",
                    bias_.sizes(), " and ", weight_.sizes());
  const Tensor x = x_.contiguous(), weight = weight_.contiguous(), bias = bias_.contiguous();
  const int64_t channels = weight.size(0), rows = x.numel() / channels;
  const Tensor y = empty_kept(x.sizes(), at::kBFloat16), mean = at::empty({rows}, weight.options());
  const Tensor rstd = at::empty({rows}, weight.options());
  const BFloat16* from = half_data(x);
  const float *w = weight.const_data_ptr<float>(), *b = bias.const_data_ptr<float>();
  BFloat16* to = half_data_to_write(y);
  float *m = mean.mutable_data_ptr<float>(), *r = rstd.mutable_data_ptr<float>();
  const int64_t grain = std::max<int64_t>(1, kLeastElements / (4 * channels));
  at::parallel_for(0, (rows + 3) / 4, grain, [&](int64_t begin, int64_t end) {  // four rows at a time on any thread
    const int64_t first = 4 * begin, count = std::min(4 * end, rows) - first;
    norm_rows(from + first * channels, w, b, float(eps), count, channels, to + first * channels, m + first, r + first);
  });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> mixed_norm_backward_cpu(const Tensor& grad_, const Tensor& x_, const Tensor& mean_,
                                                           const Tensor& rstd_, const Tensor& weight_,
                                                           std::array<bool, 3> needs) {
  check("mixed_norm_backward", x_, weight_, {mean_, rstd_, weight_});
  TORCH_CHECK_VALUE(grad_.sizes() == x_.sizes() && grad_.scalar_type() == x_.scalar_type(),
                    "mixed_norm_backward: grad must be of the shape and dtype of x, got ", grad_.sizes(), " of ",
                    grad_.scalar_type(), " and ", x_.sizes());
  const Tensor grad = grad_.contiguous(), x = x_.contiguous(), weight = weight_.contiguous();
  const Tensor mean = mean_.contiguous(), rstd = rstd_.contiguous();
  const int64_t channels = weight.size(0), rows = x.numel() / channels;
  TORCH_CHECK_VALUE(mean.numel() == rows && rstd.numel() == rows,
                    "mixed_norm_backward: mean and rstd must be one number for each of ", rows, " rows, got ",
                    mean.sizes(), " and ", rstd.sizes());
  Tensor grad_x, grad_weight, grad_bias;
  if (needs[0]) grad_x = empty_kept(x.sizes(), at::kBFloat16);
  const Gradients at{half_data(grad),
                     half_data(x),
                     mean.const_data_ptr<float>(),
                     rstd.const_data_ptr<float>(),
                     weight.const_data_ptr<float>(),
                     needs[0] ? half_data_to_write(grad_x) : nullptr};
  const Tensor sums = sums_of_runs(rows, channels, 2 * channels, [&](int64_t first, int64_t count, float* to) {
    norm_gradients(at, first, count, channels, to);
  });
  // Copies: gradients outlive the step, the sums of all runs should not.
  if (needs[1]) grad_weight = sums.narrow(0, 0, channels).clone();
  if (needs[2]) grad_bias = sums.narrow(0, channels, channels).clone();
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace
}  // namespace swin_moe

TORCH_LIBRARY_FRAGMENT(swin_moe, m) {
  m.def("mixed_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)");
  m.def(
      "mixed_norm_backward(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor weight, bool[3] needs) "
      "-> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(swin_moe, CPU, m) {
  m.impl("mixed_norm", &swin_moe::mixed_norm_cpu);
  m.impl("mixed_norm_backward", &swin_moe::mixed_norm_backward_cpu);
}
