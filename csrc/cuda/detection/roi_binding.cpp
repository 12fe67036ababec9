// roi_align and its gradient on CUDA tensors. Compiled only where torch is a CUDA build.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "detection/roi_align.h"
#include "detection_launch.h"

namespace swin_moe {
namespace {

using at::Tensor;

struct RoiNumbers {
  int64_t batch, height, width, size;
  double scale;
  int64_t sampling;
  bool aligned;
};

int roi_element(const char* name, at::ScalarType type) {
  switch (type) {
    case at::kDouble: return int(RowElement::kFloat64);
    case at::kFloat: return int(RowElement::kFloat32);
    case at::kBFloat16: return int(RowElement::kBFloat16);
    case at::kHalf: return int(RowElement::kFloat16);
    default:
      TORCH_CHECK_TYPE(false, name, ": features must be float64, float32, bfloat16 or float16, got ", type);
  }
}

// Weights of the bins, then `kernel`, from `from` to `out`.
void run_roi(const char* name, const Tensor& from_, const Tensor& rois_, Tensor& out, const RoiNumbers& n,
             cudaError_t (*kernel)(const RoiLaunch*, cudaStream_t)) {
  const Tensor from = from_.contiguous(), rois = rois_.contiguous();
  const int64_t boxes = rois.size(0);
  Tensor rows = at::zeros({boxes, n.size, n.height}, rois.options());
  Tensor columns = at::zeros({boxes, n.size, n.width}, rois.options());
  Tensor spans = at::empty({2, boxes, n.size, 2}, rois.options().dtype(at::kInt));
  Tensor image = at::empty({boxes}, spans.options());
  RoiLaunch p{};
  p.from = from.const_data_ptr();
  p.rois = rois.const_data_ptr();
  p.rows = rows.mutable_data_ptr();
  p.columns = columns.mutable_data_ptr();
  p.row_spans = spans.mutable_data_ptr<int>();
  p.column_spans = p.row_spans + boxes * n.size * 2;
  p.image = image.mutable_data_ptr<int>();
  p.out = out.mutable_data_ptr();
  p.boxes = boxes;
  p.batch = n.batch;
  p.channels = out.size(1);
  p.height = n.height;
  p.width = n.width;
  p.size = int(n.size);
  p.sampling = int(n.sampling);
  p.aligned = n.aligned;
  p.scale = n.scale;
  p.element = roi_element(name, from.scalar_type());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  C10_CUDA_CHECK(swin_moe_roi_bins(&p, stream));
  C10_CUDA_CHECK(kernel(&p, stream));
}

Tensor roi_align_cuda(const Tensor& features, const Tensor& rois, int64_t size, double scale, int64_t sampling,
                      bool aligned) {
  constexpr const char* kName = "roi_align";
  check_roi_features(kName, features);
  check_rois(kName, features, rois, size, scale, sampling);
  const c10::cuda::CUDAGuard guard(features.device());
  Tensor out = at::empty({rois.size(0), features.size(1), size, size}, features.options());
  run_roi(kName, features, rois, out,
          {features.size(0), features.size(2), features.size(3), size, scale, sampling, aligned}, &swin_moe_roi_align);
  return out;
}

Tensor roi_align_backward_cuda(const Tensor& grad, const Tensor& rois, int64_t batch, int64_t height, int64_t width,
                               double scale, int64_t sampling, bool aligned) {
  constexpr const char* kName = "roi_align_backward";
  check_roi_gradient(kName, grad, rois);
  check_roi_map(kName, batch, grad.size(1), height, width);
  check_rois(kName, grad, rois, grad.size(2), scale, sampling);
  const c10::cuda::CUDAGuard guard(grad.device());
  Tensor out = at::empty({batch, grad.size(1), height, width}, grad.options());
  run_roi(kName, grad, rois, out, {batch, height, width, grad.size(2), scale, sampling, aligned},
          &swin_moe_roi_align_backward);
  return out;
}

}  // namespace
}  // namespace swin_moe

TORCH_LIBRARY_IMPL(swin_moe, CUDA, m) {
  m.impl("roi_align", &swin_moe::roi_align_cuda);
  m.impl("roi_align_backward", &swin_moe::roi_align_backward_cuda);
}
