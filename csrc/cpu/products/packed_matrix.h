// Matrices packed once for products with few or many rows, and those products.
//
// The columns of a matrix are cut into panels of up to kPanelVectors vectors. A panel lies in memory as the product reads
// it: step by step along the inputs, each step one row of factors.
#pragma once

#include "cpu/product.h"

namespace swin_moe {
namespace SWIN_MOE_CAPABILITY {

// Where 16 registers hold a tile, three vectors by four rows of sums, a row of factors and a broadcast fill them: two rows
// of four vectors would load nearly as often as they multiply (AVX2: 6 to 43 % slower by shape).
constexpr int kPanelVectors = SWIN_MOE_VECTOR_REGISTERS >= 32 ? 4 : 3;
// Factors: a block of a panel is 96 KiB and stays in the second-level cache, with 16 registers 24 KiB and in the first.
constexpr int kDepthBlock = SWIN_MOE_VECTOR_REGISTERS >= 32 ? 384 : 256;
// With few rows, as experts have, weights come from memory nearly as fast as it gives them, and what is asked for ahead
// fills the queue in which misses of the first-level cache wait. Blocks that stay in that cache, 16 KiB, miss once and not
// once a tile: 3 to 14 % of the products of 12 to 22 rows.
constexpr int kFewRows = 24, kShortBlock = SWIN_MOE_VECTOR_REGISTERS >= 32 ? 64 : kDepthBlock;

// How the columns of a matrix are dealt out. Of whole numbers all panels but the last are full, so that groups of columns
// (packed_int8.h) end where panels do; else the last panels are those that get one vector more.
template <class Operand>
struct Panels {
  static constexpr bool kFull = std::is_same_v<typename Operand::Sum, int32_t>;
  static constexpr int kColumns = kLanes<typename Operand::Sum>;  // of a vector
  int64_t vectors, count;

  explicit Panels(int64_t columns)
      : vectors((columns + kColumns - 1) / kColumns), count((vectors + kPanelVectors - 1) / kPanelVectors) {}
  int64_t first(int64_t panel) const {  // vector
    if constexpr (kFull) return std::min(panel * kPanelVectors, vectors);
    int64_t smaller = count - vectors % count;
    return panel * (vectors / count) + std::max<int64_t>(0, panel - smaller);
  }
  int width(int64_t panel) const { return int(first(panel + 1) - first(panel)); }
  int64_t padded_columns() const { return vectors * kColumns; }
};

template <class Operand>
int64_t depth_of(int64_t inputs) {
  return (inputs + Operand::kPerFactor - 1) / Operand::kPerFactor;
}

// Bytes of the panels of one matrix.
template <class Operand>
int64_t panel_bytes(int64_t outputs, int64_t inputs) {
  return Panels<Operand>(outputs).padded_columns() * depth_of<Operand>(inputs) *
         int64_t(sizeof(typename Operand::Factor));
}

// Inputs of int8 products that are rounded together between two matrices, and whose weights are added up for that: whole
// panels of every set of instructions.
constexpr int64_t kGroup = 384;

inline int64_t groups_of(int64_t inputs) { return (inputs + kGroup - 1) / kGroup; }

// Of an int8 matrix a scale follows for each column, and its sum of weights: of all inputs, and of each group.
template <class Operand>
int64_t packed_bytes(int64_t outputs, int64_t inputs) {
  int64_t bytes = panel_bytes<Operand>(outputs, inputs);
  if constexpr (Panels<Operand>::kFull)
    bytes += (2 + groups_of(inputs)) * Panels<Operand>(outputs).padded_columns() * int64_t(sizeof(float));
  return bytes;
}

// weight: (outputs, inputs) of S. What is beyond it in the last panel, and in the last pair, is zero.
template <class S, class Operand>
void pack(const void* weight, int64_t outputs, int64_t inputs, void* packed) {
  using F = typename Operand::Factor;
  const Panels<Operand> panels(outputs);
  const int64_t depth = depth_of<Operand>(inputs);
  auto* from = static_cast<const S*>(weight);
  auto* to = static_cast<F*>(packed);
  for (int64_t panel = 0; panel < panels.count; ++panel) {
    const int64_t begin = panels.first(panel) * panels.kColumns, columns = panels.width(panel) * panels.kColumns;
    for (int64_t step = 0; step < depth; ++step) {
      for (int64_t column = begin; column < begin + columns; ++column, ++to) {
        S pair[Operand::kPerFactor] = {};
        for (int i = 0; i < Operand::kPerFactor; ++i) {
          int64_t input = step * Operand::kPerFactor + i;
          if (column < outputs && input < inputs) pair[i] = from[column * inputs + input];
        }
        *to = Operand::factor(pair);
      }
    }
  }
}

template <class Operand>
const typename Operand::Factor* panel_of(const typename Operand::Factor* packed, const Panels<Operand>& panels,
                                         int64_t depth, int64_t panel) {
  return packed + panels.first(panel) * panels.kColumns * depth;
}

// Memory that is read next.
struct Next {
  const void* from = nullptr;
  int64_t bytes = 0;
};

// Asks for what is read next in small equal portions: weights come from memory, and a portion of hundreds of lines would
// hold the processor up as long as reading them does, with nothing computed meanwhile. It is asked for into the first-level
// cache: what was asked for into the second came a quarter slower from memory.
class Ahead {
 public:
  Ahead(Next next, int64_t portions) : line_(static_cast<const char*>(next.from)), end_(line_ + next.bytes) {
    portion_ = next.from ? 64 * ((next.bytes / 64 + portions) / std::max<int64_t>(portions, 1)) : 0;
  }
  SWIN_MOE_INLINE void ask(Ahead& ahead) {
    const char* end = std::min(ahead.line_ + ahead.portion_, ahead.end_);
    for (; ahead.line_ < end; ahead.line_ += 64) __builtin_prefetch(ahead.line_, 0, 3);
  }

