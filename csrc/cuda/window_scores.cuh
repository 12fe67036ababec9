// From products of queries and keys to scores, with the position bias and the mask of the seam, and their exponentials.
#pragma once

#include "window_block.cuh"

namespace swin_moe {

// Scores are in units in which their exponential is cheap: of log2, so that a factor that is there anyhow takes the
// conversion. float32 keeps them as they are, since every rounding counts there.
template <class T>
struct ScoreUnit {
  static constexpr float kUnit = 1.4426950408889634f;  // log2 e
  static __device__ __forceinline__ float exponential(float score) { return exp2_fast(score); }
};
template <>
struct ScoreUnit<float> {
  static constexpr float kUnit = 1.f;
  static __device__ __forceinline__ float exponential(float score) { return expf(score); }
};

// How one head scores in one window.
struct ScoreRule {
  float factor;       // on products
  float mask;         // across the seam
  bool crosses;       // whether this window has a seam
  int tokens;

  __device__ __forceinline__ ScoreRule(const WindowLaunch& p, int tokens_, int head, float unit)
      : factor((p.logit_scale ? p.logit_scale[head] : p.scale) * unit), mask(p.mask_value * unit), crosses(false),
        tokens(tokens_) {}
};

// Which head, rows and windows a block works on; heads vary fastest, so that neighbours read the same lines.
struct BlockTask {
  int head, row_block;
  int64_t chunk, begin, end;         // windows, counted over all images

  __device__ __forceinline__ BlockTask(const WindowLaunch& p, int row_blocks, int64_t chunks) {
    const unsigned index = blockIdx.x;
    head = index % p.num_heads;
    row_block = index / p.num_heads % row_blocks;
    chunk = index / p.num_heads / row_blocks;
    begin = p.windows() * chunk / chunks;
    end = p.windows() * (chunk + 1) / chunks;
  }
};

// Starts a block: lays out its shared memory, spreads the position bias of its head, and returns how that head scores.
template <class Shared>
__device__ __forceinline__ ScoreRule start_block(Shared& shared, const WindowLaunch& p, const WindowGeometry& g,
                                                 int head, int padded) {
  constexpr float kUnit = ScoreUnit<typename Shared::T>::kUnit;
  shared.place(shared_memory(), g);
  shared.table.fill_head(p, g, head, padded, kUnit);
  return ScoreRule(p, g.tokens(), head, kUnit);
}

// Moves a block on to a window, counted over all images: its tokens, and whether it has a seam. Returns the image.
__device__ __forceinline__ int64_t enter_window(TokenTable& table, ScoreRule& rule, const WindowGeometry& g,
                                                int64_t window, int padded) {
  const int64_t place = window % g.windows();
  rule.crosses = crosses_seam(g, place);
  __syncthreads();  // the rows and tokens of the window before are no longer read
  table.fill_window(g, place, padded);
  __syncthreads();
  return window / g.windows();
}

// Scores of 16 rows, which are queries, or keys where Transposed; lane-wise as Fragments' sums.
template <bool Transposed>
struct ScoreRows {
  const TokenTable& table;
  const ScoreRule& rule;
  int offset[2], side[2];

  __device__ __forceinline__ ScoreRows(const TokenTable& table_, const ScoreRule& rule_, int first_row)
      : table(table_), rule(rule_) {
    const Lane lane;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int token = first_row + lane.row + 8 * h;
      offset[h] = Transposed ? table.centre - table.offset[token] : table.centre + table.offset[token];
      side[h] = table.side[token];
    }
  }

  // Columns first_column.. ; minus infinity for keys that are no tokens.
  __device__ __forceinline__ void finish(float (&sums)[kTileSums], int first_column) const {
    const Lane lane;
    const bool partial = !Transposed && first_column + kTile > rule.tokens;
#pragma unroll
    for (int e = 0; e < kTileSums; ++e) {
      const int token = first_column + lane.column_of(e), row = e / 2 % 2;
      const int other = table.offset[token];
      float score = sums[e] * rule.factor + table.bias[Transposed ? offset[row] + other : offset[row] - other];
      if (rule.crosses && table.side[token] != side[row]) score += rule.mask;
      sums[e] = partial && token >= rule.tokens ? -INFINITY : score;
    }
  }
};

