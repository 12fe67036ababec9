// What a block of threads keeps of its windows in shared memory: the shape it is compiled for, the tokens, the position
// bias.
#pragma once

#include "cuda/fragments.cuh"
#include "window_launch.h"

namespace swin_moe {

constexpr int kNoToken = -2;                       // beyond the tokens of the window; kPadding is one of them

// What a kernel is compiled for. Window: its side in tokens, 0 = read at run time, any rectangle. Each of the Warps
// owns 16 rows; Others: rows of the other side of the scores that are in shared memory at a time.
template <class Element, int HeadDim, int Window, int Warps, int Others>
struct Shape {
  using T = Element;
  static constexpr int kHeadDim = HeadDim, kWindow = Window, kWarps = Warps, kOthers = Others;
  static constexpr int kThreads = Warps * 32, kRows = Warps * kTile;
  static constexpr int kSlices = HeadDim / kTile;    // tiles of a row
  static constexpr int kTiles = Others / kTile;      // tiles of scores of a warp at a time
  static constexpr int kPitch = HeadDim + 16 / int(sizeof(T));  // elements; rows then start in different banks
  static constexpr int kStage = Others * kPitch;     // elements of a block of rows of the other side
  static_assert(HeadDim % kTile == 0 && Others % kTile == 0, "whole tiles");
};

// The geometry with what is known at compile time put in as constants.
template <class S>
__device__ __forceinline__ WindowGeometry known_geometry(WindowGeometry g) {
  if (S::kWindow > 0) g.window_h = g.window_w = S::kWindow;
  return g;
}

SWIN_MOE_BOTH int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }
SWIN_MOE_BOTH int blocks_of(int n, int size) { return (n + size - 1) / size; }

// Tokens rounded up so that every block of rows is whole.
template <class S>
SWIN_MOE_BOTH int padded_tokens(int tokens) {
  const int rows = round_up(tokens, S::kRows), others = round_up(tokens, S::kOthers);
  return rows > others ? rows : others;
}

// Hands out the dynamic shared memory piece by piece; with a null base it only counts.
struct SharedPieces {
  unsigned char* base;
  size_t used = 0;

  template <class T>
  SWIN_MOE_BOTH T* take(int count) {
    T* piece = reinterpret_cast<T*>(base + used);
    used += (size_t(count) * sizeof(T) + 15) / 16 * 16;
    return piece;
  }
};

// Tokens of one window and the bias of one head.
struct TokenTable {
  float* bias;        // (table_rows), in score units
  int* source;        // (padded tokens): index in the image, kPadding or kNoToken
  int* offset;        // (padded tokens): bias row of a pair is offset[query] - offset[key] + centre
  int* side;          // (padded tokens): seam_side
  int centre;

  SWIN_MOE_BOTH void place(SharedPieces& pieces, const WindowGeometry& g, int padded) {
    bias = pieces.take<float>(g.table_rows());
    source = pieces.take<int>(padded);
    offset = pieces.take<int>(padded);
    side = pieces.take<int>(padded);
    centre = bias_row(g, 0, 0);
  }

  // Once per block; the caller synchronizes.
  __device__ __forceinline__ void fill_head(const WindowLaunch& p, const WindowGeometry& g, int head, int padded,
                                            float unit) {
    for (int r = threadIdx.x; r < g.table_rows(); r += blockDim.x)
      bias[r] = p.bias_table[r * p.num_heads + head] * unit;
    for (int t = threadIdx.x; t < padded; t += blockDim.x) offset[t] = t < g.tokens() ? bias_row(g, t, 0) - centre : 0;
  }

  // Once per window; the caller synchronizes.
  __device__ __forceinline__ void fill_window(const WindowGeometry& g, const WindowPlace<uint32_t>& at, int padded) {
    for (int t = threadIdx.x; t < padded; t += blockDim.x) {
      const bool inside = t < g.tokens();
      source[t] = inside ? int(source_token(g, at, t)) : kNoToken;
      side[t] = inside ? seam_side(g, at, t) : 0;
    }
  }
};

}  // namespace swin_moe
