// Backward of windows of up to 64 tokens: a block reads q, k, v and the gradient of a window once and writes theirs
// once. First each warp owns 16 queries, whose whole rows of scores are in its registers: weights and their gradients
// are computed once, and left in shared memory, in 16 bits where elements have them. Then each owns 16 keys. The
// gradients of all pairs of tokens stay in registers from window to window.
#pragma once

#include "window_backward_rows.cuh"

namespace swin_moe {

template <class S>
struct WholeShared : WindowRows<S> {
  using T = typename S::T;
  static_assert(S::kRows == S::kOthers, "a window in one piece");
  static constexpr int kPairPitch = S::kOthers + 16 / int(sizeof(T));  // rows then start in different banks
  T *weights, *grad_scores;          // (queries, keys)
  float* pairs;

  SWIN_MOE_BOTH size_t place(unsigned char* base, const WindowGeometry& g) {
    SharedPieces pieces{base};
    this->place_numbers(pieces, g);
    SharedPieces after = pieces;  // the pairs lie where the rows were
    pairs = after.take<float>(S::kRows * (S::kRows + 1));
    this->place_rows(pieces);
    this->values = pieces.take<T>(S::kRows * S::kPitch);
    weights = pieces.take<T>(S::kRows * kPairPitch);
    grad_scores = pieces.take<T>(S::kRows * kPairPitch);
    return pieces.used > after.used ? pieces.used : after.used;
  }

  __device__ __forceinline__ void load(const WindowLaunch& p, int64_t image, int head) {
    WindowRows<S>::load(p, image, head);
    wait_for_copies();
    __syncthreads();
    if (p.logit_scale) {
      this->normalize();
      __syncthreads();
    }
  }
};

// Writes a warp's rows of weights or their gradients for the keys; rows of no token are zero.
template <class S>
__device__ __forceinline__ void leave_pairs(typename S::T* tile, int row, const float (&sums)[S::kTiles][kTileSums]) {
  const Lane lane;
#pragma unroll
  for (int u = 0; u < S::kTiles; ++u)
#pragma unroll
    for (int e = 0; e < kTileSums; e += 2)
      store_pair(tile + (row + lane.row_of(e)) * WholeShared<S>::kPairPitch + u * kTile + lane.column_of(e), sums[u][e],
                 sums[u][e + 1]);
}

// Sums of grad_scores times keys for 16 queries; leaves weights and grad_scores in shared memory.
template <class S>
__device__ __forceinline__ void query_phase(float (&grad_queries)[S::kSlices][kTileSums],
                                            float (&grad_bias)[S::kTiles][kTileSums], const WholeShared<S>& shared,
                                            const ScoreRule& rule, int row) {
  using T = typename S::T;
  using F = Fragments<T>;
  const Lane lane;
  float weights[S::kTiles][kTileSums], grad_weights[S::kTiles][kTileSums], unused[2];
  {
    const ScoreRows<S, false> rows(shared.table, rule, row);
    typename F::Left left[S::kSlices];
    load_left<S>(left, shared.queries, row, rule);
    start_scores(weights, rows, 0, 0);
    multiply_rows<S>(weights, left, shared.keys, 0);
    set_zero(grad_weights);
    load_left<S>(left, shared.grad_out, row);
    multiply_rows<S>(grad_weights, left, shared.values, 0);
  }
  RunningSoftmax<S> softmax(rule);
  softmax.update(weights, unused, true);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const RowNumber<T> inverse_total = softmax.inverse_total(h);
    const RowNumber<T> inverse = row + lane.row + 8 * h < rule.tokens ? inverse_total : RowNumber<T>{};
    RowSum<T> products;
#pragma unroll
    for (int u = 0; u < S::kTiles; ++u)
#pragma unroll
      for (int e = 0; e < kTileSums; ++e)
        if (e / 2 % 2 == h) {
          weights[u][e] = inverse.times(weights[u][e]);
          products.add_product(weights[u][e], grad_weights[u][e]);
        }
    const RowNumber<T> delta = number(quad_sum(products));
#pragma unroll
    for (int u = 0; u < S::kTiles; ++u)
#pragma unroll
      for (int e = 0; e < kTileSums; ++e)
        if (e / 2 % 2 == h) grad_weights[u][e] = weights[u][e] * delta.taken_from(grad_weights[u][e]);
  }
  leave_pairs<S>(shared.weights, row, weights);
  leave_pairs<S>(shared.grad_scores, row, grad_weights);
#pragma unroll
  for (int u = 0; u < S::kTiles; ++u) {
    multiply_weights<S>(grad_queries, grad_weights[u], shared.keys, u * kTile);
#pragma unroll
    for (int e = 0; e < kTileSums; ++e) grad_bias[u][e] += grad_weights[u][e];
  }
}

