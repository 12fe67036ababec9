// Products of few rows on tiles that fit in registers: factors are read where they lie, or packed where a vector of
// them does not lie in one piece or its neighbours lie far apart.
#pragma once

#include "products/row_products.h"
#include "cpu/memory.h"
#include "cpu/product.h"

namespace swin_moe {
namespace SWIN_MOE_CAPABILITY {

constexpr int kRowLanes = kLanes<float>;
// Vectors of a tile: with 16 registers two of them by six rows of sums take the fewest loads a product, and a packed
// panel of as many columns lies in one piece in the first-level cache.
constexpr int kPanelVectors = SWIN_MOE_VECTOR_REGISTERS >= 32 ? 4 : 2;
constexpr int64_t kPanelColumns = kPanelVectors * kRowLanes;
static_assert(kRowProductColumns % kPanelColumns == 0);
// Six numbers of each step would be read from as many lines of the first-level cache, which then has no room for them.
constexpr bool kTurnsLeft = SWIN_MOE_VECTOR_REGISTERS < 32;
constexpr int kLeastPackedRows = 32;       // packing what could be read in place pays from here on
template <class Operand>
constexpr int64_t kBlockSteps = 256 * Operand::kPerFactor;  // of factors that stay in the second-level cache

// Factors of a bfloat16 product as float32 numbers: a float32 right factor is rounded to bfloat16 as it is read.
struct RoundedNumbers : Numbers<float> {};
template <class Operand, class B>
constexpr bool kRounded = std::is_same_v<Operand, RoundedNumbers> && std::is_same_v<B, float>;

template <class Operand>
constexpr int64_t depth_of(int64_t steps) {
  return (steps + Operand::kPerFactor - 1) / Operand::kPerFactor;
}

#if SWIN_MOE_VECTOR_BYTES == 64
SWIN_MOE_INLINE Vector<float> load_some(const float* from, int count) {
  return (Vector<float>)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), from);
}
SWIN_MOE_INLINE Vector<float> load_some(const BFloat16* from, int count) {
  const __m256i bits = _mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), from);
  return (Vector<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}
SWIN_MOE_INLINE void store_some(float* to, Vector<float> x, int count) {
  _mm512_mask_storeu_ps(to, __mmask16((1u << count) - 1), (__m512)x);
}
SWIN_MOE_INLINE void store_some(BFloat16* to, Vector<float> x, int count) {
  _mm256_mask_storeu_epi16(to, __mmask16((1u << count) - 1),
                           _mm512_cvtepi32_epi16((__m512i)rounded_bfloat16(x)));
}
#else
// As many ones as lanes are asked for, then zeros.
SWIN_MOE_INLINE __m256i some_lanes(int count) {
  static const int32_t kOnes[2 * kRowLanes] = {-1, -1, -1, -1, -1, -1, -1, -1};
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kOnes + kRowLanes - count));
}
SWIN_MOE_INLINE Vector<float> load_some(const float* from, int count) {
  if (count == kRowLanes) return load(from);
  return (Vector<float>)_mm256_maskload_ps(from, some_lanes(count));
}
SWIN_MOE_INLINE Vector<float> load_some(const BFloat16* from, int count) {
  if (count == kRowLanes) return load_as_float(from);
  BFloat16 whole[kRowLanes] = {};
  for (int i = 0; i < count; ++i) whole[i] = from[i];
  return load_as_float(whole);
}
SWIN_MOE_INLINE void store_some(float* to, Vector<float> x, int count) {
  if (count == kRowLanes) return store(to, x);
  _mm256_maskstore_ps(to, some_lanes(count), (__m256)x);
}
SWIN_MOE_INLINE void store_some(BFloat16* to, Vector<float> x, int count) {
  if (count == kRowLanes) return store_narrow(to, x);
  BFloat16 whole[kRowLanes];
  store_narrow(whole, x);
  for (int i = 0; i < count; ++i) to[i] = whole[i];
}
#endif

