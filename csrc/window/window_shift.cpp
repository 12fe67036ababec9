// Roll + partition of a map into windows, and merge + roll back: schemas and the CPU kernels, copies of whole tokens.
#include "window_shift.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstring>

namespace swin_moe {
namespace {

using at::Tensor;

// Copies every token of a map to its place among the windows, or (`merge`) back.
void move_windows(const Tensor& from, Tensor& to, const WindowGeometry& g, int64_t batch, bool merge) {
  if (from.numel() == 0) return;
  const int64_t bytes = from.size(-1) * from.element_size();
  const char* read = static_cast<const char*>(from.const_data_ptr());
  char* write = static_cast<char*>(to.mutable_data_ptr());
  constexpr int64_t kLeastBytes = 64 << 10;  // of a task
  const int64_t grain = std::max<int64_t>(1, kLeastBytes / (bytes * g.tokens()));
  at::parallel_for(0, batch * g.windows(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t window = begin; window < end; ++window) {
      const int64_t image = window / g.windows() * g.height * g.width;
      for (int token = 0; token < g.tokens(); ++token) {
        const int64_t place = image + source_token(g, window % g.windows(), token);
        const int64_t row = window * g.tokens() + token;
        std::memcpy(write + (merge ? place : row) * bytes, read + (merge ? row : place) * bytes, bytes);
      }
    }
  });
}

Tensor window_partition_cpu(const Tensor& x, int64_t window_h, int64_t window_w, int64_t shift_h, int64_t shift_w) {
  const WindowGeometry g = check_partition(x, window_h, window_w, shift_h, shift_w);
  Tensor out = at::empty({x.size(0) * g.windows(), g.tokens(), x.size(3)}, x.options());
  move_windows(x.contiguous(), out, g, x.size(0), false);
  return out;
}

Tensor window_merge_cpu(const Tensor& windows, int64_t batch, int64_t height, int64_t width, int64_t window_h,
                        int64_t window_w, int64_t shift_h, int64_t shift_w) {
  const WindowGeometry g = check_merge(windows, {batch, height, width, window_h, window_w, shift_h, shift_w});
  Tensor out = at::empty({batch, height, width, windows.size(2)}, windows.options());
  move_windows(windows.contiguous(), out, g, batch, true);
  return out;
}

}  // namespace
}  // namespace swin_moe

TORCH_LIBRARY_FRAGMENT(swin_moe, m) {
  m.def("window_partition(Tensor x, int window_h, int window_w, int shift_h, int shift_w) -> Tensor");
  m.def(
      "window_merge(Tensor windows, int batch, int height, int width, int window_h, int window_w, int shift_h, "
      "int shift_w) -> Tensor");
}

TORCH_LIBRARY_IMPL(swin_moe, CPU, m) {
  m.impl("window_partition", &swin_moe::window_partition_cpu);
  m.impl("window_merge", &swin_moe::window_merge_cpu);
}
