// moe_permute, moe_unpermute and moe_gate_gradient on CUDA tensors. Compiled only where torch is a CUDA build.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/ScalarType.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>

#include "cuda/rows/row_launch.h"

namespace swin_moe {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

int element_of(const char* name, at::ScalarType type) {
  switch (type) {
    case at::kDouble: return int(RowElement::kFloat64);
    case at::kFloat: return int(RowElement::kFloat32);
    case at::kBFloat16: return int(RowElement::kBFloat16);
    case at::kHalf: return int(RowElement::kFloat16);
    default: TORCH_CHECK_TYPE(false, name, ": rows must be float64, float32, bfloat16 or float16, got ", type);
  }
}

void check_rows(const char* name, const Tensor& rows, const Tensor& index) {
  TORCH_CHECK_VALUE(rows.dim() == 2, name, ": rows must be (rows, channels), got ", rows.sizes());
  TORCH_CHECK_VALUE(index.scalar_type() == at::kLong && index.device() == rows.device(), name,
                    ": indices of rows must be int64 on the device of the rows, ", rows.device(), ", got ",
                    index.scalar_type(), " on ", index.device());
}

void check_flags(const char* name, const OptionalTensor& flags, const Tensor& index) {
  if (flags)
    TORCH_CHECK_VALUE(flags->scalar_type() == at::kBool && flags->sizes() == index.sizes() &&
                          flags->device() == index.device(),
                      name, ": a mask must be bool of shape ", index.sizes(), " on ", index.device(), ", got ",
                      flags->scalar_type(), " ", flags->sizes());
}

at::ScalarType sum_of(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

// The tensors of a call, alive until it is launched.
struct Rows {
  Tensor rows, grad_out, index, flags, gate;
  MoeLaunch p{};

  Rows(const Tensor& rows_, const Tensor& index_, const OptionalTensor& flags_, const OptionalTensor& gate_,
       at::ScalarType sum)
      : rows(rows_.contiguous()), index(index_.contiguous()) {
    if (flags_) flags = flags_->contiguous();
    if (gate_) gate = gate_->to(sum).contiguous();
    p.rows = rows.const_data_ptr();
    p.index = index.const_data_ptr<int64_t>();
    p.flags = flags_ ? flags.const_data_ptr<bool>() : nullptr;
    p.gate = gate_ ? gate.const_data_ptr() : nullptr;
    p.channels = rows.size(1);
  }
};

Tensor moe_permute_cuda(const Tensor& x, const Tensor& pair, int64_t top_k, const OptionalTensor& gate,
                        const OptionalTensor& vacant, std::optional<at::ScalarType> dtype) {
  constexpr const char* kName = "moe_permute";
  check_rows(kName, x, pair);
  check_flags(kName, vacant, pair);
  TORCH_CHECK_VALUE(pair.dim() == 1 && top_k > 0, kName, ": pair must be (rows,) and top_k > 0, got ", pair.sizes(),
                    " and ", top_k);
  TORCH_CHECK_VALUE(!gate || (gate->numel() == x.size(0) * top_k && gate->device() == x.device()), kName,
                    ": gate must have a number for each of ", top_k, " choices of ", x.size(0), " tokens on ",
                    x.device());
  const c10::cuda::CUDAGuard guard(x.device());
  const auto type = dtype.value_or(x.scalar_type());
  if (x.size(0) == 0) return at::zeros({pair.size(0), x.size(1)}, x.options().dtype(type));  // rows are vacant then
  const bool wide = x.scalar_type() == at::kDouble || type == at::kDouble;
  Tensor out = at::empty({pair.size(0), x.size(1)}, x.options().dtype(wide ? at::kDouble : type));
  if (out.numel() == 0) return out.to(type);
  Rows in(wide ? x.to(at::kDouble) : x, pair, vacant, gate, sum_of(out.scalar_type()));
  in.p.element = element_of(kName, in.rows.scalar_type());
  in.p.other_element = element_of(kName, out.scalar_type());
  in.p.outputs = pair.size(0);
  in.p.top_k = int(top_k);
  in.p.out = out.mutable_data_ptr();
  C10_CUDA_CHECK(swin_moe_permute(&in.p, c10::cuda::getCurrentCUDAStream()));
  return out.to(type);
}

void check_position(const char* name, const Tensor& position) {
  TORCH_CHECK_VALUE(position.dim() == 2 && position.size(1) > 0, name,
                    ": position must be (tokens, choices) with a choice, got ", position.sizes());
}

Tensor moe_unpermute_cuda(const Tensor& rows, const Tensor& position, const OptionalTensor& keep,
                          const OptionalTensor& gate) {
  constexpr const char* kName = "moe_unpermute";
  check_rows(kName, rows, position);
  check_position(kName, position);
  check_flags(kName, keep, position);
  TORCH_CHECK_VALUE(!gate || (gate->sizes() == position.sizes() && gate->device() == rows.device()), kName,
                    ": gate must be ", position.sizes(), " on ", rows.device());
  const c10::cuda::CUDAGuard guard(rows.device());
  const auto type = gate ? c10::promoteTypes(rows.scalar_type(), gate->scalar_type()) : rows.scalar_type();
  const auto options = rows.options().dtype(type);
  if (rows.size(0) == 0) return at::zeros({position.size(0), rows.size(1)}, options);  // nothing was kept
  Tensor out = at::empty({position.size(0), rows.size(1)}, options);
  if (out.numel() == 0) return out;
  const bool wide = type == at::kDouble;
  Rows in(wide ? rows.to(type) : rows, position, keep, gate, sum_of(type));
  in.p.element = element_of(kName, in.rows.scalar_type());
  in.p.other_element = element_of(kName, type);
  in.p.outputs = position.size(0);
  in.p.top_k = int(position.size(1));
  in.p.out = out.mutable_data_ptr();
  C10_CUDA_CHECK(swin_moe_unpermute(&in.p, c10::cuda::getCurrentCUDAStream()));
  return out;
}

Tensor moe_gate_gradient_cuda(const Tensor& rows, const Tensor& grad_out, const Tensor& position,
                              const OptionalTensor& keep) {
  constexpr const char* kName = "moe_gate_gradient";
  check_rows(kName, rows, position);
  check_position(kName, position);
  check_flags(kName, keep, position);
  TORCH_CHECK_VALUE(grad_out.dim() == 2 && grad_out.size(0) == position.size(0) && grad_out.size(1) == rows.size(1) &&
                        grad_out.device() == rows.device(),
                    kName, ": grad_out must be (", position.size(0), ", ", rows.size(1), ") on ", rows.device(),
                    ", got ", grad_out.sizes());
  const c10::cuda::CUDAGuard guard(rows.device());
  const auto type = c10::promoteTypes(rows.scalar_type(), grad_out.scalar_type());
  if (rows.size(0) == 0) return at::zeros(position.sizes(), rows.options().dtype(type));
  const bool wide = type == at::kDouble;
  Rows in(wide ? rows.to(type) : rows, position, keep, std::nullopt, sum_of(type));
  in.grad_out = (wide ? grad_out.to(type) : grad_out).contiguous();
  Tensor out = at::empty(position.sizes(), rows.options().dtype(sum_of(type)));
  in.p.element = element_of(kName, in.rows.scalar_type());
  in.p.other_element = element_of(kName, in.grad_out.scalar_type());
  in.p.grad_out = in.grad_out.const_data_ptr();
  in.p.outputs = position.numel();
  in.p.top_k = int(position.size(1));
  in.p.out = out.mutable_data_ptr();
  C10_CUDA_CHECK(swin_moe_gate_gradient(&in.p, c10::cuda::getCurrentCUDAStream()));
  return out.to(type);
}

}  // namespace
}  // namespace swin_moe

TORCH_LIBRARY_IMPL(swin_moe, CUDA, m) {
  m.impl("moe_permute", &swin_moe::moe_permute_cuda);
  m.impl("moe_unpermute", &swin_moe::moe_unpermute_cuda);
  m.impl("moe_gate_gradient", &swin_moe::moe_gate_gradient_cuda);
}
