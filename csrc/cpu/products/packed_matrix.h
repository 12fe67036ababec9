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

// How the columns of a matrix are dealt out; the last panels are those that get one vector more.
template <class Operand>
struct Panels {
  static constexpr int kColumns = kLanes<typename Operand::Sum>;  // of a vector
  int64_t vectors, count;

  explicit Panels(int64_t columns)
      : vectors((columns + kColumns - 1) / kColumns), count((vectors + kPanelVectors - 1) / kPanelVectors) {}
  int64_t first(int64_t panel) const {  // vector
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

template <class Operand>
int64_t packed_bytes(int64_t outputs, int64_t inputs) {
  return Panels<Operand>(outputs).padded_columns() * depth_of<Operand>(inputs) *
         int64_t(sizeof(typename Operand::Factor));
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

// What the next product reads is asked for between the tiles of this one: a large layer's weights come from memory, for
// which the first rows would wait.
class Ahead {
 public:
  Ahead(const void* from, int64_t bytes) : from_(static_cast<const char*>(from)), lines_(from ? (bytes + 63) / 64 : 0) {}
  SWIN_MOE_INLINE void ask(Ahead& ahead, int tile, int tiles) {
    for (int64_t end = ahead.lines_ * (tile + 1) / tiles; ahead.line_ < end; ++ahead.line_)
      __builtin_prefetch(ahead.from_ + 64 * ahead.line_, 0, 2);
  }

 private:
  const char* from_;
  int64_t lines_, line_ = 0;
};

// As column_of_tiles (product.h), with something asked for.
template <class Operand, int kVectors, bool kAccumulate>
__attribute__((noinline)) void panel_tiles(int rows, int depth, Strided<typename Operand::Factor> a,
                                           const typename Operand::Factor* b, Rows<typename Operand::Sum> sum,
                                           Ahead ahead) {
  constexpr int kMost = kTileRows<kVectors>;
  const int tiles = (rows + kMost - 1) / kMost;
  for (int tile = 0, row = 0; tile < tiles; ++tile) {
    const int height = (rows - row) / (tiles - tile);
    Ahead::ask(ahead, tile, tiles);
    tile_of_rows<Operand, kMost, kVectors, kAccumulate>(
        height, depth, a.data + row * a.row_stride, a.row_stride, a.step_stride, b,
        int64_t(kVectors) * Panels<Operand>::kColumns, sum.data + row * sum.stride, sum.stride);
    row += height;
  }
}

template <class Operand, bool kAccumulate>
void panel_block(int rows, int width, int depth, Strided<typename Operand::Factor> a,
                 const typename Operand::Factor* b, Rows<typename Operand::Sum> sum, Ahead ahead) {
  switch (width) {
    case 1: return panel_tiles<Operand, 1, kAccumulate>(rows, depth, a, b, sum, ahead);
    case 2: return panel_tiles<Operand, std::min(2, kPanelVectors), kAccumulate>(rows, depth, a, b, sum, ahead);
    case 3: return panel_tiles<Operand, std::min(3, kPanelVectors), kAccumulate>(rows, depth, a, b, sum, ahead);
    default: return panel_tiles<Operand, kPanelVectors, kAccumulate>(rows, depth, a, b, sum, ahead);
  }
}

// sum[rows x width vectors] (+)= a[rows x depth] times a panel, or its part of this depth. Every sum adds its products
// in the order of the inputs, whatever the rows beside it. next: the panel that follows, or null.
template <class Operand>
void panel_product(int rows, int width, int64_t depth, Strided<typename Operand::Factor> a,
                   const typename Operand::Factor* panel, Rows<typename Operand::Sum> sum, bool accumulate,
                   const typename Operand::Factor* next) {
  using F = typename Operand::Factor;
  const int64_t step_of_panel = int64_t(width) * Panels<Operand>::kColumns;
  for (int64_t step = 0; step < depth; step += kDepthBlock) {
    const int block = int(std::min<int64_t>(kDepthBlock, depth - step));
    const int64_t following = std::min<int64_t>(kDepthBlock, depth - step - block);
    const F* part = panel + step * step_of_panel;
    const Ahead ahead = following > 0 ? Ahead(part + block * step_of_panel, following * step_of_panel * sizeof(F))
                                      : Ahead(next, std::min<int64_t>(kDepthBlock, depth) * step_of_panel * sizeof(F));
    Strided<F> of_step{a.data + step * a.step_stride, a.row_stride, a.step_stride};
    if (accumulate || step > 0)
      panel_block<Operand, true>(rows, width, block, of_step, part, sum, ahead);
    else
      panel_block<Operand, false>(rows, width, block, of_step, part, sum, ahead);
  }
}

}  // namespace SWIN_MOE_CAPABILITY
}  // namespace swin_moe
