// Backward of large windows, second part: gradients of keys and values, and of the position bias. A block holds 16 keys
// per warp and streams the queries of their windows with the statistics of their rows.
#pragma once

#include "window_gradients.cuh"

namespace swin_moe {

template <class S, int PairTiles>
struct KeysShared {
  using T = typename S::T;
  TokenTable table;
  RowStatistics statistics;
  float *inverse_keys, *pad, *pairs;
  T *keys, *values, *queries, *grad_out;  // queries, grad_out and their statistics: in two stages

  SWIN_MOE_BOTH size_t place(unsigned char* base, const WindowGeometry& g) {
    SharedPieces pieces{base};
    table.place(pieces, g, padded_tokens<S>(g.tokens()));
    inverse_keys = pieces.take<float>(S::kRows);
    pad = pieces.take<float>(S::kWarps * 2 * S::kHeadDim);
    SharedPieces after = pieces;  // the pairs lie where the rows were
    pairs = after.take<float>(PairTiles ? S::kRows * (PairTiles * kTile + 1) : 0);
    keys = pieces.take<T>(S::kRows * S::kPitch);
    values = pieces.take<T>(S::kRows * S::kPitch);
    statistics = {pieces.take<float>(2 * S::kOthers), pieces.take<float>(2 * S::kOthers),
                  pieces.take<float>(2 * S::kOthers)};
    queries = pieces.take<T>(2 * S::kStage);
    grad_out = pieces.take<T>(2 * S::kStage);
    return pieces.used > after.used ? pieces.used : after.used;
  }

  // Starts to bring in a block's keys and values.
  __device__ __forceinline__ void load_keys(const WindowLaunch& p, int64_t image, int head, const int* row_source) {
    T* const tiles[] = {keys, values};
    load_rows<S, S::kRows>(tiles, qkv_rows<const T>(p, p.qkv, image, head, 1), row_source);
  }

  // Reads the keys and values of a warp.
  using Left = typename Fragments<T>::Left;
  __device__ __forceinline__ void read_own(Left (&own_keys)[S::kSlices], Left (&own_values)[S::kSlices], int warp_row,
                                           const ScoreRule& rule) const {
    load_left<S>(own_keys, keys, warp_row, rule);
    load_left<S>(own_values, values, warp_row);
  }

