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

// Index y * width + x of a window's token in its image, or kPadding.
SWIN_MOE_BOTH int64_t source_token(const WindowGeometry& g, int64_t window, int token) {
  int64_t y = window / g.columns * g.window_h + token / g.window_w + g.shift_h;
  int64_t x = window % g.columns * g.window_w + token % g.window_w + g.shift_w;
  if (y >= g.rows * g.window_h) y -= g.rows * g.window_h;
  if (x >= g.columns * g.window_w) x -= g.columns * g.window_w;
  return y < g.height && x < g.width ? y * g.width + x : kPadding;
}

// Whether tokens of this window come from both sides of the seam of the roll, so that scores are masked.
SWIN_MOE_BOTH bool crosses_seam(const WindowGeometry& g, int64_t window) {
  return (g.shift_h > 0 && window / g.columns == g.rows - 1) || (g.shift_w > 0 && window % g.columns == g.columns - 1);
}

// Which side of the seams a token came from, 0 to 3. Tokens of one window attend unmasked where it is equal.
SWIN_MOE_BOTH int seam_side(const WindowGeometry& g, int64_t window, int token) {
  bool below = window / g.columns == g.rows - 1 && token / g.window_w >= g.window_h - g.shift_h;
  bool right = window % g.columns == g.columns - 1 && token % g.window_w >= g.window_w - g.shift_w;
  return 2 * below + right;
}

// Row of the bias table for a (query, key) pair of tokens of one window.
SWIN_MOE_BOTH int bias_row(const WindowGeometry& g, int query, int key) {
  int dy = query / g.window_w - key / g.window_w + g.window_h - 1;
  int dx = query % g.window_w - key % g.window_w + g.window_w - 1;
  return dy * (2 * g.window_w - 1) + dx;
}

}  // namespace swin_moe
