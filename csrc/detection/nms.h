// What nms and soft_nms refuse, on every device.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace swin_moe {

inline void check_boxes(const char* name, const at::Tensor& boxes, const at::Tensor& scores,
                        const std::optional<at::Tensor>& groups) {
  const auto type = boxes.scalar_type();
  TORCH_CHECK_VALUE(boxes.dim() == 2 && boxes.size(1) == 4 && (type == at::kFloat || type == at::kDouble), name,
                    ": boxes must be (N, 4) of float32 or float64, got ", boxes.sizes(), " of ", type);
  TORCH_CHECK_VALUE(scores.dim() == 1 && scores.size(0) == boxes.size(0) && scores.scalar_type() == type &&
                        scores.device() == boxes.device(),
                    name, ": scores must be (", boxes.size(0), ",) of ", type, " on ", boxes.device(), ", got ",
                    scores.sizes(), " of ", scores.scalar_type(), " on ", scores.device());
  TORCH_CHECK_VALUE(!groups || (groups->dim() == 1 && groups->size(0) == boxes.size(0) &&
                                groups->scalar_type() == at::kLong && groups->device() == boxes.device()),
                    name, ": groups must be (", boxes.size(0), ",) of int64 on ", boxes.device());
  TORCH_CHECK_VALUE(boxes.size(0) < INT32_MAX, name, ": there are too many boxes, ", boxes.size(0));
}

inline void check_soft(const char* name, double sigma, bool gaussian) {
  TORCH_CHECK_VALUE(!gaussian || sigma > 0, name, ": sigma must be above 0, got ", sigma);
}

}  // namespace swin_moe
