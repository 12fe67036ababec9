// The forward kernel: window by window and head by head, blocks of rows of scores that stay in the cache.
#pragma once

#include "window_resident.h"
#include "window_scores.h"

namespace swin_moe {
namespace SWIN_MOE_CAPABILITY {

template <class Operand>
struct ForwardMemory {
  using F = typename Operand::Factor;
  using A = typename Operand::Sum;
  WindowTokens<A> tokens[2];            // of the current window and the next
  F *queries, *keys, *values;           // (N, row)
  F *key_columns, *stacked_values;      // (row, Np), (token_depth, Dp)
  A *query_factors, *key_factors;       // (N), (Np)
  A* numbers;                           // (Dp)
  int64_t zeroed;                       // bytes, of all above: what stands beyond N and D is read
  A *bias, *reversed;                   // (heads of the task, N, Np), (reversed_size)
  A *scores, *sums, *out;               // (block, Np), (block), (block, Dp)
  F* weights;                           // (block, Np / kPerFactor)

  ForwardMemory(Arena& arena, const WindowGeometry& g, const Sizes<Operand>& n, int heads) {
    for (auto& window : tokens) window.take(arena, n.tokens, n.padded_tokens);
    for (F** rows : {&queries, &keys, &values}) *rows = arena.take<F>(n.tokens * n.row);
    key_columns = arena.take<F>(n.row * n.padded_tokens);
    stacked_values = arena.take<F>(n.token_depth * n.padded_dim);
    query_factors = arena.take<A>(n.tokens);
    key_factors = arena.take<A>(n.padded_tokens);
    numbers = arena.take<A>(n.padded_dim);
    zeroed = arena.used();
    bias = arena.take<A>(int64_t(heads) * n.tokens * n.padded_tokens + kLanes<A>);
    reversed = arena.take<A>(reversed_size<A>(g));
    scores = arena.take<A>(n.block * n.padded_tokens);
    sums = arena.take<A>(n.block);
    out = arena.take<A>(n.block * n.padded_dim);
    weights = Operand::kPerFactor == 1 ? reinterpret_cast<F*>(scores)
                                       : arena.take<F>(n.block * n.padded_tokens / Operand::kPerFactor);
  }
};

// Writes the weights of a block of rows of scores from row `first` on, and their sums.
template <class Operand>
void write_weights(const WindowAttention& p, const Sizes<Operand>& n, ForwardMemory<Operand>& m,
                   const WindowTokens<typename Operand::Sum>& tokens, typename Operand::Sum factor,
                   const typename Operand::Sum* bias, const RowsAhead& ahead, int first, int rows) {
  using A = typename Operand::Sum;
  if constexpr (kHasResident<Operand>) {
    if (n.resident) {
      bias += int64_t(first) * n.padded_tokens;
      if (tokens.masked) bias = masked_bias(tokens, bias, n.padded_tokens, p.mask_value, first, rows, m.scores);
      resident_weights<Operand>({m.queries + first * n.row, n.row, m.key_columns, n.dim_depth, factor * kLog2E,
                                 m.query_factors + first, p.logit_scale ? m.key_factors : nullptr, bias, m.scores,
                                 m.weights, m.sums, ahead, first},
                                n.rows_of_vectors(), rows);
      return;
    }
  }
  product<Operand>(rows, n.rows_of_vectors(), n.dim_depth, {m.queries + first * n.row, n.row, 1},
                   {m.key_columns, n.padded_tokens}, {m.scores, n.padded_tokens});
  for (int i = 0; i < rows; ++i) {
    int query = first + i;
    ScoreRow<A> row{p.logit_scale ? factor * m.query_factors[query] : factor,
                    p.logit_scale ? m.key_factors : nullptr,
                    bias + query * n.padded_tokens,
                    tokens.masked ? tokens.side : nullptr,
                    tokens.side[query],
                    A(p.mask_value)};
    auto* weights = m.weights + i * (n.padded_tokens / Operand::kPerFactor);
    m.sums[i] = exponentials(m.scores + i * n.padded_tokens, row, n.rows_of_vectors(),
                             [&](int index, Vector<A> x) { Operand::put_weight(weights, index, x); });
    RowsAhead::ask(ahead, query);
  }
}

// Attends in one window with one head, whose bias is given, and writes the results of the tokens that exist.
template <class S, class Operand>
void attend(const WindowAttention& p, const Sizes<Operand>& n, ForwardMemory<Operand>& m,
            const WindowTokens<typename Operand::Sum>& tokens, int head, const typename Operand::Sum* bias,
            const Upcoming& upcoming) {
  using A = typename Operand::Sum;
  auto* qkv = static_cast<const S*>(p.qkv);
  auto* pad = static_cast<const S*>(p.pad_qkv);
  const int64_t channel = int64_t(head) * p.head_dim;
  const RowsAhead ahead = RowsAhead::of<S>(upcoming, p);
  read_rows(qkv, 3 * p.channels, channel, pad, tokens.source, n, m.queries);
  read_rows(qkv, 3 * p.channels, channel + p.channels, pad, tokens.source, n, m.keys);
  read_rows(qkv, 3 * p.channels, channel + 2 * p.channels, pad, tokens.source, n, m.values);
  A factor = A(p.scale);
  if (p.logit_scale) {
    factor = static_cast<const A*>(p.logit_scale)[head];
    inverse_lengths(m.queries, n, m.numbers, m.query_factors);
    inverse_lengths(m.keys, n, m.numbers, m.key_factors);
  }
  transpose_rows<Operand>(m.keys, n, m.key_columns);
  auto* values = Operand::stacked(m.values, n.row, n.tokens, n.padded_dim, m.stacked_values);
  const int weights_row = n.padded_tokens / Operand::kPerFactor;
  for (int first = 0; first < n.tokens; first += n.block) {
    int rows = std::min(n.block, n.tokens - first);
    write_weights(p, n, m, tokens, factor, bias, ahead, first, rows);
    product<Operand>(rows, n.dim_vectors(), n.token_depth, {m.weights, weights_row, 1}, {values, n.padded_dim},
                     {m.out, n.padded_dim});
    for (int i = 0; i < rows; ++i) {
      int64_t token = tokens.source[first + i];
      if (token == kPadding) continue;
      A* out = m.out + i * n.padded_dim;
      A inverse = A(1) / m.sums[i];
      for (int c = 0; c < n.padded_dim; c += kLanes<A>) store(out + c, load(out + c) * inverse);
      store_row(static_cast<S*>(p.out) + token * p.channels + channel, out, n.head_dim);
    }
  }
}

template <class S, class Operand>
void forward(const WindowAttention& p, const WindowTask& task) {
  using A = typename Operand::Sum;
  Sizes<Operand> n(p);
  if constexpr (kHasResident<Operand>) keep_in_registers(n);
  const int heads = task.head_end - task.head_begin;
  Arena counter(nullptr);
  const int64_t zeroed = ForwardMemory<Operand>(counter, p.geometry, n, heads).zeroed;
  char* base = thread_memory(counter.used());
  if (!n.is_full()) std::memset(base, 0, zeroed);
  Arena arena(base);
  ForwardMemory<Operand> memory(arena, p.geometry, n, heads);
  const int64_t bias_size = int64_t(n.tokens) * n.padded_tokens;
  const A unit = n.resident ? A(kLog2E) : A(1);  // exponentials are powers of two, or of e
  spread_biases(p, task, n.padded_tokens, unit, memory.reversed, memory.bias);
  for_each_window(p, task, memory.tokens, [&](const WindowTokens<A>& tokens, int head, const Upcoming& upcoming) {
    attend<S>(p, n, memory, tokens, head, memory.bias + (head - task.head_begin) * bias_size, upcoming);
  });
}

}  // namespace SWIN_MOE_CAPABILITY
}  // namespace swin_moe
