// Linear layers in bfloat16 with float32 weights: PyTorch's products, in memory that is kept from step to step.
// swin_moe/ops/mixed/linear.py says what each argument means and has the reference.
#include "rows_of_half.h"

#include "memory/kept_memory.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <array>
#include <cstring>
#include <optional>
#include <tuple>

namespace swin_moe {
namespace {

using at::Tensor;

// Products of this many elements at a time, which a cache holds: the bias is written to all of them before it, and
// read again; and gradients of weights are widened. Not where a weight is so large that packing it each time would
// cost more.
constexpr int64_t kChunkElements = 512 << 10;
constexpr int64_t kLargestPackedAgain = 128 << 10;
// From so many rows on, with weights that small, oneDNN is 1.05 to 1.25 times as fast with the wider matrix on the
// right.
constexpr int64_t kRowsToTurn = 4096;

Tensor half_weight_cpu(const Tensor& weight_) {
  TORCH_CHECK_TYPE(weight_.scalar_type() == at::kFloat, "half_weight: weight must be float32, got ",
                   weight_.scalar_type());
  const Tensor weight = weight_.contiguous(), half = empty_kept(weight.sizes(), at::kBFloat16);
  const float* from = weight.const_data_ptr<float>();
  uint16_t* to = half_data_to_write(half);
  at::parallel_for(0, weight.numel(), kLeastElements, [&](int64_t begin, int64_t end) {
    mixed_kernels().narrow_all(from + begin, end - begin, to + begin);
  });
  return half;
}

void check(const char* name, const Tensor& x, const Tensor& weight) {
  TORCH_CHECK_VALUE(x.dim() >= 1 && weight.dim() == 2 && weight.size(1) == x.size(-1) && weight.numel() > 0, name,
                    ": x must be (..., inputs) and weight (outputs, inputs), got ", x.sizes(), " and ", weight.sizes());
  TORCH_CHECK_TYPE(x.scalar_type() == at::kBFloat16 && weight.scalar_type() == at::kBFloat16, name,
                   ": x and weight must be bfloat16, got ", x.scalar_type(), " and ", weight.scalar_type());
}

Tensor mixed_linear_cpu(const Tensor& x_, const Tensor& weight, const std::optional<Tensor>& bias) {
  check("mixed_linear", x_, weight);
  TORCH_CHECK_VALUE(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0)),
                    "mixed_linear: bias must be (outputs,), got ", bias ? bias->sizes() : at::IntArrayRef());
  at::AutoDispatchBelowADInplaceOrView guard;
  const int64_t inputs = weight.size(1), outputs = weight.size(0), rows = x_.numel() / inputs;
  const Tensor x = x_.contiguous().view({rows, inputs}), turned = weight.t();
  std::vector<int64_t> sizes = x_.sizes().vec();
  sizes.back() = outputs;
  Tensor y = empty_kept(sizes, at::kBFloat16), flat = y.view({rows, outputs});
  if (rows == 0) return y;
  if (!bias) {
    at::mm_out(flat, x, turned);
    return y;
  }
  TORCH_CHECK_TYPE(bias->scalar_type() == at::kBFloat16, "mixed_linear: bias must be bfloat16, got ",
                   bias->scalar_type());
  const Tensor short_bias = bias->contiguous();
  const uint16_t* added = half_data(short_bias);
  const int64_t chunk = weight.numel() > kLargestPackedAgain ? rows : std::max<int64_t>(kChunkElements / outputs, 256);
  for (int64_t row = 0; row < rows; row += chunk) {
    const int64_t count = std::min(chunk, rows - row);
    Tensor part = flat.narrow(0, row, count);
    uint16_t* to = half_data_to_write(part);
    for (int64_t i = 0; i < count; ++i) std::memcpy(to + i * outputs, added, outputs * sizeof(uint16_t));
    part.addmm_(x.narrow(0, row, count), turned);
  }
  return y;
}

