// From products of queries and keys to scores, with the position bias and the mask of the seam, and their exponentials.
#pragma once

#include "window_rows.cuh"

namespace swin_moe {

// Sums start as the bias over the factor, so that products need one factor and nothing added to become scores; then
// scores are in units in which their exponential is cheap: of log2, or of e in float32, where every rounding counts.
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

// Factors nearer to zero count as this one: their products vanish beside any bias, and the bias can be divided by it.
constexpr float kLeastFactor = 1e-30f;

// How one head scores in one window.
struct ScoreRule {
  float factor;       // of sums to scores; positive, so that the largest sum is the largest score
  float mask;         // across the seam, in the units of sums
  bool negative;      // the factor of products is, and one of their sides has to change its sign
  bool crosses;       // whether this window has a seam
  int tokens;

  __device__ __forceinline__ ScoreRule(const WindowLaunch& p, int tokens_, int head, float unit)
      : crosses(false), tokens(tokens_) {
    const float given = p.logit_scale ? p.logit_scale[head] : p.scale, size = fmaxf(fabsf(given), kLeastFactor);
    factor = size * unit;
    mask = p.mask_value / size;
    negative = given < 0.f;
  }
};

// Which head, rows and windows a block works on; heads vary fastest, so that neighbours read the same lines.
struct BlockTask {
  int head, row_block, chunk;
  uint32_t begin, end;               // windows, counted over all images

  __device__ __forceinline__ BlockTask(const WindowLaunch& p, int row_blocks, int64_t chunks) {
    const unsigned index = blockIdx.x;
    head = index % p.num_heads;
    row_block = index / p.num_heads % row_blocks;
    chunk = index / p.num_heads / row_blocks;
    begin = uint32_t(p.windows() * chunk / chunks);
    end = uint32_t(p.windows() * (chunk + 1) / chunks);
  }
};

// Starts a block: lays out its shared memory, spreads the position bias of its head, and returns how that head scores.
template <class Shared>
__device__ __forceinline__ ScoreRule start_block(Shared& shared, const WindowLaunch& p, const WindowGeometry& g,
                                                 int head, int padded) {
  shared.place(shared_memory(), g);
  const ScoreRule rule(p, g.tokens(), head, ScoreUnit<typename Shared::T>::kUnit);
  shared.table.fill_head(p, g, head, padded, ScoreUnit<typename Shared::T>::kUnit / rule.factor);
  return rule;
}

// Moves a block on to a window, counted over all images: its tokens, and whether it has a seam. Returns the image.
__device__ __forceinline__ uint32_t enter_window(TokenTable& table, ScoreRule& rule, const WindowGeometry& g,
                                                 uint32_t window, int padded) {
  const uint32_t windows = uint32_t(g.rows) * uint32_t(g.columns), image = window / windows;
  const WindowPlace<uint32_t> place(g, window - image * windows);
  rule.crosses = crosses_seam(g, place);
  __syncthreads();  // the rows and tokens of the window before are no longer read
  table.fill_window(g, place, padded);
  __syncthreads();
  return image;
}

// Rows of the bias table by columns of tiles. In a window that is a constant, tokens 8 a + b + 2 (l % 4), b = 0 or 1, of
// a lane l lie at constants from one another, but that some lanes' have wrapped into the next row of the window.
template <class S>
struct TableColumns {
  static constexpr int kWidth = S::kWindow;
  // A block of columns has to begin a row of the window.
  static constexpr bool kConstant = kWidth >= 7 && (S::kOthers % kWidth == 0 || kWidth * kWidth <= S::kOthers);
  static constexpr bool kNoneBeyond = kWidth > 0 && kWidth * kWidth % S::kOthers == 0;  // the last block is full
  // Whether columns column.. + 8 of a block can be tokens.
  static constexpr bool used(int column) { return kWidth == 0 || kWidth * kWidth > S::kOthers || column < kWidth * kWidth; }