 private:
  const char *line_, *end_;
  int64_t portion_;
};

constexpr int kSteps = 2;  // between two portions: some 25 cycles

// Returns how many steps of a panel are taken at once: equal parts of its depth, in whole portions.
inline int64_t depth_block(int rows, int64_t depth) {
  const int64_t most = rows <= kFewRows ? kShortBlock : kDepthBlock;
  if (depth <= most) return depth;
  const int64_t blocks = (depth + most - 1) / most, steps = (depth + blocks - 1) / blocks;
  return (steps + kSteps - 1) / kSteps * kSteps;
}

// As tile_product (product.h), with something asked for; the steps of b follow each other.
template <class Operand, int kRows, int kVectors, bool kAccumulate>
SWIN_MOE_INLINE void panel_tile(int depth, Strided<typename Operand::Factor> a, const typename Operand::Factor* b,
                                Rows<typename Operand::Sum> sum, Ahead& ahead) {
  using F = typename Operand::Factor;
  using A = typename Operand::Sum;
  Vector<A> sums[kRows][kVectors];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 16
    for (int n = 0; n < kVectors; ++n)
      sums[m][n] = kAccumulate ? load(sum.data + m * sum.stride + n * kLanes<A>) : Vector<A>{};
  const F* factor = a.data;
  for (int start = 0; start < depth; start += kSteps) {
    Ahead::ask(ahead);
    const int steps = std::min(kSteps, depth - start);
    for (int k = 0; k < steps; ++k, factor += a.step_stride, b += kVectors * kLanes<F>) {
      Vector<F> factors[kVectors];
#pragma GCC unroll 16
      for (int n = 0; n < kVectors; ++n) factors[n] = load(b + n * kLanes<F>);
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 16
        for (int n = 0; n < kVectors; ++n)
          sums[m][n] = Operand::multiply_add(factor[m * a.row_stride], factors[n], sums[m][n]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 16
    for (int n = 0; n < kVectors; ++n) store(sum.data + m * sum.stride + n * kLanes<A>, sums[m][n]);
}

// The tile of `rows` <= kRows rows.
template <class Operand, int kRows, int kVectors, bool kAccumulate>
SWIN_MOE_INLINE void panel_tile_of(int rows, int depth, Strided<typename Operand::Factor> a,
                                   const typename Operand::Factor* b, Rows<typename Operand::Sum> sum, Ahead& ahead) {
  if (rows == kRows)
    panel_tile<Operand, kRows, kVectors, kAccumulate>(depth, a, b, sum, ahead);
  else if constexpr (kRows > 1)
    panel_tile_of<Operand, kRows - 1, kVectors, kAccumulate>(rows, depth, a, b, sum, ahead);
}

// As column_of_tiles (product.h), with something asked for.
template <class Operand, int kVectors, bool kAccumulate>
__attribute__((noinline)) void panel_tiles(int rows, int depth, Strided<typename Operand::Factor> a,
                                           const typename Operand::Factor* b, Rows<typename Operand::Sum> sum,
                                           Next next) {
  constexpr int kMost = kTileRows<kVectors>;
  const int tiles = (rows + kMost - 1) / kMost;
  Ahead ahead(next, int64_t(tiles) * ((depth + kSteps - 1) / kSteps));
  for (int tile = 0, row = 0; tile < tiles; ++tile) {
    const int height = (rows - row) / (tiles - tile);
    panel_tile_of<Operand, kMost, kVectors, kAccumulate>(
        height, depth, {a.data + row * a.row_stride, a.row_stride, a.step_stride}, b,
        {sum.data + row * sum.stride, sum.stride}, ahead);
    row += height;
  }
}

template <class Operand, bool kAccumulate>
void panel_block(int rows, int width, int depth, Strided<typename Operand::Factor> a,
                 const typename Operand::Factor* b, Rows<typename Operand::Sum> sum, Next next) {
  switch (width) {
    case 1: return panel_tiles<Operand, 1, kAccumulate>(rows, depth, a, b, sum, next);
    case 2: return panel_tiles<Operand, std::min(2, kPanelVectors), kAccumulate>(rows, depth, a, b, sum, next);
    case 3: return panel_tiles<Operand, std::min(3, kPanelVectors), kAccumulate>(rows, depth, a, b, sum, next);
    default: return panel_tiles<Operand, kPanelVectors, kAccumulate>(rows, depth, a, b, sum, next);
  }
}

// What panel_product with so many rows reads first of a panel, or of its part that starts at `step` with `steps` more.
template <class Operand>
Next start_of_panel(int rows, const typename Operand::Factor* panel, const Panels<Operand>& panels, int64_t number,
                    int64_t step, int64_t steps) {
  const int64_t step_of_panel = int64_t(panels.width(number)) * panels.kColumns;
  return {panel + step * step_of_panel,
          depth_block(rows, steps) * step_of_panel * int64_t(sizeof(typename Operand::Factor))};
}

// sum[rows x width vectors] (+)= a[rows x depth] times a panel, or its part of this depth. Every sum adds its products
// in the order of the inputs, whatever the rows beside it. next: what is read after the panel.
template <class Operand>
void panel_product(int rows, int width, int64_t depth, Strided<typename Operand::Factor> a,
                   const typename Operand::Factor* panel, Rows<typename Operand::Sum> sum, bool accumulate, Next next) {
  using F = typename Operand::Factor;
  const int64_t step_of_panel = int64_t(width) * Panels<Operand>::kColumns;
  const int64_t whole = depth_block(rows, depth);
  for (int64_t step = 0; step < depth; step += whole) {
    const int block = int(std::min(whole, depth - step));
    const int64_t following = std::min(whole, depth - step - block);
    const F* part = panel + step * step_of_panel;
    const Next then =
        following > 0 ? Next{part + block * step_of_panel, following * step_of_panel * int64_t(sizeof(F))} : next;
    Strided<F> of_step{a.data + step * a.step_stride, a.row_stride, a.step_stride};
    if (accumulate || step > 0)
      panel_block<Operand, true>(rows, width, block, of_step, part, sum, then);
    else
      panel_block<Operand, false>(rows, width, block, of_step, part, sum, then);
  }
}

}  // namespace SWIN_MOE_CAPABILITY
}  // namespace swin_moe