// The factors of a vector of columns of one step, or of two steps, of a matrix whose columns are adjacent; zeros beyond
// `count`.
template <class Operand, class B>
SWIN_MOE_INLINE Vector<typename Operand::Factor> factors_of(const B* b, int64_t b_step, int64_t step, int64_t steps,
                                                            int count) {
  if constexpr (kRounded<Operand, B>) {
    return (Vector<float>)(rounded_bfloat16(load_some(b + step * b_step, count)) << 16);
  } else if constexpr (Operand::kPerFactor == 1) {
    return load_some(b + step * b_step, count);
  } else {
    const Vector<float> first = load_some(b + 2 * step * b_step, count);
    Vector<float> second{};
    if (2 * step + 1 < steps) second = load_some(b + (2 * step + 1) * b_step, count);
    if constexpr (std::is_same_v<B, float>)
      return rounded_bfloat16(first) | rounded_bfloat16(second) << 16;
    else
      return (Vector<uint32_t>)first >> 16 | (Vector<uint32_t>)second;
  }
}

// A vector of factors from number `step` on, of one row whose steps are adjacent; zeros beyond the row.
template <class Operand, class B>
SWIN_MOE_INLINE Vector<typename Operand::Factor> factors_along(const B* row, int64_t step, int64_t steps) {
  if constexpr (kRounded<Operand, B>) {
    const Vector<float> x = load_some(row + step, int(std::min<int64_t>(steps - step, kRowLanes)));
    return (Vector<float>)(rounded_bfloat16(x) << 16);
  } else if constexpr (Operand::kPerFactor == 1) {
    return load_some(row + step, int(std::min<int64_t>(steps - step, kRowLanes)));
  } else {
    const int64_t left = steps - 2 * step;
    if constexpr (std::is_same_v<B, float>) {
      const auto low = load_some(row + 2 * step, int(std::min<int64_t>(left, kRowLanes)));
      Vector<float> high{};
      if (left > kRowLanes)
        high = load_some(row + 2 * step + kRowLanes, int(std::min<int64_t>(left - kRowLanes, kRowLanes)));
      const __m256i halves[2] = {_mm512_cvtepi32_epi16((__m512i)rounded_bfloat16(low)),
                                 _mm512_cvtepi32_epi16((__m512i)rounded_bfloat16(high))};
      return (Vector<uint32_t>)_mm512_inserti64x4(_mm512_castsi256_si512(halves[0]), halves[1], 1);
    } else {
      const __mmask32 inside = left >= 32 ? ~0u : (1u << left) - 1;
      return (Vector<uint32_t>)_mm512_maskz_loadu_epi16(inside, row + 2 * step);
    }
  }
}

// Writes the factors of `columns` columns to rows of whole vectors, zeros beyond the columns.
template <class Operand, class B>
void pack_columns(const B* b, int64_t b_step, int64_t b_column, int64_t steps, int64_t columns, int vectors,
                  typename Operand::Factor* to) {
  using F = typename Operand::Factor;
  const int64_t depth = depth_of<Operand>(steps), width = vectors * kRowLanes;
  for (int v = 0; v < vectors; ++v) {
    const int64_t first = v * kRowLanes;
    const int count = int(std::min<int64_t>(columns - first, kRowLanes));
    F* into = to + v * kRowLanes;
    if (b_column == 1) {
      for (int64_t step = 0; step < depth; ++step)
        store(into + step * width, factors_of<Operand>(b + first, b_step, step, steps, count));
      continue;
    }
    for (int64_t step = 0; step < depth; step += kRowLanes) {
      Vector<F> square[kRowLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kRowLanes; ++i)
        square[i] = i < count ? factors_along<Operand>(b + (first + i) * b_column, step, steps) : Vector<F>{};
      transpose_rounds<F>(square);
      const int used = int(std::min<int64_t>(depth - step, kRowLanes));
#pragma GCC unroll 16
      for (int i = 0; i < kRowLanes; ++i)
        if (i < used) store(into + (step + i) * width, square[i]);
    }
  }
}

