// Matrices packed once for products with few or many rows, and those products.
//
// The columns of a matrix are cut into panels of up to four vectors. A panel lies in memory as the product reads it:
// step by step along the inputs, each step one row of factors.
#pragma once

#include "product.h"

namespace swin_moe {
namespace SWIN_MOE_CAPABILITY {

constexpr int kPanelVectors = 4;
constexpr int kDepthBlock = 384;  // factors: a block of a panel is 96 KiB and stays in the second-level cache

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

template <class Operand, bool kAccumulate>
void panel_block(int rows, int width, int depth, Strided<typename Operand::Factor> a,
                 const typename Operand::Factor* b, Rows<typename Operand::Sum> sum) {
  Rows<const typename Operand::Factor> factors{b, width * Panels<Operand>::kColumns};
  switch (width) {
    case 1: return column_of_tiles<Operand, 1, kAccumulate>(rows, depth, a, factors, sum);
    case 2: return column_of_tiles<Operand, 2, kAccumulate>(rows, depth, a, factors, sum);
    case 3: return column_of_tiles<Operand, 3, kAccumulate>(rows, depth, a, factors, sum);
    default: return column_of_tiles<Operand, 4, kAccumulate>(rows, depth, a, factors, sum);
  }
}

// sum[rows x width vectors] (+)= a[rows x depth] times a panel, or its part of this depth. Every sum adds its products
// in the order of the inputs, whatever the rows beside it.
template <class Operand>
void panel_product(int rows, int width, int64_t depth, Strided<typename Operand::Factor> a,
                   const typename Operand::Factor* panel, Rows<typename Operand::Sum> sum, bool accumulate) {
  const int64_t step_of_panel = int64_t(width) * Panels<Operand>::kColumns;
  for (int64_t step = 0; step < depth; step += kDepthBlock) {
    int block = int(std::min<int64_t>(kDepthBlock, depth - step));
    Strided<typename Operand::Factor> part{a.data + step * a.step_stride, a.row_stride, a.step_stride};
    if (accumulate || step > 0)
      panel_block<Operand, true>(rows, width, block, part, panel + step * step_of_panel, sum);
    else
      panel_block<Operand, false>(rows, width, block, part, panel + step * step_of_panel, sum);
  }
}

}  // namespace SWIN_MOE_CAPABILITY
}  // namespace swin_moe
