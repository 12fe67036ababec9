// What roi_align and roi_align_backward refuse, on every device.
#pragma once

#include <ATen/core/Tensor.h>

namespace swin_moe {

// features: Or the gradient, whose dtype decides the boxes': float64 for float64, else float32.
inline void check_rois(const char* name, const at::Tensor& features, const at::Tensor& rois, int64_t size,
                       double scale, int64_t sampling) {
  const auto type = features.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK_VALUE(at::isFloatingType(features.scalar_type()), name, ": features must be floating, got ",
                    features.scalar_type());
  TORCH_CHECK_VALUE(rois.dim() == 2 && rois.size(1) == 5 && rois.scalar_type() == type, name,
                    ": boxes must be (R, 5) of ", type, ", got ", rois.sizes(), " of ", rois.scalar_type());
  TORCH_CHECK_VALUE(rois.device() == features.device(), name, ": boxes must be on ", features.device(), ", got ",
                    rois.device());
  TORCH_CHECK_VALUE(size > 0 && size <= 1 << 12 && sampling >= 0 && sampling <= 1 << 12 && scale > 0, name,
                    ": bins must be 1 to 4096 a side, samples 0 to 4096 and the scale above 0, got ", size, ", ",
                    sampling, " and ", scale);
}

inline void check_roi_map(const char* name, int64_t batch, int64_t channels, int64_t height, int64_t width) {
  TORCH_CHECK_VALUE(batch >= 0 && channels >= 0 && height > 0 && width > 0 && height < 1 << 24 && width < 1 << 24, name,
                    ": a map must have 1 to 16777215 cells a side, got ", height, " x ", width, " in ", batch,
                    " images");
}

inline void check_roi_features(const char* name, const at::Tensor& features) {
  TORCH_CHECK_VALUE(features.dim() == 4, name, ": features must be (B, C, H, W), got ", features.sizes());
  check_roi_map(name, features.size(0), features.size(1), features.size(2), features.size(3));
}

inline void check_roi_gradient(const char* name, const at::Tensor& grad, const at::Tensor& rois) {
  TORCH_CHECK_VALUE(grad.dim() == 4 && grad.size(0) == rois.size(0) && grad.size(2) == grad.size(3), name,
                    ": the gradient must be (", rois.size(0), ", C, S, S), got ", grad.sizes());
}

}  // namespace swin_moe
