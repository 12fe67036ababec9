// Rows of scores that stay in registers from the product of queries and keys to their weights: where there are 32
// registers and rows are short enough. Otherwise they are written and read again between the steps of a softmax.
//
// Exponentials are powers of two: factor, bias and mask have been multiplied by log2(e) before.
//
// Shape legend as in window_scores.h.
#pragma once

#include "window_scores.h"

namespace swin_moe {
namespace SWIN_MOE_CAPABILITY {

constexpr float kLog2E = 1.44269504088896341f;
constexpr int kMostResident = 10;  // vectors of a row

#if defined(SWIN_MOE_HAS_AVX512_BF16)
template <class Operand>
constexpr bool kHasResident = std::is_same_v<typename Operand::Sum, float>;

template <class Operand>
void keep_in_registers(Sizes<Operand>& n) {
  n.resident = n.rows_of_vectors() <= kMostResident;
  if (n.resident) n.block = std::min(round_up(n.tokens, 2), 24);
}

// Writes rows of the bias with the mask, which is added across the seam.
SWIN_MOE_INLINE const float* masked_bias(const WindowTokens<float>& tokens, const float* bias, int padded_tokens,
                                         double mask_value, int first, int rows, float* masked) {
  const float value = float(mask_value) * kLog2E;
  for (int i = 0; i < rows; ++i)
    for (int c = 0; c < padded_tokens; c += kLanes<float>) {
      const Vector<float> x = load(bias + i * padded_tokens + c);
      store(masked + i * padded_tokens + c, load(tokens.side + c) == tokens.side[first + i] ? x : x + value);
    }
  return masked;
}

// 2^x of kCount vectors, x above -127, to 2 parts in 1e7, or to 3 in 1e6 of what is rounded to bfloat16 then; NaN stays.
//
// 2^x = 2^n 2^r with n the integer next to x; 2^r is a polynomial, fitted for the smallest largest relative error. The
// vectors go step by step together: one alone waits for each of its steps.
template <bool kNarrow, int kCount>
SWIN_MOE_INLINE void powers_of_two(Vector<float>* x) {
  using Bits = Vector<uint32_t>;
  constexpr float kWide[] = {1.326472731e-3f, 9.671512991e-3f, 5.550733581e-2f, 2.402224243e-1f, 6.931470037e-1f, 1.0f};
  constexpr float kShort[] = {9.582852945e-3f, 5.590642616e-2f, 2.402409911e-1f, 6.931241751e-1f, 1.0f};
  constexpr int kDegree = kNarrow ? 4 : 5;
  const float rounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  Vector<float> shifted[kCount], p[kCount];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) shifted[i] = x[i] + rounder;
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) p[i] = shifted[i] - rounder;
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) x[i] -= p[i];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) p[i] = broadcast(kNarrow ? kShort[0] : kWide[0]);
#pragma GCC unroll 8
  for (int step = 1; step <= kDegree; ++step)
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) p[i] = p[i] * x[i] + (kNarrow ? kShort[step] : kWide[step]);
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i)
    x[i] = (Vector<float>)((Bits)p[i] + ((Bits)shifted[i] << 23));  // the rounder's own bits fall out at the top
}

// Hands 2^(score - largest) of kVectors vectors to put(index, vector) and adds them to `sum`; 2^-126 stands for less.
template <bool kNarrow, int kVectors, class Put>
SWIN_MOE_INLINE void row_of_powers(const float* scores, float largest, int index, Put put, Vector<float>& sum) {
  constexpr int kCount = std::min(kVectors, kVectors % 5 == 0 ? 5 : 4);
  const Vector<float> least = broadcast(-126.0f);
  Vector<float> x[kCount];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) x[i] = load(scores + (index + i) * kLanes<float>) - largest;
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) x[i] = larger<float>(least, x[i]);
  powers_of_two<kNarrow, kCount>(x);
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) put(index + i, x[i]);
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) sum += x[i];
  if constexpr (kVectors > kCount) row_of_powers<kNarrow, kVectors - kCount>(scores, largest, index + kCount, put, sum);
}

// Queries of one head and what turns their products with its keys into weights.
template <class Operand>
struct ResidentRows {
  using F = typename Operand::Factor;
  const F* queries;            // (rows, query_row)
  int64_t query_row;
  const F* keys;               // (depth, Np), transposed
  int depth;
  float factor;                // of all
  const float* query_factors;  // (rows), or null: 1
  const float* key_factors;    // (Np), or null: 1
  const float* bias;           // (rows, Np), may be where scores are written
  float* scores;               // (rows, Np)
  F* weights;                  // (rows, Np / kPerFactor), gets exp(score - largest of the row); may be `scores`
  float* sums;                 // (rows), gets the largest scores, and then the sums of weights
  RowsAhead ahead;             // asked for one row after the other
  int first;                   // number of the first row
};

