// Forward of window attention: a block holds 16 queries per warp and streams the keys and values of their windows.
#pragma once

#include "window_scores.cuh"

namespace swin_moe {

template <class S>
struct ForwardShared {
  using T = typename S::T;
  TokenTable table;
  T *queries, *keys, *values;        // keys and values: in stages

  // With one block of keys there is nothing to bring in ahead.
  SWIN_MOE_BOTH size_t place(unsigned char* base, const WindowGeometry& g) {
    SharedPieces pieces{base};
    const int stages = g.tokens() > S::kOthers ? 2 : 1;
    table.place(pieces, g, padded_tokens<S>(g.tokens()));
    queries = pieces.take<T>(S::kRows * S::kPitch);
    keys = pieces.take<T>(stages * S::kStage);
    values = pieces.take<T>(stages * S::kStage);
    return pieces.used;
  }

  // Starts to bring in the keys from `first` on, and their values.
  __device__ __forceinline__ void load_keys(const WindowLaunch& p, int64_t image, int head, int stage, int first) {
    T* const tiles[] = {keys + stage, values + stage};
    load_rows<S, S::kOthers>(tiles, qkv_rows<const T>(p, p.qkv, image, head, 1), table.source + first);
  }
};

// One block of keys: scores, softmax, values.
template <class S>
__device__ __forceinline__ void attend(float (&out)[S::kSlices][kTileSums], RunningSoftmax<S>& softmax,
                                       const ScoreRows<S, false>& rows,
                                       const typename Fragments<typename S::T>::Left (&queries)[S::kSlices],
                                       const typename S::T* keys, const typename S::T* values, int first_key) {
  float scores[S::kTiles][kTileSums], shrink[2];
  start_scores(scores, rows, first_key, 0);
  multiply_rows<S>(scores, queries, keys, 0);
  softmax.update(scores, shrink, first_key == 0);
  if (first_key > 0) {
#pragma unroll
    for (int s = 0; s < S::kSlices; ++s)
#pragma unroll
      for (int e = 0; e < kTileSums; ++e) out[s][e] *= shrink[e / 2 % 2];
  }
#pragma unroll
  for (int u = 0; u < S::kTiles; ++u) multiply_weights<S>(out, scores[u], values, u * kTile);
}

// What a backward pass in one piece wants of 16 rows of scores, of which row `rows` is the window's first.
template <class S>
__device__ __forceinline__ void leave_log_sums(const WindowLaunch& p, const RunningSoftmax<S>& softmax, int64_t rows,
                                               int first, int tokens) {
  if constexpr (sizeof(typename S::T) == 2) {
    if (!p.log_sums) return;
    const Lane lane;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float total = softmax.log_total(h);
      const int query = first + lane.row + 8 * h;
      if (lane.column == 0 && query < tokens) p.log_sums[rows + query] = total;
    }
  }
}

// Least blocks for a multiprocessor where the compiler would spill to fit one more.
template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kWarps > 8 ? 2 : S::kWindow > 0 ? 0 : 6 - S::kSlices)
    window_forward_kernel(const WindowLaunch p, int64_t chunks) {
  using T = typename S::T;
  const WindowGeometry g = known_geometry<S>(p.geometry);
  const int tokens = g.tokens(), padded = padded_tokens<S>(tokens), key_blocks = blocks_of(tokens, S::kOthers);
  const BlockTask task(p, blocks_of(tokens, S::kRows), chunks);
  ForwardShared<S> shared;
  ScoreRule rule = start_block(shared, p, g, task.head, padded);
  const int warp_row = threadIdx.x / 32 * kTile, first_row = task.row_block * S::kRows;
  const int* row_source = shared.table.source + first_row;

#pragma unroll 1
  for (uint32_t window = task.begin; window < task.end; ++window) {
    const uint32_t image = enter_window(shared.table, rule, g, window, padded);
    load_rows<S, S::kRows>(shared.queries, qkv_rows<const T>(p, p.qkv, image, task.head, 0), row_source);
    shared.load_keys(p, image, task.head, 0, 0);

    const ScoreRows<S, false> rows(shared.table, rule, first_row + warp_row);
    typename Fragments<T>::Left queries[S::kSlices];
    RunningSoftmax<S> softmax(rule);
    float out[S::kSlices][kTileSums];
    set_zero(out);
    for (int block = 0; block < key_blocks; ++block) {
      const int stage = block % 2 * S::kStage, first_key = block * S::kOthers;
      wait_for_copies();
      __syncthreads();  // this block of keys is here, and the one before is no longer read
      if (block + 1 < key_blocks) shared.load_keys(p, image, task.head, S::kStage - stage, first_key + S::kOthers);
      if (p.logit_scale) {
        if (block == 0) normalize_rows<S, S::kRows>(shared.queries, nullptr);
        normalize_rows<S, S::kOthers>(shared.keys + stage, nullptr);
        __syncthreads();
      }
      if (block == 0) load_left<S>(queries, shared.queries, warp_row, rule);
      attend<S>(out, softmax, rows, queries, shared.keys + stage, shared.values + stage, first_key);
    }
    // The queries of this warp are in registers by now, so its rows of them take the result.
    __syncwarp();
    write_sums<S>(shared.queries, warp_row, out, softmax.inverse_total(0).high, softmax.inverse_total(1).high);
    __syncwarp();
    store_rows<S, kTile, 32>(shared.queries + warp_row * S::kPitch, out_rows<T>(p, p.out, image, task.head),
                             row_source + warp_row);
    // 32 bits times 32 bits, which is one instruction.
    const int64_t window_row = int64_t(uint64_t(window) * uint32_t(p.num_heads * tokens)) + task.head * tokens;
    leave_log_sums<S>(p, softmax, window_row, first_row + warp_row, tokens);
  }
}

template <class S>
size_t forward_shared_bytes(const WindowLaunch& p) {
  ForwardShared<S> shared;
  return shared.place(nullptr, p.geometry);
}

template <class S>
cudaError_t window_forward(const WindowLaunch& p, cudaStream_t stream) {
  const int64_t row_blocks = blocks_of(p.geometry.tokens(), S::kRows);
  // A block takes several windows where there are many: the bias of its head is then read once for all of them.
  constexpr int64_t kMostWindows = 8;
  int64_t per_block = p.windows() * p.num_heads * row_blocks / (4 * kEnoughBlocks);
  per_block = per_block < 1 ? 1 : per_block > kMostWindows ? kMostWindows : per_block;
  const int64_t chunks = (p.windows() + per_block - 1) / per_block;
  return launch(window_forward_kernel<S>, chunks * row_blocks * p.num_heads, S::kThreads,
                forward_shared_bytes<S>(p), stream, p, chunks);
}

}  // namespace swin_moe
