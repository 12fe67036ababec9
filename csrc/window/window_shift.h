// What window_partition and window_merge refuse, on every device, and the shapes they make.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "window_geometry.h"

namespace swin_moe {

struct MapWindows {
  int64_t batch, height, width, window_h, window_w, shift_h, shift_w;
};

inline WindowGeometry check_window_shift(const char* name, const MapWindows& a) {
  // A window's tokens are counted in 32 bits.
  TORCH_CHECK_VALUE(0 < a.window_h && 0 < a.window_w && a.window_h <= 1 << 15 && a.window_w <= 1 << 15, name,
                    ": a window must have 1 to 32768 tokens a side, got ", a.window_h, " x ", a.window_w);
  TORCH_CHECK_VALUE(0 <= a.shift_h && a.shift_h < a.window_h && 0 <= a.shift_w && a.shift_w < a.window_w, name,
                    ": shifts must be at least 0 and less than the window of ", a.window_h, " x ", a.window_w, ", got ",
                    a.shift_h, ", ", a.shift_w);
  TORCH_CHECK_VALUE(a.batch >= 0 && a.height > 0 && a.width > 0 && a.height % a.window_h == 0 &&
                        a.width % a.window_w == 0,
                    name, ": height and width must be multiples of the window of ", a.window_h, " x ", a.window_w,
                    ", got ", a.height, " x ", a.width, " tokens in ", a.batch, " images");
  return make_geometry(a.height, a.width, int(a.window_h), int(a.window_w), int(a.shift_h), int(a.shift_w));
}

inline WindowGeometry check_partition(const at::Tensor& x, int64_t window_h, int64_t window_w, int64_t shift_h,
                                      int64_t shift_w) {
  TORCH_CHECK_VALUE(x.dim() == 4, "window_partition: x must be (B, H, W, C), got ", x.sizes());
  return check_window_shift("window_partition",
                            {x.size(0), x.size(1), x.size(2), window_h, window_w, shift_h, shift_w});
}

inline WindowGeometry check_merge(const at::Tensor& windows, const MapWindows& a) {
  const WindowGeometry g = check_window_shift("window_merge", a);
  TORCH_CHECK_VALUE(windows.dim() == 3 && windows.size(0) == a.batch * g.windows() && windows.size(1) == g.tokens(),
                    "window_merge: windows must be (", a.batch * g.windows(), ", ", g.tokens(), ", C), got ",
                    windows.sizes());
  return g;
}

}  // namespace swin_moe