  // What is the same in all lanes; columns in [0, 8) + lane.column of the block.
  static __device__ __forceinline__ int common(int column) {
    return column / 8 * 8 / kWidth * (2 * kWidth - 1) + column / 8 * 8 % kWidth + column % 8;
  }
  static __device__ __forceinline__ int wrapped(int column, int lane_column) {
    const int left = (kWidth - column / 8 * 8 % kWidth - column % 8 + 1) / 2 * 2;  // lanes' columns are even
    if (left <= 0 || left >= 8) return left <= 0 ? kWidth - 1 : 0;
    return ((lane_column - left) >> 31 & (1 - kWidth)) + kWidth - 1;  // no choice, so that lanes have it as a number
  }
};

// Scores of 16 rows, which are queries, or keys where Transposed; lane-wise as Fragments' sums.
template <class S, bool Transposed>
struct ScoreRows {
  using Columns = TableColumns<S>;
  static constexpr int kDirection = Transposed ? 1 : -1;  // in the bias table, with the columns
  const TokenTable& table;
  const ScoreRule& rule;
  const float* bias[2];  // of the lane's rows with a column at offset 0; where Columns::kConstant, its own first column
  int side[2];

  __device__ __forceinline__ ScoreRows(const TokenTable& table_, const ScoreRule& rule_, int first_row)
      : table(table_), rule(rule_) {
    const Lane lane;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int token = first_row + lane.row + 8 * h;
      bias[h] = table.bias + (table.centre - kDirection * table.offset[token]);
      if (Columns::kConstant) bias[h] += kDirection * lane.column;
      side[h] = table.side[token];
    }
  }

  // The bias of columns block + tile * 16..; minus infinity for what is no token. A block begins at a multiple of
  // S::kOthers.
  __device__ __forceinline__ void start(float (&sums)[kTileSums], int block, int tile) const {
    const Lane lane;
#pragma unroll
    for (int e = 0; e < kTileSums; ++e) {
      const int column = tile * kTile + lane.column_of(e) - lane.column, token = block + column + lane.column;
      const bool inside = Columns::kNoneBeyond || token < rule.tokens;
      const float* row = bias[e / 2 % 2];
      if constexpr (Columns::kConstant) {
        row += kDirection * (block / Columns::kWidth * (2 * Columns::kWidth - 1));
        row += kDirection * Columns::wrapped(column, lane.column);
        sums[e] = inside ? row[kDirection * Columns::common(column)] : -INFINITY;
      } else {
        sums[e] = inside ? row[kDirection * table.offset[token]] : -INFINITY;
      }
    }
  }

  // Adds the mask; columns are those from `first` on.
  __device__ __forceinline__ void mask(float (&sums)[kTileSums], int first) const {
    const Lane lane;
#pragma unroll
    for (int e = 0; e < kTileSums; ++e)
      if (table.side[first + lane.column_of(e)] != side[e / 2 % 2]) sums[e] += rule.mask;
  }
};

// The running softmax of two rows of a lane; a row is spread over four lanes.
template <class S>
struct RunningSoftmax {
  using T = typename S::T;
  float factor;                       // of sums to scores
  float largest[2];                   // sum, not score
  RowSum<T> sum[2];                   // of exponentials, of this lane only

  __device__ __forceinline__ explicit RunningSoftmax(const ScoreRule& rule) : factor(rule.factor) {}