  // Starts to bring in the queries from `first` on, and their statistics.
  __device__ __forceinline__ void load_queries(const WindowLaunch& p, const RowStatistics& all, int stage,
                                               int64_t window, int64_t image, int head, int tokens, int first) {
    const int* source = table.source + first;
    load_rows<S, S::kOthers>(queries + stage * S::kStage, qkv_rows<const T>(p, p.qkv, image, head, 0), source);
    load_rows<S, S::kOthers>(grad_out + stage * S::kStage, out_rows<const T>(p, p.grad_out, image, head), source);
    const RowStatistics from = all.from((window * p.num_heads + head) * tokens + first);
    const RowStatistics to = statistics.from(stage * S::kOthers);
    for (int t = threadIdx.x; t < S::kOthers; t += S::kThreads) {
      const bool inside = first + t < tokens;
      to.largest[t] = inside ? from.largest[t] : INFINITY;
      to.inverse_sum[t] = inside ? from.inverse_sum[t] : 0.f;
      to.delta[t] = inside ? from.delta[t] : 0.f;
    }
  }
};

// Has the queries of a block ready, and of a window's first block its keys and values too: waits for what was on its way,
// starts to bring in the block after, normalizes.
template <class S, int PairTiles>
__device__ __forceinline__ void arrive(KeysShared<S, PairTiles>& shared, const WindowLaunch& p,
                                       const RowStatistics& statistics, int64_t window, int64_t image, int head,
                                       int tokens, int query, int block, int query_blocks) {
  const int stage = block % 2;
  wait_for_copies();
  __syncthreads();  // this block of queries is here, and the one before is no longer read
  if (block + 1 < query_blocks)
    shared.load_queries(p, statistics, 1 - stage, window, image, head, tokens, query + S::kOthers);
  if (p.logit_scale) {
    if (block == 0) normalize_rows<S, S::kRows>(shared.keys, shared.inverse_keys);
    normalize_rows<S, S::kOthers>(shared.queries + stage * S::kStage, nullptr);
    __syncthreads();
  }
}

// Writes the gradients of a window's keys and values; adds those of padding.
template <class S, int PairTiles>
__device__ __forceinline__ void leave(KeysShared<S, PairTiles>& shared, const WindowLaunch& p, bool has_padding,
                                      float (&grad_keys)[S::kSlices][kTileSums],
                                      float (&grad_values)[S::kSlices][kTileSums], int64_t image, int head,
                                      const int* row_source, int warp_row) {
  float factor[2], along[2];
  finish_rows<S>(grad_keys, factor, along, p, head, shared.keys, shared.inverse_keys, warp_row);
  __syncwarp();
  write_sums<S>(shared.keys, warp_row, grad_keys, factor[0], factor[1]);
  write_sums<S>(shared.values, warp_row, grad_values, 1.f, 1.f);
  if (has_padding) add_key_padding<S>(shared.pad, grad_keys, factor, grad_values, row_source, warp_row);
  __syncthreads();
  using T = typename S::T;
  store_rows<S, S::kRows, S::kThreads>(shared.keys, qkv_rows<T>(p, p.grad_qkv, image, head, 1), row_source);
  store_rows<S, S::kRows, S::kThreads>(shared.values, qkv_rows<T>(p, p.grad_qkv, image, head, 2), row_source);
}

// What a launch of the kernel computes. PairTiles: tiles of queries whose gradients with every key stay in registers
// from window to window, for the bias; 0 = none, and then any number of queries is streamed. Gradients: of keys and
// values. 12 warps fit a multiprocessor with the 168 registers that a thread needs, but for pairs of long heads.
template <class S, int PairTiles, bool Gradients>
__global__ void __launch_bounds__(S::kThreads, PairTiles && S::kHeadDim > 32 ? 2 : 12 / S::kWarps)
    window_backward_keys_kernel(const WindowLaunch p, const Partials partials, const RowStatistics statistics,
                                int query_ranges, int64_t chunks) {
  constexpr int kUnrolled = PairTiles / S::kTiles;
  static_assert(PairTiles % S::kTiles == 0, "whole blocks of queries");
  const WindowGeometry g = known_geometry<S>(p.geometry);
  const int tokens = g.tokens(), padded = padded_tokens<S>(tokens), row_blocks = blocks_of(tokens, S::kRows);
  const BlockTask task(p, row_blocks * query_ranges, chunks);
  KeysShared<S, PairTiles> shared;
  ScoreRule rule = start_block(shared, p, g, task.head, padded);
  clear_padding<S>(shared.pad);
  const int warp_row = threadIdx.x / 32 * kTile, first_row = task.row_block % row_blocks * S::kRows;
  const int first_query = task.row_block / row_blocks * PairTiles * kTile;
  const int query_blocks = min(blocks_of(tokens - first_query, S::kOthers), kUnrolled ? kUnrolled : kMaxWindowTokens);
  const int* row_source = shared.table.source + first_row;
  float grad_bias[PairTiles ? PairTiles : 1][kTileSums];
  set_zero(grad_bias);

  for (uint32_t window = task.begin; window < task.end; ++window) {
    const uint32_t image = enter_window(shared.table, rule, g, window, padded);
    shared.load_keys(p, image, task.head, row_source);
    shared.load_queries(p, statistics, 0, window, image, task.head, tokens, first_query);
    const ScoreRows<S, true> rows(shared.table, rule, first_row + warp_row);
    typename KeysShared<S, PairTiles>::Left keys[S::kSlices], values[S::kSlices];
    float grad_keys[S::kSlices][kTileSums], grad_values[S::kSlices][kTileSums];
    set_zero(grad_keys);
    set_zero(grad_values);
    const auto step = [&](int block, auto add_pairs) {
      const int stage = block % 2, query = first_query + block * S::kOthers;
      arrive(shared, p, statistics, window, image, task.head, tokens, query, block, query_blocks);
      if (block == 0) shared.read_own(keys, values, warp_row, rule);
#pragma unroll
      for (int u = 0; u < S::kTiles; ++u) {
        float grad_scores[kTileSums];
        key_step<S, Gradients>(grad_scores, grad_keys, grad_values, rows, keys, values,
                               shared.queries + stage * S::kStage, shared.grad_out + stage * S::kStage,
                               shared.statistics.from(stage * S::kOthers), query, u);
        add_pairs(u, grad_scores);
      }
    };
    if constexpr (kUnrolled > 0) {
#pragma unroll
      for (int block = 0; block < kUnrolled; ++block)
        if (block < query_blocks)
          step(block, [&](int u, const float(&grad_scores)[kTileSums]) {
#pragma unroll
            for (int e = 0; e < kTileSums; ++e) grad_bias[block * S::kTiles + u][e] += grad_scores[e];
          });
    } else {
      for (int block = 0; block < query_blocks; ++block) step(block, [](int, const float(&)[kTileSums]) {});
    }
    if constexpr (Gradients)
      leave<S>(shared, p, partials.pad, grad_keys, grad_values, image, task.head, row_source, warp_row);
  }
  const int64_t partial = task.chunk * row_blocks * query_ranges + task.row_block;
  if (Gradients && partials.pad) write_padding<S>(p, partials, shared.pad, partial, task.head);
  if constexpr (PairTiles > 0)
    write_bias<S, true>(grad_bias, shared.pairs, partials.bias + (partial * p.num_heads + task.head) * g.table_rows(), g,
                  first_row, first_query);
}

}  // namespace swin_moe
