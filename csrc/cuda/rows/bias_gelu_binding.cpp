// bias_gelu and the biases of experts on CUDA tensors. swin_moe/ops/bias_gelu.py says what each argument means.
// Compiled only where torch is a CUDA build.
#include "bias_gelu.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <optional>
#include <tuple>

#include "draws/random_draws.h"

namespace swin_moe {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

struct Element {
  RowElement number;
  float scale;  // as the type has it
};

Element element_of(const char* name, at::ScalarType type, double scale) {
  const float factor = float(scale);
  switch (type) {
    case at::kFloat: return {RowElement::kFloat32, factor};
    case at::kBFloat16: return {RowElement::kBFloat16, float(c10::BFloat16(factor))};
    case at::kHalf: return {RowElement::kFloat16, float(c10::Half(factor))};
    default: TORCH_CHECK_TYPE(false, name, ": rows must be float32, bfloat16 or float16, got ", type);
  }
}

// Fills in sizes and whose rows are whose; the tensors that the launch points into are the caller's and contiguous.
BiasGeluLaunch describe(const char* name, const Tensor& rows, int64_t experts, const OptionalTensor& ends) {
  TORCH_CHECK_VALUE(rows.dim() == 2, name, ": rows must be (rows, channels), got ", rows.sizes());
  TORCH_CHECK_VALUE(ends || rows.size(0) == 0 || (experts > 0 && rows.size(0) % experts == 0), name, ": ", rows.size(0),
                    " rows are no equal parts for ", experts, " experts");
  if (ends)
    TORCH_CHECK_VALUE(ends->dim() == 1 && ends->size(0) == experts && ends->scalar_type() == at::kInt &&
                          ends->is_contiguous() && ends->device() == rows.device(),
                      name, ": ends must be (", experts, ",) int32 on ", rows.device(), ", got ", ends->sizes(), " ",
                      ends->scalar_type(), " on ", ends->device());
  BiasGeluLaunch p{};
  p.rows = rows.size(0);
  p.channels = rows.size(1);
  p.experts = experts;
  p.ends = ends ? ends->const_data_ptr<int32_t>() : nullptr;
  return p;
}

void check_bias(const char* name, const Tensor& bias, const Tensor& rows) {
  TORCH_CHECK_VALUE(bias.dim() == 2 && bias.size(1) == rows.size(1) && bias.device() == rows.device(), name,
                    ": bias must be (experts, ", rows.size(1), ") on ", rows.device(), ", got ", bias.sizes(), " on ",
                    bias.device());
  TORCH_CHECK_TYPE(bias.scalar_type() == at::kFloat, name, ": bias must be float32, got ", bias.scalar_type());
}

// Which units are dropped; p keeps addresses in words and numbers.
void describe_draw(const char* name, BiasGeluLaunch& p, const Tensor& x, const OptionalTensor& words,
                   const OptionalTensor& numbers, const DrawSite& draw, double drop, double scale) {
  const Element element = element_of(name, x.scalar_type(), scale);
  p.element = int(element.number);
  if (!words) return;
  TORCH_CHECK_VALUE(numbers, name, ": rows are dropped by their numbers, and there are none");
  check_words(name, *words, *numbers);
  check_dropped(name, x, *numbers, drop);
  p.words = words->const_data_ptr<int64_t>();
  p.numbers = numbers->const_data_ptr<int64_t>();
  p.draw = draw;
  p.threshold = keep_threshold(drop);
  p.factor = element.scale;
}

OptionalTensor whole(const OptionalTensor& x) { return x ? OptionalTensor(x->contiguous()) : OptionalTensor(); }

Tensor bias_gelu_cuda(const Tensor& x_, const Tensor& bias_, const OptionalTensor& ends, const OptionalTensor& words,
                      const OptionalTensor& numbers_, int64_t layer, int64_t purpose, int64_t site, double drop,
                      double scale) {
  constexpr const char* kName = "bias_gelu";
  check_bias(kName, bias_, x_);
  const c10::cuda::CUDAGuard guard(x_.device());
  const Tensor x = x_.contiguous(), bias = bias_.contiguous();
  const OptionalTensor numbers = whole(numbers_);
  BiasGeluLaunch p = describe(kName, x, bias.size(0), ends);
  describe_draw(kName, p, x, words, numbers, {layer, purpose, site}, drop, scale);
  Tensor out = at::empty(x.sizes(), x.options());
  if (out.numel() == 0) return out;
  p.x = x.const_data_ptr();
  p.bias = bias.const_data_ptr<float>();
  p.out = out.mutable_data_ptr();
  C10_CUDA_CHECK(swin_moe_bias_gelu(&p, c10::cuda::getCurrentCUDAStream()));
  return out;
}

// The sums of a backward, and where its pieces go until then.
struct BiasGradient {
  Tensor grad, partials;
};

BiasGradient place_gradient(BiasGeluLaunch& p, const Tensor& rows) {
  const auto options = rows.options().dtype(at::kFloat);
  if (p.rows == 0 || p.channels == 0) return {at::zeros({p.experts, p.channels}, options), Tensor()};
  const int64_t pieces = swin_moe_bias_gelu_tiles(p.rows, p.channels) + p.experts;
  BiasGradient made{at::empty({p.experts, p.channels}, options), at::empty({pieces, p.channels}, options)};
  p.grad_bias = made.grad.mutable_data_ptr<float>();
  p.partials = made.partials.mutable_data_ptr<float>();
  return made;
}

std::tuple<Tensor, Tensor> bias_gelu_backward_cuda(const Tensor& grad_, const Tensor& x_, const Tensor& bias_,
                                                   const OptionalTensor& ends, const OptionalTensor& words,
                                                   const OptionalTensor& numbers_, int64_t layer, int64_t purpose,
                                                   int64_t site, double drop, double scale) {
  constexpr const char* kName = "bias_gelu_backward";
  check_bias(kName, bias_, x_);
  TORCH_CHECK_VALUE(grad_.sizes() == x_.sizes() && grad_.device() == x_.device(), kName, ": grad must be ", x_.sizes(),
                    " on ", x_.device(), ", got ", grad_.sizes(), " on ", grad_.device());
  TORCH_CHECK_TYPE(grad_.scalar_type() == x_.scalar_type(), kName, ": grad must be ", x_.scalar_type(), ", got ",
                   grad_.scalar_type());
  const c10::cuda::CUDAGuard guard(x_.device());
  const Tensor x = x_.contiguous(), bias = bias_.contiguous(), grad = grad_.contiguous();
  const OptionalTensor numbers = whole(numbers_);
  BiasGeluLaunch p = describe(kName, x, bias.size(0), ends);
  describe_draw(kName, p, x, words, numbers, {layer, purpose, site}, drop, scale);
  Tensor grad_x = at::empty(x.sizes(), x.options());
  const BiasGradient of_bias = place_gradient(p, x);
  if (!p.partials) return {grad_x, of_bias.grad};
  p.x = x.const_data_ptr();
  p.grad = grad.const_data_ptr();
  p.bias = bias.const_data_ptr<float>();
  p.out = grad_x.mutable_data_ptr();
  C10_CUDA_CHECK(swin_moe_bias_gelu_backward(&p, c10::cuda::getCurrentCUDAStream()));
  return {grad_x, of_bias.grad};
}

void add_expert_bias_cuda(Tensor y, const Tensor& bias_, const Tensor& ends) {
  constexpr const char* kName = "add_expert_bias_";
  check_bias(kName, bias_, y);
  TORCH_CHECK_VALUE(y.is_contiguous(), kName, ": rows must be contiguous");
  const c10::cuda::CUDAGuard guard(y.device());
  const Tensor bias = bias_.contiguous();
  BiasGeluLaunch p = describe(kName, y, bias.size(0), ends);
  p.element = int(element_of(kName, y.scalar_type(), 1.0).number);
  if (y.numel() == 0) return;
  p.x = y.const_data_ptr();
  p.bias = bias.const_data_ptr<float>();
  p.out = y.mutable_data_ptr();
  C10_CUDA_CHECK(swin_moe_expert_bias(&p, c10::cuda::getCurrentCUDAStream()));
}

Tensor expert_bias_gradient_cuda(const Tensor& grad_, const Tensor& ends) {
  constexpr const char* kName = "expert_bias_gradient";
  const c10::cuda::CUDAGuard guard(grad_.device());
  const Tensor grad = grad_.contiguous();
  BiasGeluLaunch p = describe(kName, grad, ends.size(0), ends);
  p.element = int(element_of(kName, grad.scalar_type(), 1.0).number);
  const BiasGradient of_bias = place_gradient(p, grad);
  if (!p.partials) return of_bias.grad;
  p.grad = grad.const_data_ptr();
  C10_CUDA_CHECK(swin_moe_expert_bias_gradient(&p, c10::cuda::getCurrentCUDAStream()));
  return of_bias.grad;
}

}  // namespace
}  // namespace swin_moe

TORCH_LIBRARY_FRAGMENT(swin_moe, m) {
  m.def(
      "bias_gelu(Tensor x, Tensor bias, Tensor? ends, Tensor? words, Tensor? rows, int layer, int purpose, int site, "
      "float drop, float scale) -> Tensor");
  m.def(
      "bias_gelu_backward(Tensor grad, Tensor x, Tensor bias, Tensor? ends, Tensor? words, Tensor? rows, int layer, "
      "int purpose, int site, float drop, float scale) -> (Tensor, Tensor)");
  m.def("add_expert_bias_(Tensor(a!) y, Tensor bias, Tensor ends) -> ()");
  m.def("expert_bias_gradient(Tensor grad, Tensor ends) -> Tensor");
}

TORCH_LIBRARY_IMPL(swin_moe, CUDA, m) {
  m.impl("bias_gelu", &swin_moe::bias_gelu_cuda);
  m.impl("bias_gelu_backward", &swin_moe::bias_gelu_backward_cuda);
  m.impl("add_expert_bias_", &swin_moe::add_expert_bias_cuda);
  m.impl("expert_bias_gradient", &swin_moe::expert_bias_gradient_cuda);
}
