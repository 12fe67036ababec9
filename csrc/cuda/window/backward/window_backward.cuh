// How a backward pass is divided into launches, and where its partial sums lie in the workspace.
#pragma once

#include <algorithm>

#include "cuda/partial_sums.cuh"
#include "window_backward_keys.cuh"
#include "window_backward_once.cuh"
#include "window_backward_queries.cuh"
#include "window_backward_whole.cuh"

namespace swin_moe {

// Parts into which the windows are divided; of the shape alone, never of the device, so that sums are alike everywhere.
inline int64_t window_chunks(const WindowLaunch& p, int64_t blocks_per_window) {
  int64_t chunks = kEnoughBackwardBlocks / blocks_per_window;
  chunks = chunks < 1 ? 1 : chunks;
  return chunks < p.windows() ? chunks : p.windows();
}

inline cudaError_t add_partials(const WindowLaunch& p, const BackwardPlan& plan, const Partials& partials,
                                cudaStream_t stream) {
  const int64_t heads = p.num_heads, rows = p.geometry.table_rows(), channels = p.channels();
  cudaError_t error = sum_partials(partials.bias, plan.bias, {heads * rows, rows, 0}, p.grad_bias_table, stream);
  if (error == cudaSuccess && p.logit_scale)
    error = sum_partials(partials.logit_scale, plan.logit_scale, {heads, heads, 0}, p.grad_logit_scale, stream);
  if (error == cudaSuccess && p.grad_pad_qkv)
    error = sum_partials(partials.pad, plan.pad, {2 * channels, 2 * channels, channels}, p.grad_pad_qkv, stream);
  return error;
}

// Windows that fit a block: one launch and the sums.
template <class S>
struct WholeKernel {
  using Shape = S;
  using Shared = WholeShared<S>;
  static constexpr auto kKernel = &window_backward_whole_kernel<S>;
};
template <class S>
struct OnceKernel {
  using Shape = S;
  using Shared = OnceShared<S>;
  static constexpr auto kKernel = &window_backward_once_kernel<S>;
};

template <class Kernel>
struct WholeBackward {
  static BackwardPlan plan(const WindowLaunch& p) {
    const int64_t chunks = window_chunks(p, p.num_heads);
    return {chunks, chunks, chunks, false};
  }

  static size_t shared_bytes(const WindowLaunch& p) {
    typename Kernel::Shared shared;
    return shared.place(nullptr, p.geometry);
  }

  static cudaError_t run(const WindowLaunch& p, cudaStream_t stream) {
    const BackwardPlan parts = plan(p);
    const Workspace workspace(p, parts);
    cudaError_t error = launch(Kernel::kKernel, parts.bias * p.num_heads, Kernel::Shape::kThreads, shared_bytes(p),
                               stream, p, workspace.partials, parts.bias);
    return error == cudaSuccess ? add_partials(p, parts, workspace.partials, stream) : error;
  }
};

// Larger windows: launches for queries, keys and the bias. Q, K: the shapes of the first and of the others.
template <class Q, class K>
struct SplitBackward {
  static constexpr int kBiasTiles = 8;  // of the queries that a block of that launch takes

  struct Division {
    int64_t query_blocks, key_blocks, query_chunks, key_chunks, bias_ranges, bias_chunks;

    explicit Division(const WindowLaunch& p) {
      const int tokens = p.geometry.tokens();
      query_blocks = blocks_of(tokens, Q::kRows);
      key_blocks = blocks_of(tokens, K::kRows);
      query_chunks = window_chunks(p, p.num_heads * query_blocks);
      key_chunks = window_chunks(p, p.num_heads * key_blocks);
      bias_ranges = blocks_of(tokens, kBiasTiles * kTile);
      bias_chunks = window_chunks(p, p.num_heads * key_blocks * bias_ranges);
    }
  };

  static BackwardPlan plan(const WindowLaunch& p) {
    const Division d(p);
    return {d.bias_chunks * d.key_blocks * d.bias_ranges, d.query_chunks * d.query_blocks, d.key_chunks * d.key_blocks,
            true};
  }

  template <int Tiles>
  static size_t keys_shared_bytes(const WindowLaunch& p) {
    KeysShared<K, Tiles> shared;
    return shared.place(nullptr, p.geometry);
  }
  static size_t queries_shared_bytes(const WindowLaunch& p) {
    QueriesShared<Q> shared;
    return shared.place(nullptr, p.geometry);
  }
  static size_t shared_bytes(const WindowLaunch& p) {
    return std::max({queries_shared_bytes(p), keys_shared_bytes<0>(p), keys_shared_bytes<kBiasTiles>(p)});
  }

  template <int Tiles, bool Gradients>
  static cudaError_t run_keys(const WindowLaunch& p, const Workspace& workspace, int64_t key_blocks, int64_t ranges,
                              int64_t chunks, cudaStream_t stream) {
    return launch(window_backward_keys_kernel<K, Tiles, Gradients>, chunks * key_blocks * ranges * p.num_heads,
                  K::kThreads, keys_shared_bytes<Tiles>(p), stream, p, workspace.partials, workspace.statistics,
                  int(ranges), chunks);
  }

  static cudaError_t run(const WindowLaunch& p, cudaStream_t stream) {
    const Division d(p);
    const BackwardPlan parts = plan(p);
    const Workspace workspace(p, parts);
    cudaError_t error =
        launch(window_backward_queries_kernel<Q>, d.query_chunks * d.query_blocks * p.num_heads, Q::kThreads,
               queries_shared_bytes(p), stream, p, workspace.partials, workspace.statistics, d.query_chunks);
    if (error == cudaSuccess)
      error = run_keys<0, true>(p, workspace, d.key_blocks, 1, d.key_chunks, stream);
    if (error == cudaSuccess)
      error = run_keys<kBiasTiles, false>(p, workspace, d.key_blocks, d.bias_ranges, d.bias_chunks, stream);
    return error == cudaSuccess ? add_partials(p, parts, workspace.partials, stream) : error;
  }
};

}  // namespace swin_moe
