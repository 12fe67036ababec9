// What the columns of a deformable convolution are made of, refusals and sizes, on every device.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>

#include "deform_geometry.h"

namespace swin_moe {

constexpr int64_t kMostDeform = 32767;  // whose products, as that of both sides of a kernel, are an int

struct DeformNumbers {
  int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
};

inline DeformGeometry check_deform(const char* name, const at::Tensor& x, const at::Tensor& offsets,
                                   const std::optional<at::Tensor>& mask, const DeformNumbers& n) {
  TORCH_CHECK_VALUE(x.dim() == 4 && offsets.dim() == 4, name, ": x and offsets must have four dimensions, got ",
                    x.sizes(), " and ", offsets.sizes());
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble, name,
                    ": x must be float32 or float64, got ", x.scalar_type());
  TORCH_CHECK_VALUE(n.kernel_h > 0 && n.kernel_w > 0 && n.stride_h > 0 && n.stride_w > 0 && n.padding_h >= 0 &&
                        n.padding_w >= 0 && n.dilation_h > 0 && n.dilation_w > 0,
                    name, ": kernel, stride and dilation must be above 0 and the padding at least 0");
  const int64_t most = std::max({n.kernel_h, n.kernel_w, n.stride_h, n.stride_w, n.padding_h, n.padding_w,
                                 n.dilation_h, n.dilation_w});
  TORCH_CHECK_VALUE(most <= kMostDeform, name, ": kernel, stride, padding and dilation must be at most ", kMostDeform,
                    ", got ", most);
  const int64_t taps = n.kernel_h * n.kernel_w;
  const int64_t out_h = (x.size(2) + 2 * n.padding_h - n.dilation_h * (n.kernel_h - 1) - 1) / n.stride_h + 1;
  const int64_t out_w = (x.size(3) + 2 * n.padding_w - n.dilation_w * (n.kernel_w - 1) - 1) / n.stride_w + 1;
  const int64_t groups = offsets.size(1) / (2 * taps);
  TORCH_CHECK_VALUE(x.size(2) > 0 && x.size(3) > 0 && out_h > 0 && out_w > 0, name, ": a map of ", x.size(2), " x ",
                    x.size(3), " is less than the kernel");
  TORCH_CHECK_VALUE(groups > 0 && offsets.size(1) == groups * 2 * taps && x.size(1) % groups == 0 &&
                        offsets.size(0) == x.size(0) && offsets.size(2) == out_h && offsets.size(3) == out_w,
                    name, ": offsets must be (", x.size(0), ", groups x ", 2 * taps, ", ", out_h, ", ", out_w,
                    ") with groups that divide ", x.size(1), " channels, got ", offsets.sizes());
  TORCH_CHECK_VALUE(!mask || (mask->dim() == 4 && mask->size(0) == x.size(0) && mask->size(1) == groups * taps &&
                              mask->size(2) == out_h && mask->size(3) == out_w),
                    name, ": the mask must be (", x.size(0), ", ", groups * taps, ", ", out_h, ", ", out_w, ")");
  for (const at::Tensor& other : {offsets, mask ? *mask : offsets})
    TORCH_CHECK_VALUE(other.scalar_type() == x.scalar_type() && other.device() == x.device(), name,
                      ": offsets and mask must be ", x.scalar_type(), " on ", x.device(), ", got ",
                      other.scalar_type(), " on ", other.device());
  return {x.size(0), x.size(1), x.size(2), x.size(3), out_h, out_w, groups, int(n.kernel_h), int(n.kernel_w),
          int(n.stride_h), int(n.stride_w), int(n.padding_h), int(n.padding_w), int(n.dilation_h), int(n.dilation_w)};
}

inline void check_deform_gradient(const char* name, const at::Tensor& grad, const at::Tensor& x,
                                  const DeformGeometry& g) {
  TORCH_CHECK_VALUE(grad.sizes() == at::IntArrayRef({g.batch, g.channels, g.taps(), g.outputs()}) &&
                        grad.scalar_type() == x.scalar_type() && grad.device() == x.device(),
                    name, ": the gradient must be as the columns, got ", grad.sizes());
}

}  // namespace swin_moe
