// Where the tokens of a window lie: shared by the CPU and the CUDA kernels and tested on the host.
//
// A map of height x width tokens is padded at the bottom and right to a multiple of the window, rolled by minus the
// shift and cut into rows x columns windows. Token t of a window is (t / window_w, t % window_w). Source:
// SwinTransformer/Swin-Transformer, models/swin_transformer.py (window_partition, attn_mask), and
// Swin-Transformer-Object-Detection, swin_transformer.py (padding).
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SWIN_MOE_BOTH __host__ __device__ __forceinline__
#else
#define SWIN_MOE_BOTH inline
#endif

namespace swin_moe {

constexpr int kPadding = -1;         // source_token of a token that is not in the map
constexpr int kMaxWindowTokens = 1024;
constexpr int kMinHeadDim = 8;
constexpr int kMaxHeadDim = 64;

struct WindowGeometry {
  int64_t height, width;             // tokens of the map, before padding
  int64_t rows, columns;             // windows of the padded map
  int window_h, window_w;            // tokens
  int shift_h, shift_w;              // tokens, less than the window

  SWIN_MOE_BOTH int tokens() const { return window_h * window_w; }
  SWIN_MOE_BOTH int64_t windows() const { return rows * columns; }
  SWIN_MOE_BOTH int table_rows() const { return (2 * window_h - 1) * (2 * window_w - 1); }
};

SWIN_MOE_BOTH WindowGeometry make_geometry(int64_t height, int64_t width, int window_h, int window_w, int shift_h,
                                           int shift_w) {
  return {height, width, (height + window_h - 1) / window_h, (width + window_w - 1) / window_w,
          window_h, window_w, shift_h, shift_w};
}

// Where a window lies in its image, in windows. Int: int64_t, or uint32_t on a device, which divides 64 bits by a call:
// for images of fewer than 2 ** 31 tokens.
template <class Int>
struct WindowPlace {
  Int row, column;

  SWIN_MOE_BOTH WindowPlace(const WindowGeometry& g, Int window)
      : row(window / Int(g.columns)), column(window - row * Int(g.columns)) {}
};

// Index y * width + x of a window's token in its image, or kPadding.
template <class Int>
SWIN_MOE_BOTH int64_t source_token(const WindowGeometry& g, const WindowPlace<Int>& at, int token) {
  Int y = at.row * Int(g.window_h) + Int(token / g.window_w + g.shift_h);
  Int x = at.column * Int(g.window_w) + Int(token % g.window_w + g.shift_w);
  const Int height = Int(g.rows) * Int(g.window_h), width = Int(g.columns) * Int(g.window_w);
  if (y >= height) y -= height;
  if (x >= width) x -= width;
  return y < Int(g.height) && x < Int(g.width) ? int64_t(y * Int(g.width) + x) : kPadding;
}
SWIN_MOE_BOTH int64_t source_token(const WindowGeometry& g, int64_t window, int token) {
  return source_token(g, WindowPlace<int64_t>(g, window), token);
}

// Whether tokens of this window come from both sides of the seam of the roll, so that scores are masked.
template <class Int>
SWIN_MOE_BOTH bool crosses_seam(const WindowGeometry& g, const WindowPlace<Int>& at) {
  return (g.shift_h > 0 && at.row == Int(g.rows - 1)) || (g.shift_w > 0 && at.column == Int(g.columns - 1));
}
SWIN_MOE_BOTH bool crosses_seam(const WindowGeometry& g, int64_t window) {
  return crosses_seam(g, WindowPlace<int64_t>(g, window));
}

// Which side of the seams a token came from, 0 to 3. Tokens of one window attend unmasked where it is equal.
template <class Int>
SWIN_MOE_BOTH int seam_side(const WindowGeometry& g, const WindowPlace<Int>& at, int token) {
  bool below = at.row == Int(g.rows - 1) && token / g.window_w >= g.window_h - g.shift_h;
  bool right = at.column == Int(g.columns - 1) && token % g.window_w >= g.window_w - g.shift_w;
  return 2 * below + right;
}
SWIN_MOE_BOTH int seam_side(const WindowGeometry& g, int64_t window, int token) {
  return seam_side(g, WindowPlace<int64_t>(g, window), token);
}

// Row of the bias table for a (query, key) pair of tokens of one window.
SWIN_MOE_BOTH int bias_row(const WindowGeometry& g, int query, int key) {
  int dy = query / g.window_w - key / g.window_w + g.window_h - 1;
  int dx = query % g.window_w - key % g.window_w + g.window_w - 1;
  return dy * (2 * g.window_w - 1) + dx;
}

}  // namespace swin_moe