  // Turns sums into exponentials of score - largest score and returns in `shrink` what earlier ones have to be
  // multiplied with; there are none at first.
  template <int Tiles>
  __device__ __forceinline__ void update(float (&scores)[Tiles][kTileSums], float (&shrink)[2], bool first) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float most = first ? scores[0][2 * h] : largest[h];
#pragma unroll
      for (int u = 0; u < Tiles; ++u)
#pragma unroll
        for (int e = 0; e < kTileSums; ++e)
          if (e / 2 % 2 == h && used(u, e)) most = fmaxf(most, scores[u][e]);
      most = quad_max(most);
      shrink[h] = first ? 0.f : ScoreUnit<T>::exponential((largest[h] - most) * factor);
      largest[h] = most;
      if (first)
        sum[h] = {};
      else
        sum[h].shrink(shrink[h]);
      const float less = -most * factor;
#pragma unroll
      for (int u = 0; u < Tiles; ++u)
#pragma unroll
        for (int e = 0; e < kTileSums; ++e)
          if (e / 2 % 2 == h) {
            scores[u][e] = used(u, e) ? ScoreUnit<T>::exponential(fmaf(scores[u][e], factor, less)) : 0.f;
            if (used(u, e)) sum[h].add(scores[u][e]);
          }
    }
  }

  static __device__ constexpr bool used(int tile, int e) {
    return TableColumns<S>::used(tile * kTile + e / 4 * 8);
  }
  __device__ __forceinline__ RowNumber<T> inverse_total(int h) const { return reciprocal(quad_sum(sum[h])); }
  __device__ __forceinline__ float largest_score(int h) const { return largest[h] * factor; }
  // Of the sum of exponentials of whole scores, to the base in whose units they are; 16-bit elements only.
  __device__ __forceinline__ float log_total(int h) const { return largest_score(h) + log2f(quad_sum(sum[h]).value()); }
};

// Where the products of 16 rows with columns begin, of `Tiles` tiles of a block: the bias and the mask.
template <int Tiles, class Rows>
__device__ __forceinline__ void start_scores(float (&sums)[Tiles][kTileSums], const Rows& rows, int block,
                                             int first_tile) {
#pragma unroll
  for (int u = 0; u < Tiles; ++u) rows.start(sums[u], block, first_tile + u);
  if (!rows.rule.crosses) return;
#pragma unroll
  for (int u = 0; u < Tiles; ++u) rows.mask(sums[u], block + (first_tile + u) * kTile);
}

// sums[u] += left rows times the transposed rows first.. + 16 u of a matrix: products of queries and keys.
template <class S, int Tiles>
__device__ __forceinline__ void multiply_rows(float (&sums)[Tiles][kTileSums],
                                              const typename Fragments<typename S::T>::Left (&left)[S::kSlices],
                                              const typename S::T* matrix, int first) {
  using F = Fragments<typename S::T>;
#pragma unroll
  for (int u = 0; u < Tiles; ++u)
#pragma unroll
    for (int s = 0; s < S::kSlices; ++s) {
      const auto right = F::right_of_rows(matrix, S::kPitch, first + u * kTile, s * kTile);
      F::multiply(sums[u], left[s], right, TableColumns<S>::used(first + u * kTile + 8));
    }
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

// Queries or keys for scores: with the sign of the factor.
template <class S>
__device__ __forceinline__ void load_left(typename Fragments<typename S::T>::Left (&left)[S::kSlices],
                                          const typename S::T* matrix, int row, const ScoreRule& rule) {
  load_left<S>(left, matrix, row);
  if (!rule.negative) return;
#pragma unroll
  for (int s = 0; s < S::kSlices; ++s) Fragments<typename S::T>::negate(left[s]);
}

template <int Tiles>
__device__ __forceinline__ void set_zero(float (&sums)[Tiles][kTileSums]) {
#pragma unroll
  for (int u = 0; u < Tiles; ++u) set_zero(sums[u]);
}

// Writes a warp's 16 rows of sums to shared memory, each row times its factor.
template <class S, int Slices>
__device__ __forceinline__ void write_sums(typename S::T* tile, int row, const float (&sums)[Slices][kTileSums],
                                           float upper, float lower) {
  const Lane lane;
#pragma unroll
  for (int s = 0; s < Slices; ++s)
#pragma unroll
    for (int e = 0; e < kTileSums; e += 2) {
      const float factor = e / 2 % 2 ? lower : upper;
      store_pair(tile + (row + lane.row_of(e)) * S::kPitch + s * kTile + lane.column_of(e), sums[s][e] * factor,
                 sums[s][e + 1] * factor);
    }
}

}  // namespace swin_moe
