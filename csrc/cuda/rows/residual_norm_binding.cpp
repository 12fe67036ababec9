// residual_norm, norm_residual and their backwards on CUDA tensors: schemas and kernels. Compiled only where torch is a
// CUDA build; any other has the Python form of swin_moe/ops/residual_norm.py.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "residual_norm.h"

namespace swin_moe {
namespace {

using at::Tensor;

int element_of(const char* name, at::ScalarType type) {
  switch (type) {
    case at::kFloat: return int(RowElement::kFloat32);
    case at::kBFloat16: return int(RowElement::kBFloat16);
    case at::kHalf: return int(RowElement::kFloat16);
    default: TORCH_CHECK_TYPE(false, name, ": branch must be float32, bfloat16 or float16, got ", type);
  }
}

void check(const char* name, const char* what, const Tensor& x, at::IntArrayRef sizes, const Tensor& like) {
  TORCH_CHECK_VALUE(x.sizes() == sizes && x.device() == like.device(), name, ": ", what, " must be ", sizes, " on ",
                    like.device(), ", got ", x.sizes(), " on ", x.device());
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat, name, ": ", what, " must be float32, got ", x.scalar_type());
}

void check_branch(const char* name, const Tensor& branch, const Tensor& x) {
  TORCH_CHECK_VALUE(branch.sizes() == x.sizes() && branch.device() == x.device(), name, ": branch must be ",
                    x.sizes(), " on ", x.device(), ", got ", branch.sizes(), " on ", branch.device());
}

// The contiguous factors of images; also fills in how rows belong to them.
Tensor describe(const char* name, const Tensor& x, const std::optional<Tensor>& factor, ResidualNormLaunch& p) {
  TORCH_CHECK_VALUE(x.dim() >= 2 && x.size(-1) > 0 && x.size(-1) <= kLargestNormChannels, name,
                    ": x must be (images, ..., channels) with at most ", kLargestNormChannels, " channels, got ",
                    x.sizes());
  p.channels = x.size(-1);
  p.rows = x.numel() / p.channels;
  p.rows_per_image = x.size(0) ? p.rows / x.size(0) : 1;
  if (!factor) return {};
  check(name, "factor", *factor, {x.size(0)}, x);
  return factor->contiguous();
}

// What both forms read and write alike; `launch` points into the tensors, which therefore live beside it.
struct Forward {
  Tensor x, branch, factor, weight, bias;  // contiguous
  Tensor sum, mean, rstd;
  ResidualNormLaunch launch{};
};

Forward prepare(const char* name, const Tensor& x, const Tensor& branch, const std::optional<Tensor>& factor,
                const Tensor& weight, const Tensor& bias, double eps) {
  Forward made;
  ResidualNormLaunch& p = made.launch;
  made.factor = describe(name, x, factor, p);
  check(name, "x", x, x.sizes(), x);
  check(name, "weight", weight, {p.channels}, x);
  check(name, "bias", bias, {p.channels}, x);
  check_branch(name, branch, x);
  p.element = element_of(name, branch.scalar_type());
  made.x = x.contiguous();
  made.branch = branch.contiguous();
  made.weight = weight.contiguous();
  made.bias = bias.contiguous();
  made.sum = at::empty(x.sizes(), x.options());
  made.mean = at::empty({p.rows}, x.options());
  made.rstd = at::empty({p.rows}, x.options());
  p.x = made.x.const_data_ptr<float>();
  p.branch = made.branch.const_data_ptr();
  p.factor = factor ? made.factor.const_data_ptr<float>() : nullptr;
  p.weight = made.weight.const_data_ptr<float>();
  p.bias = made.bias.const_data_ptr<float>();
  p.sum = made.sum.mutable_data_ptr<float>();
  p.mean = made.mean.mutable_data_ptr<float>();
  p.rstd = made.rstd.mutable_data_ptr<float>();
  p.eps = float(eps);
  return made;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_norm_cuda(const Tensor& x, const Tensor& branch,
                                                              const std::optional<Tensor>& factor,
                                                              const Tensor& weight, const Tensor& bias, double eps) {
  const c10::cuda::CUDAGuard guard(x.device());
  Forward made = prepare("residual_norm", x, branch, factor, weight, bias, eps);
  Tensor normed = at::empty(x.sizes(), x.options());
  made.launch.normed = normed.mutable_data_ptr<float>();
  if (made.launch.rows > 0)
    C10_CUDA_CHECK(swin_moe_residual_norm(&made.launch, c10::cuda::getCurrentCUDAStream()));
  return {made.sum, normed, made.mean, made.rstd};
}

// What both backwards read and write alike, of which `like` has the rows.
struct Backward {
  Tensor factor, weight, mean, rstd;  // contiguous
  Tensor grad_branch, grad_weight, partials;
  ResidualNormLaunch launch{};
};

Backward prepare_backward(const char* name, const Tensor& like, const std::optional<Tensor>& factor,
                          const Tensor& weight, const Tensor& mean, const Tensor& rstd, at::ScalarType branch_dtype) {
  Backward made;
  ResidualNormLaunch& p = made.launch;
  made.factor = describe(name, like, factor, p);
  check(name, "weight", weight, {p.channels}, like);
  check(name, "mean", mean, {p.rows}, like);
  check(name, "rstd", rstd, {p.rows}, like);
  p.element = element_of(name, branch_dtype);
  made.weight = weight.contiguous();
  made.mean = mean.contiguous();
  made.rstd = rstd.contiguous();
  made.grad_branch = at::empty(like.sizes(), like.options().dtype(branch_dtype));
  made.grad_weight = p.rows ? at::empty({2, p.channels}, like.options()) : at::zeros({2, p.channels}, like.options());
  made.partials = at::empty({swin_moe_residual_norm_blocks(p.rows), 2, p.channels}, like.options());
  p.factor = factor ? made.factor.const_data_ptr<float>() : nullptr;
  p.weight = made.weight.const_data_ptr<float>();
  // The kernels only read these; the forward's launch writes the same fields.
  p.mean = const_cast<float*>(made.mean.const_data_ptr<float>());
  p.rstd = const_cast<float*>(made.rstd.const_data_ptr<float>());
  p.grad_branch = made.grad_branch.mutable_data_ptr();
  p.grad_weight = made.grad_weight.mutable_data_ptr<float>();
  p.partials = made.partials.mutable_data_ptr<float>();
  return made;
}

std::tuple<Tensor, Tensor, Tensor> residual_norm_backward_cuda(
    const std::optional<Tensor>& grad_sum, const Tensor& grad_normed, const Tensor& sum,
    const std::optional<Tensor>& factor, const Tensor& weight, const Tensor& mean, const Tensor& rstd,
    at::ScalarType branch_dtype) {
  constexpr const char* kName = "residual_norm_backward";
  const c10::cuda::CUDAGuard guard(sum.device());
  Backward made = prepare_backward(kName, sum, factor, weight, mean, rstd, branch_dtype);
  check(kName, "sum", sum, sum.sizes(), sum);
  check(kName, "grad_normed", grad_normed, sum.sizes(), sum);
  if (grad_sum) check(kName, "grad_sum", *grad_sum, sum.sizes(), sum);
  Tensor grad_x = at::empty(sum.sizes(), sum.options());
  const Tensor own = sum.contiguous(), grad = grad_normed.contiguous();
  const Tensor straight = grad_sum ? grad_sum->contiguous() : Tensor();
  auto& p = made.launch;
  p.sum = const_cast<float*>(own.const_data_ptr<float>());  // only read
  p.grad_sum = grad_sum ? straight.const_data_ptr<float>() : nullptr;
  p.grad_normed = grad.const_data_ptr<float>();
  p.grad_x = grad_x.mutable_data_ptr<float>();
  if (p.rows > 0) C10_CUDA_CHECK(swin_moe_residual_norm_backward(&p, c10::cuda::getCurrentCUDAStream()));
  return {grad_x, made.grad_branch, made.grad_weight};
}

std::tuple<Tensor, Tensor, Tensor> norm_residual_cuda(const Tensor& x, const Tensor& branch,
                                                      const std::optional<Tensor>& factor, const Tensor& weight,
                                                      const Tensor& bias, double eps) {
  const c10::cuda::CUDAGuard guard(x.device());
  Forward made = prepare("norm_residual", x, branch, factor, weight, bias, eps);
  if (made.launch.rows > 0)
    C10_CUDA_CHECK(swin_moe_norm_residual(&made.launch, c10::cuda::getCurrentCUDAStream()));
  return {made.sum, made.mean, made.rstd};
}

std::tuple<Tensor, Tensor> norm_residual_backward_cuda(const Tensor& grad_sum, const Tensor& branch,
                                                       const std::optional<Tensor>& factor, const Tensor& weight,
                                                       const Tensor& mean, const Tensor& rstd) {
  constexpr const char* kName = "norm_residual_backward";
  const c10::cuda::CUDAGuard guard(grad_sum.device());
  Backward made = prepare_backward(kName, grad_sum, factor, weight, mean, rstd, branch.scalar_type());
  check(kName, "grad_sum", grad_sum, grad_sum.sizes(), grad_sum);
  check_branch(kName, branch, grad_sum);
  const Tensor given = grad_sum.contiguous(), added = branch.contiguous();
  auto& p = made.launch;
  p.branch = added.const_data_ptr();
  p.grad_sum = given.const_data_ptr<float>();
  if (p.rows > 0) C10_CUDA_CHECK(swin_moe_norm_residual_backward(&p, c10::cuda::getCurrentCUDAStream()));
  return {made.grad_branch, made.grad_weight};
}

}  // namespace
}  // namespace swin_moe

TORCH_LIBRARY_FRAGMENT(swin_moe, m) {
  m.def(
      "residual_norm(Tensor x, Tensor branch, Tensor? factor, Tensor weight, Tensor bias, float eps) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "residual_norm_backward(Tensor? grad_sum, Tensor grad_normed, Tensor sum, Tensor? factor, Tensor weight, "
      "Tensor mean, Tensor rstd, ScalarType branch_dtype) -> (Tensor, Tensor, Tensor)");
  m.def(
      "norm_residual(Tensor x, Tensor branch, Tensor? factor, Tensor weight, Tensor bias, float eps) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "norm_residual_backward(Tensor grad_sum, Tensor branch, Tensor? factor, Tensor weight, Tensor mean, "
      "Tensor rstd) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(swin_moe, CUDA, m) {
  m.impl("residual_norm", &swin_moe::residual_norm_cuda);
  m.impl("residual_norm_backward", &swin_moe::residual_norm_backward_cuda);
  m.impl("norm_residual", &swin_moe::norm_residual_cuda);
  m.impl("norm_residual_backward", &swin_moe::norm_residual_backward_cuda);
}