// sums (16 keys x head_dim) += the transposed columns row.. of pairs (queries, keys) times a matrix of queries.
template <class S>
__device__ __forceinline__ void multiply_columns(float (&sums)[S::kSlices][kTileSums], const typename S::T* pairs,
                                                 int row, const typename S::T* matrix) {
  using F = Fragments<typename S::T>;
#pragma unroll
  for (int u = 0; u < S::kTiles; ++u) {
    const auto left = F::left_of_columns(pairs, WholeShared<S>::kPairPitch, row, u * kTile);
#pragma unroll
    for (int s = 0; s < S::kSlices; ++s)
      F::multiply(sums[s], left, F::right_of_columns(matrix, S::kPitch, u * kTile, s * kTile));
  }
}

// Least blocks for a multiprocessor where the compiler would spill to fit one more.
template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kHeadDim > 32 ? 2 : S::kWindow == 7 ? 4 : 3)
    window_backward_whole_kernel(const WindowLaunch p, const Partials partials, int64_t chunks) {
  const WindowGeometry g = known_geometry<S>(p.geometry);
  const BlockTask task(p, 1, chunks);
  WholeShared<S> shared;
  ScoreRule rule = start_window_block<S>(shared, p, g, task.head);
  const int row = threadIdx.x / 32 * kTile;
  const Lane lane;
  RowSum<typename S::T> grad_factor;
  float grad_bias[S::kTiles][kTileSums];
  set_zero(grad_bias);

  for (uint32_t window = task.begin; window < task.end; ++window) {
    const uint32_t image = enter_window(shared.table, rule, g, window, S::kRows);
    shared.load(p, image, task.head);

    float grad_queries[S::kSlices][kTileSums], query_factor[2], along[2] = {0.f, 0.f};
    set_zero(grad_queries);
    query_phase(grad_queries, grad_bias, shared, rule, row);
    finish_rows<S>(grad_queries, query_factor, along, p, task.head, shared.queries, shared.inverse_queries, row);
    if (lane.column == 0) grad_factor.add(along[0] + along[1]);
    __syncthreads();  // the weights of all queries are there, and their gradients

    const int own_row = S::kWindow == 7 ? fresh_thread() / 32 * kTile : row;  // kept, it would spill
    float grad_keys[S::kSlices][kTileSums], grad_values[S::kSlices][kTileSums], key_factor[2];
    set_zero(grad_keys);
    set_zero(grad_values);
    multiply_columns<S>(grad_values, shared.weights, own_row, shared.grad_out);
    multiply_columns<S>(grad_keys, shared.grad_scores, own_row, shared.queries);
    finish_rows<S>(grad_keys, key_factor, along, p, task.head, shared.keys, shared.inverse_keys, own_row);
    __syncthreads();  // nobody reads the rows any more: the gradients take their place
    write_sums<S>(shared.queries, own_row, grad_queries, query_factor[0], query_factor[1]);
    shared.write_key_gradients(partials, own_row, grad_keys, grad_values, key_factor);
    __syncthreads();
    shared.store(p, image, task.head);
  }
  float* partial = end_window_block(shared, p, partials, g, task, grad_factor);
  write_bias<S, false>(grad_bias, shared.pairs, partial, g, 0, 0);
}

}  // namespace swin_moe
