// Columns of a deformable convolution, and their gradients, on CUDA tensors. Compiled only where torch is a CUDA build.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

#include "detection/deform_conv.h"
#include "detection_launch.h"

namespace swin_moe {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The tensors of a call in row order, and a launch that reads them.
struct DeformCall {
  Tensor x, offsets, mask;
  DeformLaunch launch{};

  DeformCall(const DeformGeometry& geometry, const Tensor& x_, const Tensor& offsets_, const OptionalTensor& mask_)
      : x(x_.contiguous()), offsets(offsets_.contiguous()), mask(mask_ ? mask_->contiguous() : Tensor()) {
    launch.geometry = geometry;
    launch.x = x.const_data_ptr();
    launch.offsets = offsets.const_data_ptr();
    launch.mask = mask_ ? mask.const_data_ptr() : nullptr;
    launch.is_double = x.scalar_type() == at::kDouble;
  }
};

Tensor deform_columns_cuda(const Tensor& x, const Tensor& offsets, const OptionalTensor& mask, int64_t kernel_h,
                           int64_t kernel_w, int64_t stride_h, int64_t stride_w, int64_t padding_h, int64_t padding_w,
                           int64_t dilation_h, int64_t dilation_w) {
  const DeformGeometry g =
      check_deform("deform_columns", x, offsets, mask,
                   {kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w});
  const c10::cuda::CUDAGuard guard(x.device());
  DeformCall call(g, x, offsets, mask);
  Tensor out = at::empty({g.batch, g.channels, g.taps(), g.outputs()}, x.options());
  call.launch.out = out.mutable_data_ptr();
  C10_CUDA_CHECK(swin_moe_deform_columns(&call.launch, c10::cuda::getCurrentCUDAStream()));
  return out;
}

std::tuple<Tensor, Tensor, Tensor> deform_columns_backward_cuda(
    const Tensor& grad_, const Tensor& x, const Tensor& offsets, const OptionalTensor& mask, int64_t kernel_h,
    int64_t kernel_w, int64_t stride_h, int64_t stride_w, int64_t padding_h, int64_t padding_w, int64_t dilation_h,
    int64_t dilation_w) {
  constexpr const char* kName = "deform_columns_backward";
  const DeformGeometry g =
      check_deform(kName, x, offsets, mask,
                   {kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w});
  check_deform_gradient(kName, grad_, x, g);
  const c10::cuda::CUDAGuard guard(x.device());
  DeformCall call(g, x, offsets, mask);
  const Tensor grad = grad_.contiguous();
  Tensor grad_x = at::empty_like(call.x), grad_offsets = at::empty_like(call.offsets);
  Tensor grad_mask = mask ? at::empty_like(call.mask) : at::empty({0}, x.options());
  Tensor taken = at::empty({g.takes()}, x.options().dtype(at::kLong)), shares = at::empty({g.takes()}, x.options());
  Tensor spans = at::zeros({g.batch * g.groups * (g.area() + 1), 2}, taken.options());
  DeformLaunch& p = call.launch;
  p.grad = grad.const_data_ptr();
  p.grad_offsets = grad_offsets.mutable_data_ptr();
  p.grad_mask = grad_mask.mutable_data_ptr();
  p.taken = taken.mutable_data_ptr<int64_t>();
  p.shares = shares.mutable_data_ptr();
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  C10_CUDA_CHECK(swin_moe_deform_slopes(&p, stream));
  const auto [sorted, order] = at::sort(taken, /*stable=*/true, /*dim=*/0, /*descending=*/false);
  p.sorted = sorted.const_data_ptr<int64_t>();
  p.order = order.const_data_ptr<int64_t>();
  p.spans = spans.mutable_data_ptr<int64_t>();
  p.out = grad_x.mutable_data_ptr();
  C10_CUDA_CHECK(swin_moe_deform_spread(&p, stream));
  return {grad_x, grad_offsets, grad_mask};
}

}  // namespace
}  // namespace swin_moe

TORCH_LIBRARY_IMPL(swin_moe, CUDA, m) {
  m.impl("deform_columns", &swin_moe::deform_columns_cuda);
  m.impl("deform_columns_backward", &swin_moe::deform_columns_backward_cuda);
}