// The running softmax of two rows of a lane; a row is spread over four lanes.
template <class T>
struct RunningSoftmax {
  float largest[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.f, 0.f};          // of this lane only

  // Turns scores into exponentials of score - largest and returns in `shrink` what earlier sums have to be multiplied
  // with.
  template <int Tiles>
  __device__ __forceinline__ void update(float (&scores)[Tiles][kTileSums], float (&shrink)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float most = largest[h];
#pragma unroll
      for (int u = 0; u < Tiles; ++u)
#pragma unroll
        for (int e = 0; e < kTileSums; ++e)
          if (e / 2 % 2 == h) most = fmaxf(most, scores[u][e]);
      most = quad_max(most);
      shrink[h] = ScoreUnit<T>::exponential(largest[h] - most);
      largest[h] = most;
      sum[h] *= shrink[h];
#pragma unroll
      for (int u = 0; u < Tiles; ++u)
#pragma unroll
        for (int e = 0; e < kTileSums; ++e)
          if (e / 2 % 2 == h) {
            scores[u][e] = ScoreUnit<T>::exponential(scores[u][e] - most);
            sum[h] += scores[u][e];
          }
    }
  }

  __device__ __forceinline__ float total(int h) const { return quad_sum(sum[h]); }
};

// sums[u] += left rows times the transposed rows first.. + 16 u of a matrix: products of queries and keys.
template <class S, int Tiles>
__device__ __forceinline__ void multiply_rows(float (&sums)[Tiles][kTileSums],
                                              const typename Fragments<typename S::T>::Left (&left)[S::kSlices],
                                              const typename S::T* matrix, int first) {
  using F = Fragments<typename S::T>;
#pragma unroll
  for (int u = 0; u < Tiles; ++u)
#pragma unroll
    for (int s = 0; s < S::kSlices; ++s)
      F::multiply(sums[u], left[s], F::right_of_rows(matrix, S::kPitch, first + u * kTile, s * kTile));
}

// sums (16 x head_dim) += weights (16 x 16) times rows first.. of a matrix.
template <class S>
__device__ __forceinline__ void multiply_weights(float (&sums)[S::kSlices][kTileSums],
                                                 const float (&weights)[kTileSums], const typename S::T* matrix,
                                                 int first) {
  using F = Fragments<typename S::T>;
  const auto left = F::left(weights);
#pragma unroll
  for (int s = 0; s < S::kSlices; ++s)
    F::multiply(sums[s], left, F::right_of_columns(matrix, S::kPitch, first, s * kTile));
}

template <class S>
__device__ __forceinline__ void load_left(typename Fragments<typename S::T>::Left (&left)[S::kSlices],
                                          const typename S::T* matrix, int row) {
#pragma unroll
  for (int s = 0; s < S::kSlices; ++s) left[s] = Fragments<typename S::T>::left(matrix, S::kPitch, row, s * kTile);
}

template <int Tiles>
__device__ __forceinline__ void set_zero(float (&sums)[Tiles][kTileSums]) {
#pragma unroll
  for (int u = 0; u < Tiles; ++u) set_zero(sums[u]);
}

// Writes a warp's 16 rows of sums to shared memory, each row times its factor.
template <class S>
__device__ __forceinline__ void write_sums(typename S::T* tile, int row, const float (&sums)[S::kSlices][kTileSums],
                                           float upper, float lower) {
  const Lane lane;
#pragma unroll
  for (int s = 0; s < S::kSlices; ++s)
#pragma unroll
    for (int e = 0; e < kTileSums; e += 2) {
      const float factor = e / 2 % 2 ? lower : upper;
      store_pair(tile + (row + lane.row_of(e)) * S::kPitch + s * kTile + lane.column_of(e), sums[s][e] * factor,
                 sums[s][e + 1] * factor);
    }
}

}  // namespace swin_moe
