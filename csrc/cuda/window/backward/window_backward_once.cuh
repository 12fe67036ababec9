// Backward of windows of 65 to 256 tokens in one pass: each warp of a block owns 16 keys, all keys of a window together,
// and sees its queries go by. The forward left the logarithm of the sum of every row of exponentials, and its output
// gives the other number of a row, delta, so weights and their gradients are computed once. Gradients of scores go
// through shared memory, kOthers queries at a time, to the gradients of queries.
//
// Gradients of all pairs of tokens, summed over windows, stay in shared memory for the position bias. Where a tile of 16
// tokens is a row of the window, it is one tile per distance of rows: all warps work on the same row of queries at a
// time, each with another row of keys, so that no two have the same distance.
#pragma once

#include "window_backward_rows.cuh"

namespace swin_moe {

template <class S>
struct OnceShared : WindowRows<S> {
  using T = typename S::T;
  static constexpr bool kRowTiles = S::kWindow == kTile;
  static constexpr int kPairTiles = kRowTiles ? 2 * S::kWindow - 1 : S::kWarps * S::kWarps;
  static constexpr int kScorePitch = S::kOthers + 8;   // rows then start in different banks
  // Warps that share the gradient of 16 queries, by columns; where more are left than there are columns, they wait.
  static constexpr int kParts = S::kWarps / S::kTiles < S::kSlices ? S::kWarps / S::kTiles : S::kSlices;
  static constexpr int kUnrolled = kRowTiles ? 4 : 3;  // tiles of queries that make whole rows of the window
  static_assert(sizeof(T) == 2 && S::kWarps % S::kTiles == 0 && S::kSlices % kParts == 0, "every warp has its columns");
  static_assert(S::kWindow * S::kWindow == S::kRows && S::kRows % S::kOthers == 0, "a window in one piece");
  static_assert(kUnrolled * kTile % S::kWindow == 0 && S::kTiles % kUnrolled == 0, "columns at constant places");
  float *along, *log_sums, *deltas, *pair_sums;
  T *grad_scores;                    // (keys, queries at a time); before, the output and the values

  SWIN_MOE_BOTH size_t place(unsigned char* base, const WindowGeometry& g) {
    SharedPieces pieces{base};
    this->place_numbers(pieces, g);
    along = pieces.take<float>(kParts * S::kOthers);
    log_sums = pieces.take<float>(S::kRows);
    deltas = pieces.take<float>(2 * S::kRows);
    pair_sums = pieces.take<float>(kPairTiles * kTile * kTile);
    this->place_rows(pieces);
    grad_scores = pieces.take<T>(S::kRows * (kScorePitch > 2 * S::kPitch ? kScorePitch : 2 * S::kPitch));
    this->values = grad_scores + S::kRows * S::kPitch;  // every warp has its own in registers by then
    return pieces.used;
  }

  // Brings in a window; its tokens are in the table.
  __device__ __forceinline__ void load(const WindowLaunch& p, int64_t window, int64_t image, int head) {
    WindowRows<S>::load(p, image, head);
    load_rows<S, S::kRows>(grad_scores, out_rows<const T>(p, p.out, image, head), this->table.source);
    const float* sums = p.log_sums + (window * p.num_heads + head) * S::kRows;
    for (int t = threadIdx.x; t < S::kRows; t += S::kThreads) log_sums[t] = sums[t];
    wait_for_copies();
    __syncthreads();
    compute_deltas();
    if (p.logit_scale) this->normalize();
    __syncthreads();
  }

  // Minus the sum of weights times their gradients of every query, twice for each pair of queries: as sums of products
  // of a lane lie, which start with them.
  __device__ __forceinline__ void compute_deltas() {
    for (int row = fresh_thread() / 4; row < S::kRows; row += S::kThreads / 4) {
      const QuadRow<S> out(grad_scores + row * S::kPitch), gradient(this->grad_out + row * S::kPitch);
      const float sum = out.product(gradient).value();
      if (threadIdx.x % 4 < 2) deltas[row / 2 * 4 + row % 2 + threadIdx.x % 4 * 2] = -sum;
    }
  }
};

// 16 keys of a warp while queries go by.
template <class S>
struct OwnedKeys {
  using T = typename S::T;
  using F = Fragments<T>;
  using Left = typename F::Left;
  Left keys[S::kSlices], values[S::kSlices];
  float grad_keys[S::kSlices][kTileSums], grad_values[S::kSlices][kTileSums];

  __device__ __forceinline__ OwnedKeys(const OnceShared<S>& shared, const ScoreRule& rule, int row) {
    load_left<S>(keys, shared.keys, row, rule);
    load_left<S>(values, shared.values, row);
    set_zero(grad_keys);
    set_zero(grad_values);
  }

