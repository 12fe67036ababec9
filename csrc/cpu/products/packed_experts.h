// Tokens of a layer of experts before and after their products: norm, router and scores; the sum of a token's experts.
#pragma once

#include "packed_rows.h"

namespace swin_moe {
namespace SWIN_MOE_CAPABILITY {

constexpr int64_t kRouterRows = 24;  // of a block of tokens
constexpr double kShortest = 1e-12;  // least length that a projected token is divided by, as torch's normalize

template <class A>
struct RouterMemory {
  int64_t token_row, point_row, logit_row;
  A *tokens, *points, *logits;

  RouterMemory(Arena& arena, const PackedRouter& p, int64_t inputs) {
    const bool projected = p.projector.data != nullptr;
    token_row = whole_vectors<A>(inputs) + kLanes<A>;
    point_row = projected ? Panels<Numbers<A>>(p.projector.outputs).padded_columns() + kLanes<A> : 0;
    logit_row = Panels<Numbers<A>>(p.router.outputs).padded_columns();
    tokens = arena.take<A>(kRouterRows * token_row);
    points = arena.take<A>(kRouterRows * point_row);
    logits = arena.take<A>(kRouterRows * logit_row);
  }
};

// sums[rows x outputs] = a[rows x inputs] times a packed matrix of numbers.
template <class A>
void number_product(int rows, Rows<A> a, const PackedMatrix& matrix, Rows<A> sums) {
  using Operand = Numbers<A>;
  const Panels<Operand> panels(matrix.outputs);
  for (int64_t number = 0; number < panels.count; ++number)
    panel_product<Operand>(rows, panels.width(number), matrix.inputs, {a.data, a.stride, 1},
                           panel_of(matrix_of<Operand>(matrix, 0), panels, matrix.inputs, number),
                           {sums.data + panels.first(number) * kLanes<A>, sums.stride}, false, Next{});
}

// Adds the bias to a projected token and divides it by its length.
template <class A>
void normalize_point(A* point, const A* bias, int64_t count) {
  Vector<A> squares = {};
  for (int64_t c = 0; c < count; c += kLanes<A>) {  // zeros behind the last number
    Vector<A> x = load(point + c);
    if (bias) x += load(bias + c);
    squares += x * x;
    store(point + c, x);
  }
  const A length = std::sqrt(sum_of_lanes<A>(squares));
  const A factor = A(1) / (length < A(kShortest) ? A(kShortest) : length);
  for (int64_t c = 0; c < count; c += kLanes<A>) store(point + c, load(point + c) * factor);
}

template <class A>
SWIN_MOE_INLINE Vector<A> sigmoid_of(Vector<A> x) {
  Vector<A> e = exp_of(x < A(0) ? x : -x), whole = A(1) + e;
  return (x < A(0) ? e : broadcast(A(1))) / whole;
}

// Turns a row of logits, whose last vector may be wider than the experts, into scores.
template <class A>
void score_row(A* logits, int64_t experts, bool sigmoid) {
  if (sigmoid) {
    for (int64_t c = 0; c < experts; c += kLanes<A>) store(logits + c, sigmoid_of<A>(load(logits + c)));
    return;
  }
  constexpr A kNone = A(-1e30);  // whose exponential is 0
  for (int64_t c = experts; c < whole_vectors<A>(experts); ++c) logits[c] = kNone;
  Vector<A> largest = broadcast(kNone), sum = {};
  for (int64_t c = 0; c < experts; c += kLanes<A>) largest = larger<A>(load(logits + c), largest);
  const A most = largest_lane<A>(largest);
  for (int64_t c = 0; c < experts; c += kLanes<A>) {
    Vector<A> x = exp_of(load(logits + c) - most);
    sum += x;
    store(logits + c, x);
  }
  const A factor = A(1) / sum_of_lanes<A>(sum);
  for (int64_t c = 0; c < experts; c += kLanes<A>) store(logits + c, load(logits + c) * factor);
}

// Writes `count` numbers to elements.
template <class S, class A>
SWIN_MOE_INLINE void put_elements(const A* from, S* to, int64_t count) {
  int64_t c = 0;
  for (; c + kLanes<A> <= count; c += kLanes<A>) store_vector<S, A>(to + c, load(from + c));
  store_row(to + c, from + c, int(count - c));
}

template <class S, class Operand>
void route_tokens(const PackedRouter& p, int64_t begin, int64_t end) {
  using A = typename Operand::Sum;
  const int64_t inputs = p.projector.data ? p.projector.inputs : p.router.inputs, experts = p.router.outputs;
  Arena counter(nullptr);
  RouterMemory<A>(counter, p, inputs);
  Arena arena(thread_memory(counter.used()));
  const RouterMemory<A> m(arena, p, inputs);
  const auto* bias = bias_of<A>(p.projector, 0);
  for (int64_t first = begin; first < end; first += kRouterRows) {
    const int rows = int(std::min(kRouterRows, end - first));
    for (int i = 0; i < rows; ++i) {
      A* token = m.tokens + i * m.token_row;
      const A* from = static_cast<const A*>(p.x) + (first + i) * inputs;
      S* to = static_cast<S*>(p.rows) + (first + i) * inputs;
      if (p.norm.weight && inputs % kLanes<A> == 0) {
        normalized_row(from, inputs, p.norm, [&](int index, Vector<A> x) __attribute__((always_inline)) {
          store(token + index * kLanes<A>, x);
          store_vector<S, A>(to + index * kLanes<A>, x);
        });
        continue;
      }
      load_row(from, token, int(inputs));
      std::fill(token + inputs, token + whole_vectors<A>(inputs), A(0));
      if (p.norm.weight) normalize_row(token, inputs, p.norm);
      put_elements(token, to, inputs);
    }
    Rows<A> a{m.tokens, m.token_row};
    if (p.projector.data) {
      number_product<A>(rows, a, p.projector, {m.points, m.point_row});
      for (int i = 0; i < rows; ++i) normalize_point(m.points + i * m.point_row, bias, p.projector.outputs);
      a = {m.points, m.point_row};
    }
    number_product<A>(rows, a, p.router, {m.logits, m.logit_row});
    for (int i = 0; i < rows; ++i) {
      A* logits = m.logits + i * m.logit_row;
      score_row(logits, experts, p.sigmoid);
      std::copy(logits, logits + experts, static_cast<A*>(p.scores) + (first + i) * experts);
    }
  }
}

// out = residual + after(inner + sum over kept choices, in their order, of gate * y).
template <class Operand>
void combine_tokens(const PackedCombine& p, int64_t begin, int64_t end) {
  using A = typename Operand::Sum;
  const int64_t outputs = p.outputs, whole = whole_vectors<A>(outputs);
  Arena arena(thread_memory(whole * int64_t(sizeof(A)) + 128));
  A* sums = arena.take<A>(whole);
  auto* gate = static_cast<const A*>(p.gate);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t cell = t * p.choices;
    bool any = false;
    std::fill(sums, sums + whole, A(0));
    for (int64_t n = cell; n < cell + p.choices; ++n) {
      if (!p.keep[n]) continue;
      any = true;
      if (p.only_dropped) break;
      auto* y = static_cast<const A*>(p.y) + p.position[n] * outputs;
      int64_t c = 0;
      for (; c + kLanes<A> <= outputs; c += kLanes<A>) store(sums + c, load(sums + c) + load(y + c) * gate[n]);
      for (; c < outputs; ++c) sums[c] += y[c] * gate[n];
    }
    if (any && p.only_dropped) continue;
    if (p.inner)
      finish_sums<A>(sums, nullptr, A(1), static_cast<const A*>(p.inner) + t * outputs, outputs);
    if (p.after.weight) normalize_row(sums, outputs, p.after);
    auto* residual = p.residual ? static_cast<const A*>(p.residual) + t * outputs : nullptr;
    write_columns<A, A>(sums, nullptr, residual, static_cast<A*>(p.out) + t * outputs, 0, outputs);
  }
}

}  // namespace SWIN_MOE_CAPABILITY
}  // namespace swin_moe
