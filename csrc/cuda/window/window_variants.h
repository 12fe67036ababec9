// Which kernel serves which window and head dimension: the first row of an element's table that fits.
#pragma once

#include "window_workspace.h"

namespace swin_moe {

struct ForwardVariant {
  int head_dim, window;         // the largest head dimension; the side of a square window, 0 = any
  cudaError_t (*run)(const WindowLaunch&, cudaStream_t);
  size_t (*shared_bytes)(const WindowLaunch&);
};

struct BackwardVariant {
  int head_dim, window, tokens;  // tokens: the most of a window
  BackwardPlan (*plan)(const WindowLaunch&);
  cudaError_t (*run)(const WindowLaunch&, cudaStream_t);
  size_t (*shared_bytes)(const WindowLaunch&);  // the most of its launches
  bool reads_sums;                              // what the forward left
};

// Kernels with the window as a constant are for head dimension 32 exactly, which is that of all published models.
inline bool fits(const WindowLaunch& p, int head_dim, int window) {
  const WindowGeometry& g = p.geometry;
  return window ? p.head_dim == head_dim && g.window_h == window && g.window_w == window : p.head_dim <= head_dim;
}

inline bool fits(const WindowLaunch& p, const ForwardVariant& v) { return fits(p, v.head_dim, v.window); }
inline bool fits(const WindowLaunch& p, const BackwardVariant& v) {
  return p.geometry.tokens() <= v.tokens && fits(p, v.head_dim, v.window);
}

// Kernels count windows in 32 bits.
inline bool countable(const WindowLaunch& p) { return p.windows() <= 0x7fffffff; }

// Returns the first row of a table that serves the launch where a block can have `most` bytes of shared memory, or null.
template <class Variant, size_t kRows>
const Variant* first_fit(const Variant (&table)[kRows], const WindowLaunch& p, size_t most) {
  for (const Variant& v : table)
    if (fits(p, v) && v.shared_bytes(p) <= most) return &v;
  return nullptr;
}

// The tables of the elements, one per source file; `most` as of first_fit.
const ForwardVariant* find_forward_fp32(const WindowLaunch& p, size_t most);
const ForwardVariant* find_forward_bf16(const WindowLaunch& p, size_t most);
const ForwardVariant* find_forward_fp16(const WindowLaunch& p, size_t most);
const BackwardVariant* find_backward_fp32(const WindowLaunch& p, size_t most);
const BackwardVariant* find_backward_bf16(const WindowLaunch& p, size_t most);
const BackwardVariant* find_backward_fp16(const WindowLaunch& p, size_t most);

}  // namespace swin_moe