  // Gradients of the scores with queries block + tile * 16.., of which the sums of pairs take the exact ones.
  __device__ __forceinline__ Left step(float (&grad_scores)[kTileSums], const OnceShared<S>& shared,
                                       const ScoreRows<S, true>& rows, int block, int tile) {
    const Lane lane;
    const int first = block + tile * kTile;
    float weights[1][kTileSums], grad_weights[1][kTileSums];
    start_scores(weights, rows, block, tile);
#pragma unroll
    for (int half = 0; half < 2; ++half)
      load_four(shared.deltas + 2 * (first + lane.column + 8 * half), grad_weights[0] + 4 * half);
    multiply_rows<S>(weights, keys, shared.queries, first);
    multiply_rows<S>(grad_weights, values, shared.grad_out, first);
#pragma unroll
    for (int e = 0; e < kTileSums; ++e) {
      const float log_sum = shared.log_sums[first + lane.column_of(e)];
      weights[0][e] = ScoreUnit<T>::exponential(fmaf(weights[0][e], rows.rule.factor, -log_sum));
      grad_scores[e] = weights[0][e] * grad_weights[0][e];
    }
    multiply_weights<S>(grad_values, weights[0], shared.grad_out, first);
    const Left left = F::left(grad_scores);
#pragma unroll
    for (int s = 0; s < S::kSlices; ++s)
      F::multiply(grad_keys[s], left, F::right_of_columns(shared.queries, S::kPitch, first, s * kTile));
    return left;
  }
};

template <class S>
__device__ __forceinline__ void leave_scores(const OnceShared<S>& shared, const typename Fragments<typename S::T>::Left& left,
                                             int row, int column) {
  const Lane lane;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    *reinterpret_cast<uint32_t*>(shared.grad_scores + (row + lane.row_of(2 * i)) * OnceShared<S>::kScorePitch + column +
                                 lane.column_of(2 * i)) = left.r[i];
}

// The sums over windows of what pairs of tokens contribute to the gradient of the position bias, in shared memory: tiles
// as lanes hold them, four numbers of each lane side by side.
template <class S>
struct PairSums {
  using Shared = OnceShared<S>;

  static __device__ __forceinline__ float* at(const Shared& shared, int key_tile, int query_tile) {
    const int tile = Shared::kRowTiles ? query_tile - key_tile + S::kWindow - 1 : key_tile * S::kWarps + query_tile;
    return shared.pair_sums + tile * kTile * kTile;
  }
  static __device__ __forceinline__ int place(int key, int query) {
    return query % kTile / 8 * 128 + (key % 8 * 4 + query % 8 / 2) * 4 + key % kTile / 8 * 2 + query % 2;
  }

  static __device__ __forceinline__ void clear(const Shared& shared) {
    for (int i = threadIdx.x; i < Shared::kPairTiles * kTile * kTile; i += S::kThreads) shared.pair_sums[i] = 0.f;
  }

  static __device__ __forceinline__ void add(const Shared& shared, const float (&grad_scores)[kTileSums], int key,
                                             int query) {
    if constexpr (Shared::kRowTiles) __syncthreads();  // nobody still adds for the row of queries before
    float* to = at(shared, key / kTile, query / kTile) + threadIdx.x % 32 * 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sums[4];
      load_four(to + half * 128, sums);
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[e] += grad_scores[4 * half + e];
      store_four(to + half * 128, sums);
    }
  }

  // One cell of the bias table per thread. A tile per distance holds the pairs of all rows that far apart already.
  static __device__ __forceinline__ void write(const Shared& shared, float* partial, const WindowGeometry& g) {
    constexpr int kWidth = 2 * S::kWindow - 1;
    __syncthreads();
    for (int r = threadIdx.x; r < g.table_rows(); r += S::kThreads) {
      const int dy = r / kWidth - (S::kWindow - 1), dx = r % kWidth - (S::kWindow - 1), apart = dy * S::kWindow + dx;
      const int begin_y = max(0, -dy), end_y = Shared::kRowTiles ? begin_y + 1 : min(S::kWindow, S::kWindow - dy);
      float sum = 0.f;
      for (int y = begin_y; y < end_y; ++y)
        for (int x = max(0, -dx); x < min(S::kWindow, S::kWindow - dx); ++x) {
          const int key = y * S::kWindow + x, query = key + apart;
          sum += at(shared, key / kTile, query / kTile)[place(key, query)];
        }
      partial[r] = sum;
    }
  }
};

// The thread's number, read anew where it would spill if it were kept.
template <class S>
__device__ __forceinline__ int thread_of() {
  return S::kWindow == 16 ? fresh_thread() : int(threadIdx.x);
}

