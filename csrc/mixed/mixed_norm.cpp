// LayerNorm of bfloat16 rows with float32 weights, and its gradients in one pass over the rows.
// swin_moe/ops/mixed/norm.py says what each argument means and has the reference.
#include "rows_of_half.h"

#include "memory/kept_memory.h"

#include <torch/library.h>

#include <array>
#include <tuple>

namespace swin_moe {
namespace {

using at::Tensor;

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
  const uint16_t* from = half_data(x);
  const float *w = weight.const_data_ptr<float>(), *b = bias.const_data_ptr<float>();
  uint16_t* to = half_data_to_write(y);
  float *m = mean.mutable_data_ptr<float>(), *r = rstd.mutable_data_ptr<float>();
  const int64_t grain = std::max<int64_t>(1, kLeastElements / (4 * channels));
  at::parallel_for(0, (rows + 3) / 4, grain, [&](int64_t begin, int64_t end) {  // four rows at a time on any thread
    const int64_t first = 4 * begin, count = std::min(4 * end, rows) - first;
    mixed_kernels().norm_rows(from + first * channels, w, b, float(eps), count, channels, to + first * channels,
                              m + first, r + first);
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
  const NormGradients at{half_data(grad),
                     half_data(x),
                     mean.const_data_ptr<float>(),
                     rstd.const_data_ptr<float>(),
                     weight.const_data_ptr<float>(),
                     needs[0] ? half_data_to_write(grad_x) : nullptr};
  const Tensor sums = sums_of_runs(rows, channels, 2 * channels, [&](int64_t first, int64_t count, float* to) {
    mixed_kernels().norm_gradients(at, first, count, channels, to);
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
