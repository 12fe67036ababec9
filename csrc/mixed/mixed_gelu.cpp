// The bias of a hidden layer and exact GELU of bfloat16 rows, and their gradients in one pass over the rows.
// swin_moe/ops/mixed/gelu.py says what each argument means and has the reference.
#include "rows_of_half.h"

#include "memory/kept_memory.h"

#include <torch/library.h>

#include <tuple>

namespace swin_moe {
namespace {

using at::Tensor;

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
  const uint16_t* from = half_data(x);
  uint16_t* to = half_data_to_write(y);
  const float* b = bias.const_data_ptr<float>();
  at::parallel_for(0, rows, std::max<int64_t>(1, kLeastElements / channels), [&](int64_t begin, int64_t end) {
    mixed_kernels().gelu_rows(from + begin * channels, b, end - begin, channels, to + begin * channels);
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
  const uint16_t *given = half_data(grad), *from = half_data(x);
  uint16_t* to = half_data_to_write(grad_x);
  const float* b = bias.const_data_ptr<float>();
  const Tensor sums = sums_of_runs(rows, channels, channels, [&](int64_t first, int64_t count, float* sum) {
    const int64_t at = first * channels;
    mixed_kernels().gelu_gradients(given + at, from + at, b, count, channels, to + at, sum);
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