// Scores of kRows rows from row `first` on, and the largest of each.
template <class Operand, int kRows, int kVectors, bool kCosine>
SWIN_MOE_INLINE void resident_tile(const ResidentRows<Operand>& p, int first) {
  using F = typename Operand::Factor;
  constexpr int kLane = kLanes<float>, kPadded = kVectors * kLane;
  const float *bias = p.bias + int64_t(first) * kPadded, *key_factors = p.key_factors;  // stores may change p otherwise
  float* scores = p.scores + int64_t(first) * kPadded;
  const float factor = p.factor;
  Vector<float> x[kRows][kVectors];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 16
    for (int n = 0; n < kVectors; ++n) x[m][n] = Vector<float>{};
  const F *query = p.queries + first * p.query_row, *keys = p.keys;
  for (int k = 0; k < p.depth; ++k, ++query, keys += kPadded) {
    if constexpr (kRows < kVectors) {  // the factors of fewer are kept
      F factors[kRows];
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) factors[m] = query[m * p.query_row];
#pragma GCC unroll 16
      for (int n = 0; n < kVectors; ++n) {
        const Vector<F> key = load(keys + n * kLane);
#pragma GCC unroll 16
        for (int m = 0; m < kRows; ++m) x[m][n] = Operand::multiply_add(factors[m], key, x[m][n]);
      }
    } else {
      Vector<F> key[kVectors];
#pragma GCC unroll 16
      for (int n = 0; n < kVectors; ++n) key[n] = load(keys + n * kLane);
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 16
        for (int n = 0; n < kVectors; ++n) x[m][n] = Operand::multiply_add(query[m * p.query_row], key[n], x[m][n]);
    }
  }
  float largest[kRows];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
    const float of_row = kCosine ? factor * p.query_factors[first + m] : factor;
    Vector<float> most = broadcast(float(kNoToken));
#pragma GCC unroll 16
    for (int n = 0; n < kVectors; ++n) {
      const int at = m * kPadded + n * kLane;
      if constexpr (kCosine) x[m][n] *= load(key_factors + n * kLane);
      x[m][n] = x[m][n] * of_row + load(bias + at);
      store(scores + at, x[m][n]);
      most = larger<float>(most, x[m][n]);
    }
    largest[m] = largest_lane<float>(most);
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) p.sums[first + m] = largest[m];
}

// Rows of a tile: what registers hold beside the factors that are kept.
template <int kVectors>
constexpr int kResidentRows = kVectors <= 4 ? 6 : kVectors == 5 ? 5 : kVectors <= 7 ? 4 : kVectors <= 9 ? 3 : 2;

template <class Operand, int kVectors, bool kCosine>
__attribute__((noinline)) void resident_rows(const ResidentRows<Operand>& p, int rows) {
  constexpr int kMost = kResidentRows<kVectors>, kHalf = kMost / 2;
  int row = 0;
  for (; row + kMost <= rows; row += kMost) resident_tile<Operand, kMost, kVectors, kCosine>(p, row);
  if constexpr (kHalf > 1)
    for (; row + kHalf <= rows; row += kHalf) resident_tile<Operand, kHalf, kVectors, kCosine>(p, row);
  for (; row < rows; ++row) resident_tile<Operand, 1, kVectors, kCosine>(p, row);
  for (row = 0; row < rows; ++row) {
    auto* weights = p.weights + row * (kVectors * kLanes<float> / Operand::kPerFactor);
    Vector<float> sum = {};
    row_of_powers<Operand::kPerFactor == 2, kVectors>(
        p.scores + row * kVectors * kLanes<float>, p.sums[row], 0,
        [&](int index, Vector<float> x) __attribute__((always_inline)) { Operand::put_weight(weights, index, x); }, sum);
    p.sums[row] = sum_of_lanes<float>(sum);
    RowsAhead::ask(p.ahead, p.first + row);
  }
}

// Writes the weights of rows that are `vectors` <= kMostResident long.
template <class Operand, int kVectors = kMostResident>
void resident_weights(const ResidentRows<Operand>& p, int vectors, int rows) {
  if (vectors == kVectors)
    p.key_factors ? resident_rows<Operand, kVectors, true>(p, rows) : resident_rows<Operand, kVectors, false>(p, rows);
  else if constexpr (kVectors > 1)
    resident_weights<Operand, kVectors - 1>(p, vectors, rows);
}

#else
template <class Operand>
constexpr bool kHasResident = false;
#endif

}  // namespace SWIN_MOE_CAPABILITY
}  // namespace swin_moe