// Gradients of the queries `first`.. at a time, from those of their scores: a warp has 16 of them and some columns, and
// leaves them where the queries were. Returns this lane's share of the gradient of the factor.
template <class S>
__device__ __forceinline__ float differentiate_queries(const WindowLaunch& p, const OnceShared<S>& shared, int head,
                                                       int first) {
  using F = Fragments<typename S::T>;
  constexpr int kOwn = S::kSlices / OnceShared<S>::kParts;
  const Lane lane;
  const int warp = thread_of<S>() / 32, tile = warp % S::kTiles * kTile, part = warp / S::kTiles;
  typename S::T* own = shared.queries + (first + tile) * S::kPitch + part * kOwn * kTile;
  float sums[kOwn][kTileSums], factor[2] = {p.scale, p.scale}, share = 0.f;
  constexpr int kThreads = S::kTiles * OnceShared<S>::kParts * 32;
  const bool takes_part = S::kThreads == kThreads || threadIdx.x < kThreads;  // of a constant no register is kept
  set_zero(sums);
#pragma unroll
  for (int k = 0; takes_part && k < S::kRows; k += kTile) {
    const auto left = F::left_of_columns(shared.grad_scores, OnceShared<S>::kScorePitch, tile, k);
#pragma unroll
    for (int s = 0; s < kOwn; ++s)
      F::multiply(sums[s], left, F::right_of_columns(shared.keys, S::kPitch, k, (part * kOwn + s) * kTile));
  }
  if (p.logit_scale) {
    float along[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (!takes_part) break;
      along[h] = product_with_row<S>(sums, own, h);
      if (lane.column == 0) shared.along[part * S::kOthers + tile + lane.row + 8 * h] = along[h];
    }
    __syncthreads();  // the other columns of the rows
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (!takes_part) break;
      along[h] = 0.f;
      for (int other = 0; other < OnceShared<S>::kParts; ++other)
        along[h] += shared.along[other * S::kOthers + tile + lane.row + 8 * h];
      const float inverse = shared.inverse_queries[first + tile + lane.row + 8 * h];
      remove_along<S>(sums, own, h, inverse < kLargestInverse ? along[h] : 0.f);
      factor[h] = p.logit_scale[head] * inverse;
    }
    if (lane.column == 0 && part == 0) share = along[0] + along[1];
    __syncwarp();
  }
  if (takes_part) write_sums<S>(own, 0, sums, factor[0], factor[1]);
  return share;
}

template <class S>
__global__ void __launch_bounds__(S::kThreads, 1)
    window_backward_once_kernel(const WindowLaunch p, const Partials partials, int64_t chunks) {
  using Shared = OnceShared<S>;
  const WindowGeometry g = known_geometry<S>(p.geometry);
  const BlockTask task(p, 1, chunks);
  Shared shared;
  ScoreRule rule = start_window_block<S>(shared, p, g, task.head);
  PairSums<S>::clear(shared);
  RowSum<typename S::T> grad_factor;

  for (uint32_t window = task.begin; window < task.end; ++window) {
    const uint32_t image = enter_window(shared.table, rule, g, window, S::kRows);
    shared.load(p, window, image, task.head);
    const int row = thread_of<S>() / 32 * kTile;
    const ScoreRows<S, true> rows(shared.table, rule, row);
    OwnedKeys<S> owned(shared, rule, row);
    __syncthreads();  // gradients of scores take the place of the values
#pragma unroll 1
    for (int first = 0; first < S::kRows; first += S::kOthers) {
#pragma unroll 1
      for (int block = 0; block < S::kOthers; block += Shared::kUnrolled * kTile)
#pragma unroll
        for (int u = 0; u < Shared::kUnrolled; ++u) {
          float grad_scores[kTileSums];
          const auto left = owned.step(grad_scores, shared, rows, first + block, u);
          PairSums<S>::add(shared, grad_scores, row, first + block + u * kTile);
          leave_scores<S>(shared, left, row, block + u * kTile);
        }
      __syncthreads();  // the gradients of the scores of these queries are all there
      grad_factor.add(differentiate_queries<S>(p, shared, task.head, first));
      if constexpr (!Shared::kRowTiles && S::kRows > S::kOthers) __syncthreads();  // PairSums::add has one otherwise
    }
    float factor[2], along[2];
    finish_rows<S>(owned.grad_keys, factor, along, p, task.head, shared.keys, shared.inverse_keys, row);
    __syncthreads();  // nobody reads the keys any more: their gradients take their place
    shared.write_key_gradients(partials, row, owned.grad_keys, owned.grad_values, factor);
    __syncthreads();
    shared.store(p, image, task.head);
  }
  PairSums<S>::write(shared, end_window_block(shared, p, partials, g, task, grad_factor), g);
}

}  // namespace swin_moe
