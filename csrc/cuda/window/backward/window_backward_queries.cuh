// Backward of large windows, first part: gradients of queries. A block holds 16 queries per warp and streams the keys
// and values of their windows twice: for the statistics of the rows, and for the gradients.
#pragma once

#include "window_gradients.cuh"

namespace swin_moe {

template <class S>
struct QueriesShared {
  using T = typename S::T;
  TokenTable table;
  float *inverse_queries, *scratch;
  T *queries, *grad_out, *keys, *values;  // keys and values: in two stages

  SWIN_MOE_BOTH size_t place(unsigned char* base, const WindowGeometry& g) {
    SharedPieces pieces{base};
    table.place(pieces, g, padded_tokens<S>(g.tokens()));
    inverse_queries = pieces.take<float>(S::kRows);
    scratch = pieces.take<float>(S::kWarps);
    queries = pieces.take<T>(S::kRows * S::kPitch);
    grad_out = pieces.take<T>(S::kRows * S::kPitch);
    keys = pieces.take<T>(2 * S::kStage);
    values = pieces.take<T>(2 * S::kStage);
    return pieces.used;
  }

  // Starts to bring in the keys from `first` on, and their values.
  __device__ __forceinline__ void load_keys(const WindowLaunch& p, int64_t image, int head, int stage, int first) {
    T* const tiles[] = {keys + stage, values + stage};
    load_rows<S, S::kOthers>(tiles, qkv_rows<const T>(p, p.qkv, image, head, 1), table.source + first);
  }
};

// 16 queries of a warp on their way through the keys.
template <class S>
struct QueryRows {
  using T = typename S::T;
  using Left = typename Fragments<T>::Left;
  Left queries[S::kSlices], grad_out[S::kSlices];
  RunningSoftmax<S> softmax;
  RowSum<T> products[2];             // of exponentials and the gradient of the weight, of this lane
  RowNumber<T> inverse_sum[2], delta[2];

  __device__ __forceinline__ explicit QueryRows(const ScoreRule& rule) : softmax(rule) {}

  __device__ __forceinline__ void multiply(float (&scores)[S::kTiles][kTileSums],
                                           float (&grad_weights)[S::kTiles][kTileSums], const ScoreRows<S, false>& rows,
                                           const typename S::T* keys, const typename S::T* values, int first_key) {
    start_scores(scores, rows, first_key, 0);
    set_zero(grad_weights);
    multiply_rows<S>(scores, queries, keys, 0);
    multiply_rows<S>(grad_weights, grad_out, values, 0);
  }

  __device__ __forceinline__ void measure(float (&scores)[S::kTiles][kTileSums],
                                          const float (&grad_weights)[S::kTiles][kTileSums], bool first) {
    float shrink[2];
    softmax.update(scores, shrink, first);
#pragma unroll
    for (int h = 0; h < 2; ++h) products[h].shrink(shrink[h]);
#pragma unroll
    for (int u = 0; u < S::kTiles; ++u)
#pragma unroll
      for (int e = 0; e < kTileSums; ++e) products[e / 2 % 2].add_product(scores[u][e], grad_weights[u][e]);
  }

  __device__ __forceinline__ void finish_statistics() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      inverse_sum[h] = softmax.inverse_total(h);
      delta[h] = product(quad_sum(products[h]), inverse_sum[h]);
    }
  }

  __device__ __forceinline__ void differentiate(float (&scores)[S::kTiles][kTileSums],
                                                const float (&grad_weights)[S::kTiles][kTileSums]) const {
#pragma unroll
    for (int u = 0; u < S::kTiles; ++u)
#pragma unroll
      for (int e = 0; e < kTileSums; ++e) {
        const int h = e / 2 % 2;
        const float weight = inverse_sum[h].times(
            ScoreUnit<T>::exponential(fmaf(scores[u][e], softmax.factor, -softmax.largest_score(h))));
        scores[u][e] = weight * delta[h].taken_from(grad_weights[u][e]);
      }
  }
};

// Least blocks for a multiprocessor where the compiler would spill to fit one more.
template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kHeadDim == 16 ? 4 : 0) window_backward_queries_kernel(
    const WindowLaunch p, const Partials partials, const RowStatistics statistics, int64_t chunks) {
  using T = typename S::T;
  const WindowGeometry g = known_geometry<S>(p.geometry);
  const int tokens = g.tokens(), padded = padded_tokens<S>(tokens), key_blocks = blocks_of(tokens, S::kOthers);
  const int row_blocks = blocks_of(tokens, S::kRows);
  const BlockTask task(p, row_blocks, chunks);
  QueriesShared<S> shared;
  ScoreRule rule = start_block(shared, p, g, task.head, padded);
  const int warp_row = threadIdx.x / 32 * kTile, first_row = task.row_block * S::kRows;
  const int* row_source = shared.table.source + first_row;
  RowSum<T> grad_factor;

  for (uint32_t window = task.begin; window < task.end; ++window) {
    const uint32_t image = enter_window(shared.table, rule, g, window, padded);
    load_rows<S, S::kRows>(shared.queries, qkv_rows<const T>(p, p.qkv, image, task.head, 0), row_source);
    load_rows<S, S::kRows>(shared.grad_out, out_rows<const T>(p, p.grad_out, image, task.head), row_source);
    shared.load_keys(p, image, task.head, 0, 0);

    const ScoreRows<S, false> rows(shared.table, rule, first_row + warp_row);
    QueryRows<S> row(rule);
    float grad_queries[S::kSlices][kTileSums];
    set_zero(grad_queries);
    for (int step = 0; step < 2 * key_blocks; ++step) {
      const int stage = step % 2 * S::kStage, first_key = step % key_blocks * S::kOthers;
      wait_for_copies();
      __syncthreads();  // this block of keys is here, and the one before is no longer read
      if (step + 1 < 2 * key_blocks)
        shared.load_keys(p, image, task.head, S::kStage - stage, (step + 1) % key_blocks * S::kOthers);
      if (p.logit_scale) {
        if (step == 0) normalize_rows<S, S::kRows>(shared.queries, shared.inverse_queries);
        normalize_rows<S, S::kOthers>(shared.keys + stage, nullptr);
        __syncthreads();
      }
      if (step == 0) {
        load_left<S>(row.queries, shared.queries, warp_row, rule);
        load_left<S>(row.grad_out, shared.grad_out, warp_row);
      }
      float scores[S::kTiles][kTileSums], grad_weights[S::kTiles][kTileSums];
      row.multiply(scores, grad_weights, rows, shared.keys + stage, shared.values + stage, first_key);
      if (step < key_blocks) {
        row.measure(scores, grad_weights, step == 0);
        if (step == key_blocks - 1) row.finish_statistics();
      } else {
        row.differentiate(scores, grad_weights);
#pragma unroll
        for (int u = 0; u < S::kTiles; ++u)
          multiply_weights<S>(grad_queries, scores[u], shared.keys + stage, u * kTile);
      }
    }
    const RowNumbers numbers = {{row.softmax.largest_score(0), row.softmax.largest_score(1)},
                                {row.inverse_sum[0].high, row.inverse_sum[1].high},
                                {row.delta[0].high, row.delta[1].high}};
    grad_factor.add(leave_queries<S>(p, statistics, numbers, grad_queries, shared.queries, shared.inverse_queries,
                                     row_source, window, image, task.head, first_row, tokens));
  }
  write_factor<S>(p, partials, grad_factor, shared.scratch, task.chunk * row_blocks + task.row_block, task.head);
}

}  // namespace swin_moe
