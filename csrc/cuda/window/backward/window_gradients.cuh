// What the backward kernels of window attention share: one product of keys and queries, gradients of unit vectors, and
// the sums over windows that leave a block (position bias, logit scale, padding).
#pragma once

#include "cuda/window/window_scores.cuh"
#include "cuda/window/window_workspace.h"

namespace swin_moe {

// Gradients of 16 keys from 16 queries, and the gradients of their scores. Columns are queries, tile `tile` of those of
// a block in shared memory, with their statistics.
template <class S, bool Gradients>
__device__ __forceinline__ void key_step(float (&grad_scores)[kTileSums], float (&grad_keys)[S::kSlices][kTileSums],
                                         float (&grad_values)[S::kSlices][kTileSums], const ScoreRows<S, true>& rows,
                                         const typename Fragments<typename S::T>::Left (&keys)[S::kSlices],
                                         const typename Fragments<typename S::T>::Left (&values)[S::kSlices],
                                         const typename S::T* queries, const typename S::T* grad_out,
                                         const RowStatistics& statistics, int block, int tile) {
  const Lane lane;
  float weights[1][kTileSums], grad_weights[1][kTileSums];
  const int first = tile * kTile;
  start_scores(weights, rows, block, tile);
  set_zero(grad_weights);
  multiply_rows<S>(weights, keys, queries, first);
  multiply_rows<S>(grad_weights, values, grad_out, first);
#pragma unroll
  for (int e = 0; e < kTileSums; ++e) {
    const int query = first + lane.column_of(e);
    weights[0][e] = ScoreUnit<typename S::T>::exponential(fmaf(weights[0][e], rows.rule.factor, -statistics.largest[query])) *
                    statistics.inverse_sum[query];
    grad_scores[e] = weights[0][e] * (grad_weights[0][e] - statistics.delta[query]);
  }
  if (Gradients) {
    multiply_weights<S>(grad_values, weights[0], grad_out, first);
    multiply_weights<S>(grad_keys, grad_scores, queries, first);
  }
}

// Of row h of a lane's two: the product of a tile's rows of sums with the rows `unit`.
template <class S, int Slices>
__device__ __forceinline__ float product_with_row(const float (&sums)[Slices][kTileSums], const typename S::T* unit,
                                                  int h) {
  const Lane lane;
  RowSum<typename S::T> product;
#pragma unroll
  for (int s = 0; s < Slices; ++s)
#pragma unroll
    for (int e = 0; e < kTileSums; ++e)
      if (e / 2 % 2 == h)
        product.add_product(sums[s][e],
                            to_float(unit[(lane.row + 8 * h) * S::kPitch + s * kTile + lane.column_of(e)]));
  return quad_sum(product).value();
}

// Takes `removed` times that row away from the sums.
template <class S, int Slices>
__device__ __forceinline__ void remove_along(float (&sums)[Slices][kTileSums], const typename S::T* unit, int h,
                                             float removed) {
  const Lane lane;
#pragma unroll
  for (int s = 0; s < Slices; ++s)
#pragma unroll
    for (int e = 0; e < kTileSums; ++e)
      if (e / 2 % 2 == h)
        sums[s][e] -= removed * to_float(unit[(lane.row + 8 * h) * S::kPitch + s * kTile + lane.column_of(e)]);
}

// Gradients of rows from those of their scores' factors: d (f x / |x|) = f / |x| (s - (s . u) u), u = x / |x|; without
// the second term where the length was clamped. Products s . u of the two rows of a lane come back in `along`.
template <class S>
__device__ __forceinline__ void finish_rows(float (&sums)[S::kSlices][kTileSums], float (&factor)[2], float (&along)[2],
                                            const WindowLaunch& p, int head, const typename S::T* unit,
                                            const float* inverse, int row) {
  if (!p.logit_scale) {
    factor[0] = factor[1] = p.scale;
    return;
  }
  const Lane lane;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float scale = inverse[row + lane.row + 8 * h];
    along[h] = product_with_row<S>(sums, unit + row * S::kPitch, h);
    remove_along<S>(sums, unit + row * S::kPitch, h, scale < kLargestInverse ? along[h] : 0.f);
    factor[h] = p.logit_scale[head] * scale;
  }
}