// Writes the factors of a matrix whose rows are adjacent, row by row.
template <class Operand, class A>
void turn_columns(const A* a, int64_t a_step, int64_t steps, int64_t rows, typename Operand::Factor* to,
                  int64_t stride) {
  using F = typename Operand::Factor;
  const int64_t depth = depth_of<Operand>(steps);
  for (int64_t row = 0; row < rows; row += kRowLanes) {
    const int count = int(std::min<int64_t>(rows - row, kRowLanes));
    for (int64_t step = 0; step < depth; step += kRowLanes) {
      Vector<F> square[kRowLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kRowLanes; ++i)
        square[i] =
            step + i < depth ? factors_of<Operand>(a + row, a_step, step + i, steps, count) : Vector<F>{};
      transpose_rounds<F>(square);
#pragma GCC unroll 16
      for (int i = 0; i < kRowLanes; ++i) store(to + (row + i) * stride + step, square[i]);
    }
  }
}

// The left factor of a block of steps of a part: where it lies, or packed.
template <class Operand, class A>
Strided<typename Operand::Factor> left_factor(const RowProduct& p, const RowProductPart& part, int64_t step,
                                              int64_t steps) {
  using F = typename Operand::Factor;
  const A* a = static_cast<const A*>(p.a) + part.row_begin * p.a_row + step * p.a_step;
  const int64_t rows = part.row_end - part.row_begin, depth = depth_of<Operand>(steps);
  const bool along = p.a_step == 1;
  if constexpr (std::is_same_v<A, F>) {
    if (along) return {a, p.a_row, 1};
  } else if constexpr (Operand::kPerFactor == 2) {
    if (along && steps % 2 == 0 && p.a_row % 2 == 0 && reinterpret_cast<uintptr_t>(a) % sizeof(F) == 0)
      return {reinterpret_cast<const F*>(a), p.a_row / 2, 1};
  }
  const bool by_row = along || kTurnsLeft;
  const int64_t stride = (by_row ? depth : rows) + kRowLanes, most = (by_row ? rows : depth) + kRowLanes;
  F* space = thread_memory<F, 0>(stride * most);
  if (along) {
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t i = 0; i < depth; i += kRowLanes)
        store(space + row * stride + i, factors_along<Operand>(a + row * p.a_row, i, steps));
    return {space, stride, 1};
  }
  if constexpr (kTurnsLeft) {
    turn_columns<Operand>(a, p.a_step, steps, rows, space, stride);
    return {space, stride, 1};
  }
  for (int64_t i = 0; i < depth; ++i)
    for (int64_t row = 0; row < rows; row += kRowLanes)
      store(space + i * stride + row,
            factors_of<Operand>(a + row, p.a_step, i, steps, int(std::min<int64_t>(rows - row, kRowLanes))));
  return {space, 1, stride};
}

// The right factor of a block of steps for one panel of columns: where it lies, or packed.
template <class Operand, class B>
Rows<const typename Operand::Factor> right_factor(const RowProduct& p, int64_t rows, int64_t step, int64_t steps,
                                                  int64_t column, int64_t columns) {
  using F = typename Operand::Factor;
  const B* b = static_cast<const B*>(p.b) + step * p.b_step + column * p.b_column;
  if constexpr (std::is_same_v<B, F> && !kRounded<Operand, B>) {
    if (p.b_column == 1 && columns % kRowLanes == 0 && rows < kLeastPackedRows) return {b, p.b_step};
  }
  const int vectors = int((columns + kRowLanes - 1) / kRowLanes);
  F* packed = thread_memory<F, 1>(depth_of<Operand>(steps) * vectors * kRowLanes);
  pack_columns<Operand>(b, p.b_step, p.b_column, steps, columns, vectors, packed);
  return {packed, vectors * kRowLanes};
}