void widen(const Tensor& half, const Tensor& wide) {
  const uint16_t* from = half_data(half);
  float* to = wide.mutable_data_ptr<float>();
  at::parallel_for(0, half.numel(), kLeastElements, [&](int64_t begin, int64_t end) {
    mixed_kernels().widen_all(from + begin, end - begin, to + begin);
  });
}

// The gradient of a weight (outputs, inputs), of grad (rows, outputs) and x (rows, inputs).
Tensor weight_gradient(const Tensor& grad, const Tensor& x, bool wide) {
  const int64_t rows = grad.size(0), outputs = grad.size(1), inputs = x.size(1);
  const Tensor found = empty_kept({outputs, inputs}, wide ? at::kFloat : at::kBFloat16);
  if (rows == 0) return found.zero_();
  if (outputs > inputs && rows >= kRowsToTurn && outputs * inputs <= kLargestPackedAgain) {
    Tensor turned = empty_kept({inputs, outputs}, at::kBFloat16);
    at::mm_out(turned, x.t(), grad);
    return found.copy_(turned.t());
  }
  Tensor whole = found;
  if (!wide) return at::mm_out(whole, grad.t(), x);
  // Outputs of which a cache holds the gradient in bfloat16, until it is widened.
  const int64_t parts = (outputs * inputs + kChunkElements - 1) / kChunkElements;
  const int64_t chunk = (outputs + parts - 1) / parts;
  for (int64_t first = 0; first < outputs; first += chunk) {
    const int64_t count = std::min(chunk, outputs - first);
    Tensor part = empty_kept({count, inputs}, at::kBFloat16);
    at::mm_out(part, grad.narrow(1, first, count).t(), x);
    widen(part, found.narrow(0, first, count));
  }
  return found;
}

std::tuple<Tensor, Tensor, Tensor> mixed_linear_backward_cpu(const Tensor& grad_, const Tensor& x_,
                                                             const Tensor& weight, bool wide,
                                                             std::array<bool, 3> needs) {
  check("mixed_linear_backward", x_, weight);
  const int64_t inputs = weight.size(1), outputs = weight.size(0), rows = x_.numel() / inputs;
  TORCH_CHECK_VALUE(grad_.dim() == x_.dim() && grad_.numel() == rows * outputs && grad_.size(-1) == outputs &&
                        grad_.scalar_type() == at::kBFloat16,
                    "mixed_linear_backward: grad must be (..., outputs) in bfloat16, got ", grad_.sizes(), " in ",
                    grad_.scalar_type());
  at::AutoDispatchBelowADInplaceOrView guard;
  const Tensor grad = grad_.contiguous().view({rows, outputs}), x = x_.contiguous().view({rows, inputs});
  Tensor grad_x, grad_weight, grad_bias;
  if (needs[0]) {
    grad_x = empty_kept(x_.sizes(), at::kBFloat16);
    Tensor flat = grad_x.view({rows, inputs});
    if (rows > 0) at::mm_out(flat, grad, weight);
  }
  if (needs[1]) grad_weight = weight_gradient(grad, x, wide);
  if (needs[2]) {
    const uint16_t* from = half_data(grad);
    const Tensor sums = sums_of_runs(rows, outputs, outputs, [&](int64_t first, int64_t count, float* to) {
      mixed_kernels().add_rows(from + first * outputs, count, outputs, to);
    });
    grad_bias = sums.to(at::kBFloat16);
  }
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace
}  // namespace swin_moe

TORCH_LIBRARY_FRAGMENT(swin_moe, m) {
  m.def("half_weight(Tensor weight) -> Tensor");
  m.def("mixed_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def(
      "mixed_linear_backward(Tensor grad, Tensor x, Tensor weight, bool wide, bool[3] needs) "
      "-> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(swin_moe, CPU, m) {
  m.impl("half_weight", &swin_moe::half_weight_cpu);
  m.impl("mixed_linear", &swin_moe::mixed_linear_cpu);
  m.impl("mixed_linear_backward", &swin_moe::mixed_linear_backward_cpu);
}
