// Which kernel serves which window and head dimension: the first row of an element's table that fits.
#pragma once

#include "window_workspace.h"

namespace swin_moe {

struct ForwardVariant {
  int head_dim, window;         // the largest head dimension; the side of a square window, 0 = any
  cudaError_t (*run)(const WindowLaunch&, cudaStream_t);
};

struct BackwardVariant {
  int head_dim, window, tokens;  // tokens: the most of a window
  BackwardPlan (*plan)(const WindowLaunch&);
  cudaError_t (*run)(const WindowLaunch&, cudaStream_t);
  // Of a kernel that reads what the forward left and needs more shared memory than every device has; null otherwise.
  size_t (*shared_bytes)(const WindowLaunch&);
};

// Kernels with the window as a constant are for head dimension 32 exactly, which is that of all published models.
inline bool fits(const WindowLaunch& p, int head_dim, int window) {
  const WindowGeometry& g = p.geometry;
  return window ? p.head_dim == head_dim && g.window_h == window && g.window_w == window : p.head_dim <= head_dim;
}

// Kernels count windows in 32 bits.
inline bool countable(const WindowLaunch& p) { return p.windows() <= 0x7fffffff; }

// The tables of the elements, one per source file.
const ForwardVariant* find_forward_fp32(const WindowLaunch& p);
const ForwardVariant* find_forward_bf16(const WindowLaunch& p);
const ForwardVariant* find_forward_fp16(const WindowLaunch& p);
const BackwardVariant* find_backward_fp32(const WindowLaunch& p);
const BackwardVariant* find_backward_bf16(const WindowLaunch& p);
const BackwardVariant* find_backward_fp16(const WindowLaunch& p);

}  // namespace swin_moe
