// nms and soft_nms on CUDA tensors. Compiled only where torch is a CUDA build.
#include <ATen/ops/arange.h>
#include <ATen/ops/argsort.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "detection/nms.h"
#include "detection_launch.h"

namespace swin_moe {
namespace {

using at::Tensor;

Tensor nms_cuda(const Tensor& boxes_, const Tensor& scores, const std::optional<Tensor>& groups, double threshold) {
  check_boxes("nms", boxes_, scores, groups);
  const c10::cuda::CUDAGuard guard(boxes_.device());
  const Tensor boxes = boxes_.contiguous();
  const Tensor by_score = at::argsort(scores, /*stable=*/true, /*dim=*/0, /*descending=*/true);
  Tensor order = by_score, group;
  if (groups) {
    const Tensor of_sorted = groups->index_select(0, by_score);
    const Tensor by_group = at::argsort(of_sorted, /*stable=*/true, /*dim=*/0, /*descending=*/false);
    order = by_score.index_select(0, by_group);
    group = of_sorted.index_select(0, by_group);
  }
  Tensor gone = at::zeros({boxes.size(0)}, boxes.options().dtype(at::kBool));
  NmsLaunch p{};
  p.boxes = boxes.const_data_ptr();
  p.order = order.const_data_ptr<int64_t>();
  p.group = groups ? group.const_data_ptr<int64_t>() : nullptr;
  p.gone = gone.mutable_data_ptr<bool>();
  p.count = boxes.size(0);
  p.threshold = threshold;
  p.is_double = boxes.scalar_type() == at::kDouble;
  C10_CUDA_CHECK(swin_moe_nms(&p, c10::cuda::getCurrentCUDAStream()));
  return by_score.masked_select(gone.index_select(0, by_score).logical_not());
}

Tensor soft_nms_cuda(const Tensor& boxes_, const Tensor& scores, const std::optional<Tensor>& groups, double threshold,
                     double sigma, bool gaussian, double min_score) {
  check_boxes("soft_nms", boxes_, scores, groups);
  check_soft("soft_nms", sigma, gaussian);
  const c10::cuda::CUDAGuard guard(boxes_.device());
  const Tensor boxes = boxes_.contiguous();
  const int64_t count = boxes.size(0);
  Tensor order, group;
  if (groups) {
    order = at::argsort(*groups, /*stable=*/true, /*dim=*/0, /*descending=*/false);
    group = groups->index_select(0, order);
  } else {
    order = at::arange(count, boxes.options().dtype(at::kLong));
  }
  Tensor out = scores.clone(at::MemoryFormat::Contiguous);
  Tensor left = at::empty({count}, boxes.options().dtype(at::kBool));
  SoftLaunch p{};
  p.boxes = boxes.const_data_ptr();
  p.order = order.const_data_ptr<int64_t>();
  p.group = groups ? group.const_data_ptr<int64_t>() : nullptr;
  p.scores = out.mutable_data_ptr();
  p.left = left.mutable_data_ptr<bool>();
  p.count = count;
  p.threshold = threshold;
  p.sigma = sigma;
  p.min_score = min_score;
  p.gaussian = gaussian;
  p.is_double = boxes.scalar_type() == at::kDouble;
  C10_CUDA_CHECK(swin_moe_soft_nms(&p, c10::cuda::getCurrentCUDAStream()));
  return out;
}

}  // namespace
}  // namespace swin_moe

TORCH_LIBRARY_IMPL(swin_moe, CUDA, m) {
  m.impl("nms", &swin_moe::nms_cuda);
  m.impl("soft_nms", &swin_moe::soft_nms_cuda);
}