// What a lane knows of its two rows of scores; see RowStatistics.
struct RowNumbers {
  float largest[2], inverse_sum[2], delta[2];
};

// Writes the gradients of a warp's 16 queries from the sums of gradients of scores times keys, and the numbers of their
// rows; returns this lane's share of the gradient of the factor. The warp's rows of `queries` take the result.
template <class S>
__device__ __forceinline__ float leave_queries(const WindowLaunch& p, const RowStatistics& statistics,
                                               const RowNumbers& numbers, float (&sums)[S::kSlices][kTileSums],
                                               typename S::T* queries, const float* inverse, const int* row_source,
                                               int64_t window, int64_t image, int head, int first_row, int tokens) {
  using T = typename S::T;
  const Lane lane;
  const int warp_row = threadIdx.x / 32 * kTile;
  float factor[2], along[2] = {0.f, 0.f};
  finish_rows<S>(sums, factor, along, p, head, queries, inverse, warp_row);
  __syncwarp();
  write_sums<S>(queries, warp_row, sums, factor[0], factor[1]);
  __syncwarp();
  store_rows<S, kTile, 32>(queries + warp_row * S::kPitch, qkv_rows<T>(p, p.grad_qkv, image, head, 0),
                           row_source + warp_row);
  if (lane.column != 0) return 0.f;
  const RowStatistics to = statistics.from((window * p.num_heads + head) * tokens);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int query = first_row + warp_row + lane.row + 8 * h;
    if (query >= tokens) continue;
    to.largest[query] = numbers.largest[h];
    to.inverse_sum[query] = numbers.inverse_sum[h];
    to.delta[query] = numbers.delta[h];
  }
  return along[0] + along[1];
}

// Adds a warp's rows of sums, each times its factor, that belong to padding to this warp's sums (head dim) in shared
// memory; before rounding, since many rows are added.
template <class S>
__device__ __forceinline__ void add_padding(float* padding, const float (&sums)[S::kSlices][kTileSums],
                                            const float (&factor)[2], const int* source) {
  const Lane lane;
  const float upper = source[lane.row] == kPadding ? factor[0] : 0.f;
  const float lower = source[lane.row + 8] == kPadding ? factor[1] : 0.f;
  if (!__any_sync(kAllLanes, upper != 0.f || lower != 0.f)) return;
#pragma unroll
  for (int s = 0; s < S::kSlices; ++s)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int e = i % 2 + i / 2 * 4;
      float sum = (upper != 0.f ? sums[s][e] * upper : 0.f) + (lower != 0.f ? sums[s][e + 2] * lower : 0.f);
#pragma unroll
      for (int distance = 16; distance > 2; distance /= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
      if (lane.row == 0) padding[s * kTile + lane.column_of(e)] += sum;
    }
}

// The same for 16 keys, from `row` on, and their values; `padding` (warps, 2, head dim).
template <class S>
__device__ __forceinline__ void add_key_padding(float* padding, const float (&grad_keys)[S::kSlices][kTileSums],
                                                const float (&factor)[2],
                                                const float (&grad_values)[S::kSlices][kTileSums], const int* source,
                                                int row) {
  const float unchanged[2] = {1.f, 1.f};
  float* of_warp = padding + row / kTile * 2 * S::kHeadDim;
  add_padding<S>(of_warp, grad_keys, factor, source + row);
  add_padding<S>(of_warp + S::kHeadDim, grad_values, unchanged, source + row);
}

template <class S>
__device__ __forceinline__ void clear_padding(float* padding) {
  for (int c = threadIdx.x; c < S::kWarps * 2 * S::kHeadDim; c += S::kThreads) padding[c] = 0.f;
}