// Writes sums (rows x columns) to a tensor, with the bias, by way of `Through`.
template <class Through, class Out>
SWIN_MOE_INLINE void put_sums(const float* sums, int64_t sums_row, int64_t rows, int64_t columns, const Through* bias,
                              Out* out, int64_t out_row) {
  // Row by row, as lines of the tensor are written whole then: rows that lie a power of two apart share few places of a
  // cache, and a line that is left half written would be gone.
  Vector<float> added[kPanelVectors] = {};
  for (int64_t column = 0; bias && column < columns; column += kRowLanes)
    added[column / kRowLanes] = load_some(bias + column, int(std::min<int64_t>(columns - column, kRowLanes)));
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = 0; column < columns; column += kRowLanes) {
      const int count = int(std::min<int64_t>(columns - column, kRowLanes));
      Vector<float> sum = load(sums + row * sums_row + column) + added[column / kRowLanes];
      if constexpr (!std::is_same_v<Through, Out>) sum = (Vector<float>)(rounded_bfloat16(sum) << 16);
      store_some(out + row * out_row + column, sum, count);
    }
}

template <class Operand, class A, class B, class Out>
void product_of_part(const RowProduct& p, const RowProductPart& part) {
  constexpr bool kNarrow = !std::is_same_v<Out, float> || !std::is_same_v<A, float>;
  const int64_t rows = part.row_end - part.row_begin;
  // Sums of several blocks wait for each other, all panels side by side; those of one are written out at once, so that
  // they stay in the cache.
  const bool one_block = p.steps <= kBlockSteps<Operand>;
  const int64_t most = ((one_block ? 0 : part.column_end - part.column_begin) + kPanelColumns) * rows;  // padded
  for (int64_t step = 0; step == 0 || step < p.steps; step += kBlockSteps<Operand>) {
    const int64_t steps = std::min(p.steps - step, kBlockSteps<Operand>);
    const auto a = left_factor<Operand, A>(p, part, step, steps);
    for (int64_t column = part.column_begin; column < part.column_end; column += kPanelColumns) {
      const int64_t columns = std::min(part.column_end - column, kPanelColumns);
      const int vectors = int((columns + kRowLanes - 1) / kRowLanes), depth = int(depth_of<Operand>(steps));
      const auto b = right_factor<Operand, B>(p, rows, step, steps, column, columns);
      const A* bias = p.bias ? static_cast<const A*>(p.bias) + column : nullptr;
      Out* out = static_cast<Out*>(p.out) + part.row_begin * p.out_row + column;
      const int64_t before = one_block ? 0 : (column - part.column_begin) * rows;
      float* waiting = thread_memory<float, 2>(most) + before;
      Rows<float> sums{waiting, kRowLanes * vectors};
      if constexpr (!kNarrow) {
        if (columns % kRowLanes == 0 && !bias) sums = {out, p.out_row};
      }
      if (step == 0)
        product<Operand, false, kPanelVectors>(int(rows), vectors, depth, a, b, sums);
      else
        product<Operand, true, kPanelVectors>(int(rows), vectors, depth, a, b, sums);
      if (step + steps == p.steps && sums.data == waiting)
        put_sums<A, Out>(waiting, sums.stride, rows, columns, bias, out, p.out_row);
    }
  }
}

template <class S>
void sum_of_rows(const RowSum& p) {
  constexpr int64_t kRows = 64;  // added up for themselves first: sums of thousands of rows stay exact
  const S* a = static_cast<const S*>(p.a);
  for (int64_t column = 0; column < p.columns; column += kRowLanes) {
    const int count = int(std::min<int64_t>(p.columns - column, kRowLanes));
    Vector<float> total{};
    for (int64_t start = 0; start < p.rows; start += kRows) {
      Vector<float> sum{};
      for (int64_t row = start; row < std::min(start + kRows, p.rows); ++row)
        sum += load_some(a + row * p.a_row + column, count);
      total += sum;
    }
    store_some(static_cast<S*>(p.out) + column, total, count);
  }
}

}  // namespace SWIN_MOE_CAPABILITY
}  // namespace swin_moe
