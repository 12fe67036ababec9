// Backward of windows of 65 to 256 tokens, first part: as window_backward_queries.cuh, but the weights of whole rows
// and their gradients stay in registers, as factors of products (16 bits each), so that nothing is computed twice. All
// keys and values of a window are in shared memory.
#pragma once

#include "window_gradients.cuh"

namespace swin_moe {

template <class S>
struct KeptShared {
  using T = typename S::T;
  TokenTable table;
  float *inverse_queries, *inverse_keys, *scratch;
  T *queries, *grad_out, *keys, *values;

  SWIN_MOE_BOTH size_t place(unsigned char* base, const WindowGeometry& g) {
    SharedPieces pieces{base};
    table.place(pieces, g, padded_tokens<S>(g.tokens()));
    inverse_queries = pieces.take<float>(S::kRows);
    inverse_keys = pieces.take<float>(S::kOthers);
    scratch = pieces.take<float>(S::kWarps);
    queries = pieces.take<T>(S::kRows * S::kPitch);
    grad_out = pieces.take<T>(S::kRows * S::kPitch);
    keys = pieces.take<T>(S::kStage);
    values = pieces.take<T>(S::kStage);
    return pieces.used;
  }

  // Brings in the window; its tokens are in the table.
  __device__ __forceinline__ void load(const WindowLaunch& p, int64_t image, int head, const int* row_source) {
    load_rows<S>(queries, qkv_rows<const T>(p, p.qkv, image, head, 0), row_source, S::kRows);
    load_rows<S>(keys, qkv_rows<const T>(p, p.qkv, image, head, 1), table.source, S::kOthers);
    load_rows<S>(grad_out, out_rows<const T>(p, p.grad_out, image, head), row_source, S::kRows);
    load_rows<S>(values, qkv_rows<const T>(p, p.qkv, image, head, 2), table.source, S::kOthers);
    wait_for_copies();
    __syncthreads();
    if (p.logit_scale) {
      normalize_rows<S>(queries, inverse_queries, S::kRows);
      normalize_rows<S>(keys, inverse_keys, S::kOthers);
      __syncthreads();
    }
  }
};

// Whole rows of weights and their gradients of a warp. Weights are exp(score - largest so far), by groups of Group
// tiles.
template <class S, int Group>
struct KeptRows {
  using F = Fragments<typename S::T>;
  static constexpr int kGroups = S::kTiles / Group;
  static_assert(S::kTiles % Group == 0, "whole groups");
  typename F::Left weights[S::kTiles], grad_weights[S::kTiles];
  float largest[kGroups][2];

  __device__ __forceinline__ RowNumbers compute(const KeptShared<S>& shared, const ScoreRows<S, false>& rows,
                                                int warp_row) {
    typename F::Left queries[S::kSlices], grad_out[S::kSlices];
    load_left<S>(queries, shared.queries, warp_row, rows.rule);
    load_left<S>(grad_out, shared.grad_out, warp_row);
    RunningSoftmax<S> softmax(rows.rule);
    float products[2] = {0.f, 0.f}, shrink[2];
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      float scores[Group][kTileSums];
      start_scores(scores, rows, 0, group * Group);
      multiply_rows<S>(scores, queries, shared.keys, group * Group * kTile);
      softmax.update(scores, shrink, group == 0);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        products[h] *= shrink[h];
        largest[group][h] = softmax.largest_score(h);
      }
#pragma unroll
      for (int u = 0; u < Group; ++u) {
        const int tile = group * Group + u;
        float gradients[1][kTileSums];
        set_zero(gradients);
        multiply_rows<S>(gradients, grad_out, shared.values, tile * kTile);
#pragma unroll
        for (int e = 0; e < kTileSums; ++e) products[e / 2 % 2] += scores[u][e] * gradients[0][e];
        weights[tile] = F::left(scores[u]);
        grad_weights[tile] = F::left(gradients[0]);
      }
    }
    RowNumbers numbers;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      numbers.largest[h] = softmax.largest_score(h);
      numbers.inverse_sum[h] = softmax.inverse_total(h);
      numbers.delta[h] = quad_sum(products[h]) * numbers.inverse_sum[h];
    }
    return numbers;
  }

  __device__ __forceinline__ void differentiate(float (&grad_queries)[S::kSlices][kTileSums], const RowNumbers& numbers,
                                                const typename S::T* keys) const {
#pragma unroll
    for (int tile = 0; tile < S::kTiles; ++tile) {
      float weight[kTileSums], gradient[kTileSums], scale[2];
#pragma unroll
      for (int h = 0; h < 2; ++h)
        scale[h] = ScoreUnit<typename S::T>::exponential(largest[tile / Group][h] - numbers.largest[h]) *
                   numbers.inverse_sum[h];
      F::values(weights[tile], weight);
      F::values(grad_weights[tile], gradient);
#pragma unroll
      for (int e = 0; e < kTileSums; ++e)
        gradient[e] = weight[e] * scale[e / 2 % 2] * (gradient[e] - numbers.delta[e / 2 % 2]);
      multiply_weights<S>(grad_queries, gradient, keys, tile * kTile);
    }
  }
};

template <class S, int Group>
__global__ void __launch_bounds__(S::kThreads) window_backward_kept_kernel(
    const WindowLaunch p, const Partials partials, const RowStatistics statistics, int64_t chunks) {
  const WindowGeometry g = known_geometry<S>(p.geometry);
  const int tokens = g.tokens(), padded = padded_tokens<S>(tokens), row_blocks = blocks_of(tokens, S::kRows);
  const BlockTask task(p, row_blocks, chunks);
  KeptShared<S> shared;
  ScoreRule rule = start_block(shared, p, g, task.head, padded);
  const int warp_row = threadIdx.x / 32 * kTile, first_row = task.row_block * S::kRows;
  const int* row_source = shared.table.source + first_row;
  float grad_factor = 0.f;

  for (int64_t window = task.begin; window < task.end; ++window) {
    const int64_t image = enter_window(shared.table, rule, g, window, padded);
    shared.load(p, image, task.head, row_source);
    const ScoreRows<S, false> scoring(shared.table, rule, first_row + warp_row);
    KeptRows<S, Group> rows;
    float grad_queries[S::kSlices][kTileSums];
    set_zero(grad_queries);
    const RowNumbers numbers = rows.compute(shared, scoring, warp_row);
    rows.differentiate(grad_queries, numbers, shared.keys);
    grad_factor += leave_queries<S>(p, statistics, numbers, grad_queries, shared.queries, shared.inverse_queries,
                                    row_source, window, image, task.head, first_row, tokens);
  }
  write_factor<S>(p, partials, grad_factor, shared.scratch, task.chunk * row_blocks + task.row_block, task.head);
}

}  // namespace swin_moe
