// What the backward kernels that take a window in one piece share: its rows in shared memory, of which gradients take
// the place, and the sums over windows of what a block leaves at its end.
#pragma once

#include "window_gradients.cuh"

namespace swin_moe {

template <class S>
struct WindowRows {
  using T = typename S::T;
  TokenTable table;
  float *inverse_queries, *inverse_keys, *pad, *scratch;
  T *queries, *keys, *values, *grad_out;

  SWIN_MOE_BOTH void place_numbers(SharedPieces& pieces, const WindowGeometry& g) {
    table.place(pieces, g, S::kRows);
    inverse_queries = pieces.take<float>(S::kRows);
    inverse_keys = pieces.take<float>(S::kRows);
    pad = pieces.take<float>(S::kWarps * 2 * S::kHeadDim);
    scratch = pieces.take<float>(S::kWarps);
  }

  // All rows but the values.
  SWIN_MOE_BOTH void place_rows(SharedPieces& pieces) {
    queries = pieces.take<T>(S::kRows * S::kPitch);
    keys = pieces.take<T>(S::kRows * S::kPitch);
    grad_out = pieces.take<T>(S::kRows * S::kPitch);
  }

  // Starts to bring in a window, whose tokens are in the table.
  __device__ __forceinline__ void load(const WindowLaunch& p, int64_t image, int head) {
    T* const tiles[] = {queries, keys, values};
    load_rows<S, S::kRows>(tiles, qkv_rows<const T>(p, p.qkv, image, head, 0), table.source);
    load_rows<S, S::kRows>(grad_out, out_rows<const T>(p, p.grad_out, image, head), table.source);
  }

  // For cosine scores; the caller synchronizes.
  __device__ __forceinline__ void normalize() {
    normalize_rows<S, S::kRows>(queries, inverse_queries);
    normalize_rows<S, S::kRows>(keys, inverse_keys);
  }

  // Leaves the gradients of 16 keys and their values where those were, once nobody reads them any more, and adds those
  // of padding to the warp's sums.
  __device__ __forceinline__ void write_key_gradients(const Partials& partials, int row,
                                                      const float (&grad_keys)[S::kSlices][kTileSums],
                                                      const float (&grad_values)[S::kSlices][kTileSums],
                                                      const float (&factor)[2]) {
    write_sums<S>(keys, row, grad_keys, factor[0], factor[1]);
    write_sums<S>(values, row, grad_values, 1.f, 1.f);
    if (partials.pad) add_key_padding<S>(pad, grad_keys, factor, grad_values, table.source, row);
  }

  __device__ __forceinline__ void store(const WindowLaunch& p, int64_t image, int head) {
    T* rows[3] = {queries, keys, values};
#pragma unroll
    for (int part = 0; part < 3; ++part)
      store_rows<S, S::kRows, S::kThreads>(rows[part], qkv_rows<T>(p, p.grad_qkv, image, head, part), table.source);
  }
};

// Starts a block of such a kernel; returns how its head scores.
template <class S, class Shared>
__device__ __forceinline__ ScoreRule start_window_block(Shared& shared, const WindowLaunch& p, const WindowGeometry& g,
                                                        int head) {
  const ScoreRule rule = start_block(shared, p, g, head, S::kRows);
  clear_padding<S>(shared.pad);
  return rule;
}

// Where a block's sums for the position bias go, once those for the factor and the padding are written.
template <class S>
__device__ __forceinline__ float* end_window_block(const WindowRows<S>& rows, const WindowLaunch& p,
                                                   const Partials& partials, const WindowGeometry& g,
                                                   const BlockTask& task, const RowSum<typename S::T>& grad_factor) {
  write_factor<S>(p, partials, grad_factor, rows.scratch, task.chunk, task.head);
  if (partials.pad) write_padding<S>(p, partials, rows.pad, task.chunk, task.head);
  return partials.bias + (int64_t(task.chunk) * p.num_heads + task.head) * g.table_rows();
}

}  // namespace swin_moe
