// What a block of threads keeps of its windows in shared memory: the tokens, the position bias, rows of q, k, v.
#pragma once

#include "fragments.cuh"
#include "window_launch.h"

namespace swin_moe {

constexpr int kNoToken = -2;                       // beyond the tokens of the window; kPadding is one of them
constexpr float kShortest = 1e-12f;                // least length a query or key is divided by, as F.normalize
constexpr float kLargestInverse = 1.f / kShortest;

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

// Rows of one head in a (tokens, stride) matrix of an image.
template <class T>
struct HeadRows {
  T* image;           // element 0 of the head in token 0
  int64_t stride;     // elements between tokens
  const T* pad;       // the head of a padding token; null = zeros
  int head_dim;
  bool vectors;       // every row is a multiple of 16 aligned bytes
};

template <class T>
SWIN_MOE_BOTH bool whole_vectors(const void* matrix, int head_dim) {
  return reinterpret_cast<uintptr_t>(matrix) % 16 == 0 && head_dim * int(sizeof(T)) % 16 == 0;
}

// Part 0, 1, 2 (queries, keys, values) of a head of an image in a (B, H, W, 3C) matrix.
template <class T, class U>
__device__ __forceinline__ HeadRows<T> qkv_rows(const WindowLaunch& p, U* matrix, int64_t image, int head, int part) {
  const int64_t c = p.channels(), first = int64_t(part) * c + head * p.head_dim;
  const T* pad = static_cast<const T*>(p.pad_qkv);
  return {static_cast<T*>(const_cast<void*>(static_cast<const void*>(matrix))) +
              image * p.geometry.height * p.geometry.width * 3 * c + first,
          3 * c, pad ? pad + first : nullptr, p.head_dim,
          whole_vectors<T>(matrix, p.head_dim) && whole_vectors<T>(pad, p.head_dim)};
}

// A head of an image in a (B, H, W, C) matrix; padding holds zeros.
template <class T, class U>
__device__ __forceinline__ HeadRows<T> out_rows(const WindowLaunch& p, U* matrix, int64_t image, int head) {
  const int64_t c = p.channels();
  return {static_cast<T*>(const_cast<void*>(static_cast<const void*>(matrix))) +
              image * p.geometry.height * p.geometry.width * c + head * p.head_dim,
          c, nullptr, p.head_dim, whole_vectors<T>(matrix, p.head_dim)};
}

struct alignas(16) Vector {
  uint32_t words[4];
};

// Starts to bring `rows` tokens into shared memory, zeros beyond the head dimension and where there is no token.
// Complete after wait_for_copies and a barrier.
template <class S>
__device__ __forceinline__ void load_rows(typename S::T* tile, const HeadRows<const typename S::T>& from,
                                          const int* source, int rows) {
  using T = typename S::T;
  constexpr int kVector = 16 / int(sizeof(T)), kVectors = S::kHeadDim / kVector;
  for (int i = threadIdx.x; i < rows * kVectors; i += S::kThreads) {
    const int row = i / kVectors, column = i % kVectors * kVector, token = source[row];
    T* to = tile + row * S::kPitch + column;
    const T* at = token >= 0 ? from.image + token * from.stride : token == kPadding ? from.pad : nullptr;
    if (at && from.vectors && column < from.head_dim) {
      copy_async(to, at + column);
      continue;
    }
    *reinterpret_cast<Vector*>(to) = Vector{};
    if (at)
      for (int c = 0; c < kVector && column + c < from.head_dim; ++c) to[c] = at[column + c];
  }
}

// Writes rows of shared memory to their tokens; padding has none. Indices run over [first, first + count) of threads.
template <class S>
__device__ __forceinline__ void store_rows(const typename S::T* tile, const HeadRows<typename S::T>& to,
                                           const int* source, int rows, int first, int count) {
  using T = typename S::T;
  constexpr int kVector = 16 / int(sizeof(T)), kVectors = S::kHeadDim / kVector;
  for (int i = first; i < rows * kVectors; i += count) {
    const int row = i / kVectors, column = i % kVectors * kVector, token = source[row];
    if (token < 0) continue;
    const T* from = tile + row * S::kPitch + column;
    T* at = to.image + token * to.stride + column;
    if (to.vectors) {
      if (column < to.head_dim) *reinterpret_cast<Vector*>(at) = *reinterpret_cast<const Vector*>(from);
    } else {
      for (int c = 0; c < kVector && column + c < to.head_dim; ++c) at[c] = from[c];
    }
  }
}

// Divides rows by their lengths and keeps the inverse lengths; kLargestInverse where the length was clamped.
template <class S>
__device__ __forceinline__ void normalize_rows(typename S::T* tile, float* inverse, int rows) {
  const int lane = threadIdx.x % 4 * 2;
  for (int row = threadIdx.x / 4; row < rows; row += S::kThreads / 4) {
    typename S::T* at = tile + row * S::kPitch;
    float squares = 0.f;
    for (int c = lane; c < S::kHeadDim; c += 8) {
      float a, b;
      load_pair(at + c, a, b);
      squares += a * a + b * b;
    }
    const float scale = 1.f / fmaxf(sqrtf(quad_sum(squares)), kShortest);
    for (int c = lane; c < S::kHeadDim; c += 8) {
      float a, b;
      load_pair(at + c, a, b);
      store_pair(at + c, a * scale, b * scale);
    }
    if (lane == 0) inverse[row] = scale;
  }
}

}  // namespace swin_moe