// The sums over warps (2, head dim) of add_padding for keys and values, from (warps, 2, head dim).
template <class S>
__device__ __forceinline__ void write_padding(const WindowLaunch& p, const Partials& partials, const float* padding,
                                              int64_t partial, int head) {
  __syncthreads();
  for (int c = threadIdx.x; c < 2 * S::kHeadDim; c += S::kThreads) {
    const int part = c / S::kHeadDim, column = c % S::kHeadDim;
    float sum = 0.f;
    for (int warp = 0; warp < S::kWarps; ++warp) sum += padding[warp * 2 * S::kHeadDim + c];
    if (column < p.head_dim) partials.pad[(partial * 2 + part) * p.channels() + head * p.head_dim + column] = sum;
  }
}

// Sums over the threads of a block in a fixed order; the result is that of thread 0. One float per warp of scratch.
template <class S>
__device__ __forceinline__ float block_sum(const RowSum<typename S::T>& share, float* scratch) {
  const float of_warp = warp_sum(share).value();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = of_warp;
  __syncthreads();
  RowSum<typename S::T> sum;
  for (int warp = 0; warp < S::kWarps; ++warp) sum.add(scratch[warp]);
  return sum.value();
}

// The gradient of the factor of a block's rows, from the shares of its threads.
template <class S>
__device__ __forceinline__ void write_factor(const WindowLaunch& p, const Partials& partials,
                                             const RowSum<typename S::T>& share,
                                             float* scratch, int64_t partial, int head) {
  if (!p.logit_scale) return;
  const float sum = block_sum<S>(share, scratch);
  if (threadIdx.x == 0) partials.logit_scale[partial * p.num_heads + head] = sum;
}

// From gradients per pair of tokens, summed over windows, to those of the bias table. Rows are keys and columns queries,
// or the other way round; either begins at a given token. `pairs` (rows of a block, Tiles * 16 + 1) is shared memory
// that nothing else uses any more.
template <class S, bool KeyRows, int Tiles>
__device__ __forceinline__ void write_bias(const float (&sums)[Tiles][kTileSums], float* pairs, float* partial,
                                           const WindowGeometry& g, int first_row, int first_column) {
  constexpr int kPairPitch = Tiles * kTile + 1;
  const Lane lane;
  const int warp_row = threadIdx.x / 32 * kTile;
  __syncthreads();
#pragma unroll
  for (int u = 0; u < Tiles; ++u)
#pragma unroll
    for (int e = 0; e < kTileSums; ++e)
      pairs[(warp_row + lane.row_of(e)) * kPairPitch + u * kTile + lane.column_of(e)] = sums[u][e];
  __syncthreads();
  const int end_row = min(first_row + S::kRows, g.tokens()), end_column = first_column + Tiles * kTile;
  const int width = 2 * g.window_w - 1;
  for (int r = threadIdx.x; r < g.table_rows(); r += S::kThreads) {
    const int row = KeyRows ? r : g.table_rows() - 1 - r;  // rows and columns change places where distances turn round
    const int dy = row / width - (g.window_h - 1), dx = row % width - (g.window_w - 1), apart = dy * g.window_w + dx;
    const int begin_y = max(max(0, -dy), first_row / g.window_w);
    const int end_y = min(min(g.window_h, g.window_h - dy), (end_row - 1) / g.window_w + 1);
    float sum = 0.f;
    for (int y = begin_y; y < end_y; ++y) {
      const int begin = max(max(y * g.window_w + max(0, -dx), first_row), first_column - apart);
      const int end = min(min(y * g.window_w + min(g.window_w, g.window_w - dx), end_row), end_column - apart);
      const float* at = pairs + (begin - first_row) * kPairPitch + begin + apart - first_column;
      for (int token = begin; token < end; ++token, at += kPairPitch + 1) sum += *at;
    }
    partial[r] = sum;
  }
}

}  // namespace swin_moe
