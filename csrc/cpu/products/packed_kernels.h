// The kernel of packed layers: blocks of rows, each read, multiplied and written while it is in the cache.
#pragma once

#include "packed_experts.h"

namespace swin_moe {
namespace SWIN_MOE_CAPABILITY {

// Computed before the second matrix takes them up: each time its sums are read and written once more.
constexpr int64_t kHiddenPanels = SWIN_MOE_VECTOR_REGISTERS >= 32 ? 4 : 10;

template <class Operand>
struct PackedMemory {
  using F = typename Operand::Factor;
  using A = typename Operand::Sum;
  int64_t rows, row, hidden_row, sums_row;  // rows of a block; factors of a row; sums of a row
  F *a, *hidden;
  A *numbers, *sums, *panel;

  static int64_t block_rows(const PackedLayers& p, int64_t outputs) {
    int64_t fitting = kBlockBytes / int64_t(sizeof(A)) / (p.first.inputs / Operand::kPerFactor + outputs + 1);
    return std::clamp(fitting, kLeastRows, kMostRows);
  }

  PackedMemory(Arena& arena, const PackedLayers& p, int64_t most_rows) {
    const int64_t spread = kLanes<F>;  // rows a power of two apart would share a set of the cache
    const bool two = p.second.data != nullptr;
    const int64_t outputs = two ? p.second.outputs : p.first.outputs;
    const bool whole = two || p.after.weight;
    rows = std::min(most_rows, block_rows(p, whole ? outputs : 0));
    row = whole_vectors<A>(p.first.inputs) + 2 * spread;
    hidden_row = kHiddenPanels * kPanelVectors * kLanes<A> / Operand::kPerFactor + spread;
    sums_row = Panels<Operand>(outputs).padded_columns() + kLanes<A>;
    a = arena.take<F>(rows * row);
    hidden = arena.take<F>(two ? rows * hidden_row : 0);
    numbers = arena.take<A>(whole_vectors<A>(p.first.inputs));
    sums = arena.take<A>(whole ? rows * sums_row : 0);
    panel = arena.take<A>(rows * kPanelVectors * kLanes<A>);
  }
};

// Writes the factors of a block's rows, normalized. next: what is read then.
template <class S, class Operand>
void read_block(const PackedLayers& p, const PackedMemory<Operand>& m, int64_t begin, int rows, Next next) {
  using A = typename Operand::Sum;
  const int64_t inputs = p.first.inputs;
  const bool whole = p.source == RowSource::kRows && p.accumulated_in && p.before.weight && inputs % kLanes<A> == 0;
  Ahead ahead(next, rows);
  for (int i = 0; i < rows; ++i) {
    Ahead::ask(ahead);
    auto* to = m.a + i * m.row;
    const int64_t row = p.from ? p.from[begin + i] : begin + i;
    if (p.source == RowSource::kRows && !p.before.weight && !p.accumulated_in) {
      Operand::read(static_cast<const S*>(p.x) + row * inputs, to, int(inputs));
      continue;
    }
    if (whole) {
      normalized_row(static_cast<const A*>(p.x) + row * inputs, inputs, p.before,
                     [&](int index, Vector<A> x) __attribute__((always_inline)) { put_rounded<Operand>(to, index, x); });
      continue;
    }
    read_row<S>(p, row, m.numbers);
    if (p.before.weight) normalize_row(m.numbers, inputs, p.before);
    for (int64_t c = 0; c < inputs; c += kLanes<A>) put_rounded<Operand>(to, int(c / kLanes<A>), load(m.numbers + c));
  }
}

// Writes gelu(a W1 + bias) of panels [first, last) as factors, side by side. next: what is read after them.
template <class Operand>
void hidden_block(const PackedLayers& p, const PackedMemory<Operand>& m, int64_t expert, int rows, int64_t first,
                  int64_t last, Next next) {
  using A = typename Operand::Sum;
  const Panels<Operand> panels(p.first.outputs);
  const int64_t depth = depth_of<Operand>(p.first.inputs);
  auto* bias = bias_of<A>(p.first, expert);
  int index = 0;
  for (int64_t number = first; number < last; ++number) {
    const int width = panels.width(number), stride = width * kLanes<A>;
    auto* panel = panel_of(matrix_of<Operand>(p.first, expert), panels, depth, number);
    panel_product<Operand>(rows, width, depth, {m.a, m.row, 1}, panel, {m.panel, stride}, false,
                           number + 1 < last ? start_of<Operand>(p.first, expert, rows, number + 1) : next);
    auto* of_panel = bias ? bias + panels.first(number) * kLanes<A> : nullptr;
    for (int i = 0; i < rows; ++i)
      for (int v = 0; v < width; ++v) {
        Vector<A> x = load(m.panel + i * stride + v * kLanes<A>);
        if (of_panel) x += load(of_panel + v * kLanes<A>);
        put_rounded<Operand>(m.hidden + i * m.hidden_row, index + v, gelu_of(x));
      }
    index += width;
  }
}

// Adds the products of a block's hidden rows with the second matrix to its sums. next: whose first matrix is read then.
template <class Operand>
void two_products(const PackedLayers& p, const PackedMemory<Operand>& m, int64_t expert, int rows, int64_t next) {
  using A = typename Operand::Sum;
  const Panels<Operand> hidden(p.first.outputs), panels(p.second.outputs);
  const int64_t depth = depth_of<Operand>(p.second.inputs);
  for (int64_t first = 0; first < hidden.count; first += kHiddenPanels) {
    const int64_t last = std::min(first + kHiddenPanels, hidden.count);
    const int64_t begin = hidden.first(first) * kLanes<A> / Operand::kPerFactor;
    const int64_t steps = std::min(hidden.first(last) * kLanes<A> / Operand::kPerFactor, depth) - begin;
    const auto part = [&](int64_t number) {
      auto* panel = panel_of(matrix_of<Operand>(p.second, expert), panels, depth, number);
      return start_of_panel(rows, panel, panels, number, begin, steps);
    };
    hidden_block(p, m, expert, rows, first, last, part(0));
    for (int64_t number = 0; number < panels.count; ++number) {
      const int width = panels.width(number);
      auto* panel = static_cast<const typename Operand::Factor*>(part(number).from);
      Next then;
      if (number + 1 < panels.count)
        then = part(number + 1);
      else if (last < hidden.count)
        then = start_of<Operand>(p.first, expert, rows, last);
      else
        then = start_of<Operand>(p.first, next, rows, 0);
      panel_product<Operand>(rows, width, steps, {m.hidden, m.hidden_row, 1}, panel,
                             {m.sums + panels.first(number) * kLanes<A>, m.sums_row}, first > 0, then);
    }
  }
}

// Asks for where a row of a panel will be written, so that its lines are there when they are: the next panel's columns,
// or the next block's first. Rows lie apart, which the processor does not foresee.
template <class T, class A>
SWIN_MOE_INLINE void prefetch_written(T* to) {
  auto* line = reinterpret_cast<const char*>(to);
  for (int64_t at = 0; at < kPanelVectors * kLanes<A> * int64_t(sizeof(T)); at += 64)
    __builtin_prefetch(line + at, 1, 3);
}

// Multiplies a block's rows by the first matrix and writes each panel as it comes, or keeps them all for a norm.
template <class T, class Operand>
void one_product(const PackedLayers& p, const PackedMemory<Operand>& m, int64_t expert, int64_t begin, int rows,
                 int64_t next) {
  using A = typename Operand::Sum;
  const int64_t outputs = p.first.outputs, depth = depth_of<Operand>(p.first.inputs);
  const Panels<Operand> panels(outputs);
  auto* bias = bias_of<A>(p.first, expert);
  for (int64_t number = 0; number < panels.count; ++number) {
    const int width = panels.width(number);
    const int64_t column = panels.first(number) * kLanes<A>, end = std::min(column + width * kLanes<A>, outputs);
    Rows<A> sums = p.after.weight ? Rows<A>{m.sums + column, m.sums_row} : Rows<A>{m.panel, width * kLanes<A>};
    auto* panel = panel_of(matrix_of<Operand>(p.first, expert), panels, depth, number);
    const Next then = number + 1 < panels.count ? start_of<Operand>(p.first, expert, rows, number + 1)
                                                : start_of<Operand>(p.first, next, rows, 0);
    panel_product<Operand>(rows, width, depth, {m.a, m.row, 1}, panel, sums, false, then);
    if (p.after.weight) continue;
    for (int i = 0; i < rows; ++i) {
      const int64_t row = (begin + i) * outputs;
      auto* residual = p.residual ? static_cast<const A*>(p.residual) + row : nullptr;
      prefetch_written<T, A>(static_cast<T*>(p.out) + row + (end < outputs ? end : rows * outputs));
      write_columns(sums.data + i * sums.stride, bias, residual, static_cast<T*>(p.out) + row, column, end);
    }
  }
  if (p.after.weight) write_rows<T, A>(p, {m.sums, m.sums_row}, bias, outputs, begin, rows);
}

template <class T, class S, class Operand>
void run_blocks(const PackedLayers& p, const PackedTask& task) {
  using A = typename Operand::Sum;
  Arena counter(nullptr);
  PackedMemory<Operand>(counter, p, task.row_end - task.row_begin);
  Arena arena(thread_memory(counter.used()));
  const PackedMemory<Operand> memory(arena, p, task.row_end - task.row_begin);
  const int64_t blocks = (task.row_end - task.row_begin + memory.rows - 1) / memory.rows;
  int64_t begin = task.row_begin;
  for (int64_t block = 0; block < blocks; ++block) {
    const int rows = int((task.row_end - begin) / (blocks - block));
    const int64_t next = block + 1 < blocks ? task.expert : task.next_expert;
    read_block<S>(p, memory, begin, rows, start_of<Operand>(p.first, task.expert, rows, 0));
    if (p.second.data) {
      two_products(p, memory, task.expert, rows, next);
      write_rows<T, A>(p, {memory.sums, memory.sums_row}, bias_of<A>(p.second, task.expert), p.second.outputs, begin, rows);
    } else {
      one_product<T>(p, memory, task.expert, begin, rows, next);
    }
    begin += rows;
  }
}

template <class S, class Operand>
void run_packed(const PackedLayers& p, const PackedTask& task) {
  if (p.accumulated_out)
    run_blocks<typename Operand::Sum, S, Operand>(p, task);
  else
    run_blocks<S, S, Operand>(p, task);
}

template <class S, class Operand>
PackedKernels packed_kernels() {
  return {packed_bytes<Operand>, pack<S, Operand>,      run_packed<S, Operand>,
          route_tokens<S, Operand>, combine_tokens<Operand>, kLanes<typename Operand::Sum>};
}

// BFloat16Operand: how bfloat16 tensors are multiplied.
template <class BFloat16Operand>
const PackedKernels* packed_kernels_by_element() {
  static const PackedKernels kernels[kElements] = {
      packed_kernels<double, Numbers<double>>(), packed_kernels<float, Numbers<float>>(),
      packed_kernels<BFloat16, BFloat16Operand>(), packed_kernels<Float16, Numbers<float>>()};
  return kernels;
}

}  // namespace SWIN_MOE_CAPABILITY
}  // namespace swin_moe
