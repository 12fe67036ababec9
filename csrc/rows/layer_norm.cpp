// The backward of LayerNorm: PyTorch's gradient of x, and those of weight and bias as sums over rows in float32,
// whatever the rows are stored in.
// swin_moe/ops/layer_norm.py says what each argument means and has the reference.
#include "cpu/clones.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/native_layer_norm_backward.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <tuple>

namespace swin_moe {
namespace {

using at::Tensor;

constexpr int64_t kRunRows = 256;  // added up for themselves, however many threads there are
constexpr int64_t kLeastElements = 32768;  // that are worth a thread

SWIN_MOE_INLINED float widened(float x) { return x; }
SWIN_MOE_INLINED float widened(at::BFloat16 x) { return std::bit_cast<float>(uint32_t(x.x) << 16); }
SWIN_MOE_INLINED float widened(at::Half x) { return static_cast<float>(x); }

// Rows [0, rows) of a run. Four rows at a time: sums are read and written once for them.
template <class T>
SWIN_MOE_INLINED void add_rows(const T* grad, const T* x, const float* mean, const float* rstd, int64_t rows,
                               int64_t channels, float* __restrict weight, float* __restrict bias) {
  std::fill(weight, weight + channels, 0.0f);
  std::fill(bias, bias + channels, 0.0f);
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4, grad += 4 * channels, x += 4 * channels) {
    const float m0 = mean[row], m1 = mean[row + 1], m2 = mean[row + 2], m3 = mean[row + 3];
    const float r0 = rstd[row], r1 = rstd[row + 1], r2 = rstd[row + 2], r3 = rstd[row + 3];
    for (int64_t c = 0; c < channels; ++c) {
      const float g0 = widened(grad[c]), g1 = widened(grad[channels + c]);
      const float g2 = widened(grad[2 * channels + c]), g3 = widened(grad[3 * channels + c]);
      const float x0 = widened(x[c]), x1 = widened(x[channels + c]);
      const float x2 = widened(x[2 * channels + c]), x3 = widened(x[3 * channels + c]);
      weight[c] += (g0 * ((x0 - m0) * r0) + g1 * ((x1 - m1) * r1)) + (g2 * ((x2 - m2) * r2) + g3 * ((x3 - m3) * r3));
      bias[c] += (g0 + g1) + (g2 + g3);
    }
  }
  for (; row < rows; ++row, grad += channels, x += channels) {
    const float m = mean[row], r = rstd[row];
    for (int64_t c = 0; c < channels; ++c) {
      const float g = widened(grad[c]);
      weight[c] += g * ((widened(x[c]) - m) * r);
      bias[c] += g;
    }
  }
}

SWIN_MOE_CLONES void add_run(const float* grad, const float* x, const float* mean, const float* rstd, int64_t rows,
                             int64_t channels, float* weight, float* bias) {
  add_rows(grad, x, mean, rstd, rows, channels, weight, bias);
}

SWIN_MOE_CLONES void add_run(const at::BFloat16* grad, const at::BFloat16* x, const float* mean, const float* rstd,
                             int64_t rows, int64_t channels, float* weight, float* bias) {
  add_rows(grad, x, mean, rstd, rows, channels, weight, bias);
}

SWIN_MOE_CLONES void add_run(const at::Half* grad, const at::Half* x, const float* mean, const float* rstd,
                             int64_t rows, int64_t channels, float* weight, float* bias) {
  add_rows(grad, x, mean, rstd, rows, channels, weight, bias);
}

// runs (runs, 2, channels): the sums of each run; they are added up in their order, into the first.
template <class T>
void add_all(const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& runs) {
  const int64_t rows = mean.numel(), channels = runs.size(2), size = 2 * channels;
  const T *g = grad.const_data_ptr<T>(), *from = x.const_data_ptr<T>();
  const float *m = mean.const_data_ptr<float>(), *r = rstd.const_data_ptr<float>();
  float* sums = runs.mutable_data_ptr<float>();
  const int64_t grain = std::max<int64_t>(1, kLeastElements / std::max<int64_t>(kRunRows * channels, 1));
  at::parallel_for(0, runs.size(0), grain, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t row = n * kRunRows;
      add_run(g + row * channels, from + row * channels, m + row, r + row, std::min(kRunRows, rows - row), channels,
              sums + n * size, sums + n * size + channels);
    }
  });
  for (int64_t n = 1; n < runs.size(0); ++n)
    for (int64_t i = 0; i < size; ++i) sums[i] += sums[n * size + i];
}

void check(const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& weight,
           const Tensor& bias) {
  TORCH_CHECK_VALUE(x.dim() >= 1 && grad.sizes() == x.sizes() && weight.dim() == 1 && weight.size(0) == x.size(-1) &&
                        weight.size(0) > 0 && bias.sizes() == weight.sizes(),
                    "layer_norm_backward: grad and x must be (..., channels), weight and bias (channels,), got ",
                    grad.sizes(), ", ", x.sizes(), ", ", weight.sizes(), " and ", bias.sizes());
  const int64_t rows = x.numel() / weight.size(0);
  TORCH_CHECK_VALUE(mean.numel() == rows && rstd.numel() == rows,
                    "layer_norm_backward: mean and rstd must be one number for each of ", rows, " rows, got ",
                    mean.sizes(), " and ", rstd.sizes());
  TORCH_CHECK_TYPE(grad.scalar_type() == x.scalar_type(), "layer_norm_backward: grad must be of the dtype of x, got ",
                   grad.scalar_type(), " and ", x.scalar_type());
  for (const Tensor& wide : {mean, rstd, weight, bias})
    TORCH_CHECK_TYPE(wide.scalar_type() == at::kFloat,
                     "layer_norm_backward: mean, rstd, weight and bias must be float32, got ", wide.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward_cpu(const Tensor& grad_, const Tensor& x_, const Tensor& mean_,
                                                           const Tensor& rstd_, const Tensor& weight,
                                                           const Tensor& bias, std::array<bool, 3> needs) {
  check(grad_, x_, mean_, rstd_, weight, bias);
  const Tensor grad = grad_.contiguous(), x = x_.contiguous(), mean = mean_.contiguous(), rstd = rstd_.contiguous();
  Tensor grad_x, grad_weight, grad_bias;
  if (needs[0])
    grad_x = std::get<0>(
        at::native_layer_norm_backward(grad, x, weight.sizes(), mean, rstd, weight, bias, {true, false, false}));
  if (needs[1] || needs[2]) {
    const int64_t runs = std::max<int64_t>(1, (mean.numel() + kRunRows - 1) / kRunRows);
    const Tensor sums = at::empty({runs, 2, weight.size(0)}, weight.options());
    switch (x.scalar_type()) {
      case at::kFloat: add_all<float>(grad, x, mean, rstd, sums); break;
      case at::kBFloat16: add_all<at::BFloat16>(grad, x, mean, rstd, sums); break;
      case at::kHalf: add_all<at::Half>(grad, x, mean, rstd, sums); break;
      default:
        TORCH_CHECK_TYPE(false, "layer_norm_backward takes float32, bfloat16 and float16, got ", x.scalar_type());
    }
    // Copies: gradients outlive the step, the sums of all runs should not.
    if (needs[1]) grad_weight = sums[0][0].clone();
    if (needs[2]) grad_bias = sums[0][1].clone();
  }
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace
}  // namespace swin_moe

TORCH_LIBRARY_FRAGMENT(swin_moe, m) {
  m.def(
      "layer_norm_backward(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, bool[3] needs) "
      "-> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(swin_moe, CPU, m) {
  m.impl("layer_norm_backward", &swin_moe::layer_norm_backward_cpu);
}
