// Matrix products on tiles that fit in registers.
//
// Depths count factors, see operand.h.
#pragma once

#include "operand.h"

namespace swin_moe {
namespace SWIN_MOE_CAPABILITY {

// A matrix whose element (row, step) lies at data[row * row_stride + step * step_stride].
template <class F>
struct Strided {
  const F* data;
  int64_t row_stride, step_stride;
};

// A matrix in rows of whole vectors.
template <class T>
struct Rows {
  T* data;
  int64_t stride;
};

// sum[kRows x kVectors] (+)= a[kRows x depth] b[depth x kVectors], all sums in registers.
template <class Operand, int kRows, int kVectors, bool kAccumulate>
SWIN_MOE_INLINE void tile_product(int depth, const typename Operand::Factor* a, int64_t a_row, int64_t a_step,
                                  const typename Operand::Factor* b, int64_t b_row, typename Operand::Sum* sum,
                                  int64_t sum_row) {
  using F = typename Operand::Factor;
  using A = typename Operand::Sum;
  Vector<A> sums[kRows][kVectors];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 16
    for (int n = 0; n < kVectors; ++n)
      sums[m][n] = kAccumulate ? load(sum + m * sum_row + n * kLanes<A>) : Vector<A>{};
  for (int k = 0; k < depth; ++k) {
    Vector<F> factors[kVectors];
#pragma GCC unroll 16
    for (int n = 0; n < kVectors; ++n) factors[n] = load(b + k * b_row + n * kLanes<F>);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      F factor = a[m * a_row + k * a_step];
#pragma GCC unroll 16
      for (int n = 0; n < kVectors; ++n) sums[m][n] = Operand::multiply_add(factor, factors[n], sums[m][n]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 16
    for (int n = 0; n < kVectors; ++n) store(sum + m * sum_row + n * kLanes<A>, sums[m][n]);
}

// Rows of a tile: what the registers hold beside a row of factors and one broadcast.
template <int kVectors>
constexpr int kTileRows = std::min(12, (SWIN_MOE_VECTOR_REGISTERS - kVectors - 1) / kVectors);

// The tile of `rows` <= kRows rows.
template <class Operand, int kRows, int kVectors, bool kAccumulate, class... Arguments>
SWIN_MOE_INLINE void tile_of_rows(int rows, Arguments... arguments) {
  if (rows == kRows)
    tile_product<Operand, kRows, kVectors, kAccumulate>(arguments...);
  else if constexpr (kRows > 1)
    tile_of_rows<Operand, kRows - 1, kVectors, kAccumulate>(rows, arguments...);
}

// One column of tiles. Rows are dealt out evenly: a tile of one row takes nearly as long as a full one.
template <class Operand, int kVectors, bool kAccumulate>
__attribute__((noinline)) void column_of_tiles(int rows, int depth, Strided<typename Operand::Factor> a,
                                               Rows<const typename Operand::Factor> b,
                                               Rows<typename Operand::Sum> sum) {
  constexpr int kMost = kTileRows<kVectors>;
  int tiles = (rows + kMost - 1) / kMost;
  for (int tile = 0, row = 0; tile < tiles; ++tile) {
    int height = (rows - row) / (tiles - tile);
    tile_of_rows<Operand, kMost, kVectors, kAccumulate>(height, depth, a.data + row * a.row_stride, a.row_stride,
                                                        a.step_stride, b.data, b.stride, sum.data + row * sum.stride,
                                                        sum.stride);
    row += height;
  }
}

// sum[rows x vectors] (+)= a[rows x depth] b[depth x vectors]; vectors counts vectors of a row of b and of sum. A tile
// takes at most kWidest of them.
template <class Operand, bool kAccumulate = false, int kWidest = 4>
SWIN_MOE_INLINE void product(int rows, int vectors, int depth, Strided<typename Operand::Factor> a,
                             Rows<const typename Operand::Factor> b, Rows<typename Operand::Sum> sum) {
  constexpr int n = kLanes<typename Operand::Sum>;
  int columns = (vectors + kWidest - 1) / kWidest;
  for (int column = 0, vector = 0; column < columns; ++column) {
    int width = (vectors - vector) / (columns - column);
    Rows<const typename Operand::Factor> b_part{b.data + vector * n, b.stride};
    Rows<typename Operand::Sum> sum_part{sum.data + vector * n, sum.stride};
    switch (width) {
      case 1: column_of_tiles<Operand, 1, kAccumulate>(rows, depth, a, b_part, sum_part); break;
      case 2: column_of_tiles<Operand, std::min(2, kWidest), kAccumulate>(rows, depth, a, b_part, sum_part); break;
      case 3: column_of_tiles<Operand, std::min(3, kWidest), kAccumulate>(rows, depth, a, b_part, sum_part); break;
      default: column_of_tiles<Operand, kWidest, kAccumulate>(rows, depth, a, b_part, sum_part); break;
    }
    vector += width;
  }
}

}  // namespace SWIN_MOE_CAPABILITY
}  // namespace swin_moe
