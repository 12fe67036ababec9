// The backward kernel: scores and weights are computed again from queries and keys, nothing else was kept.
//
// With s_ij = f_ij q_i . k_j + bias, where f_ij is `scale`, or logit_scale / (|q_i| |k_j|) for cosine scores, and dS the
// gradient of the scores: grad_q_i = sum_j f_ij dS_ij k_j and grad_k_j = sum_i f_ij dS_ij q_i. For cosine scores the part
// along the vector itself is taken off, x (x . grad) / |x|^2, because lengths have no influence; where a length was
// below the smallest allowed one it is a constant, and nothing is taken off. The gradient of logit_scale is
// sum_ij dS_ij f_ij q_i . k_j / logit_scale, of the unrounded dS: its terms nearly cancel.
#pragma once

#include "window_forward.h"

namespace swin_moe {
namespace SWIN_MOE_CAPABILITY {

template <class Operand>
struct BackwardMemory {
  using F = typename Operand::Factor;
  using A = typename Operand::Sum;
  WindowTokens<A> tokens[2];                          // of the current window and the next
  A *bias, *grad_bias;                                // (heads of the task, N, Np)
  F *queries, *keys, *values, *grad_out;              // (N, row)
  F *key_columns, *value_columns;                     // (row, Np)
  F *stacked_queries, *stacked_keys, *stacked_grad;   // (token_depth, Dp)
  A *query_factors, *key_factors;                     // (N), (Np)
  A *weights, *grad_scores;                           // (block, Np)
  A* cosines;                                         // (Np), times logit_scale, of one row
  F *weight_rows, *grad_score_rows;                   // (block, Np / kPerFactor)
  F *stacked_weights, *stacked_grad_scores;           // (block / kPerFactor, Np)
  A *grad_queries, *grad_keys, *grad_values;          // (block, Dp), (N, Dp), (N, Dp)
  A *numbers, *none;                                  // (Dp), a row of zeros (Dp)
  A* reversed;                                        // (reversed_size)

  BackwardMemory(Arena& arena, const WindowGeometry& g, const Sizes<Operand>& n, int heads) {
    constexpr bool kConverted = Operand::kPerFactor > 1;
    for (auto& window : tokens) window.take(arena, n.tokens, n.padded_tokens);
    for (A** matrix : {&bias, &grad_bias}) *matrix = arena.take<A>(int64_t(heads) * n.tokens * n.padded_tokens);
    for (F** rows : {&queries, &keys, &values, &grad_out}) *rows = arena.take<F>(n.tokens * n.row);
    for (F** columns : {&key_columns, &value_columns}) *columns = arena.take<F>(n.row * n.padded_tokens);
    for (F** stacked : {&stacked_queries, &stacked_keys, &stacked_grad})
      *stacked = kConverted ? arena.take<F>(n.token_depth * n.padded_dim) : nullptr;
    query_factors = arena.take<A>(n.tokens);
    key_factors = arena.take<A>(n.padded_tokens);
    for (A** block : {&weights, &grad_scores}) *block = arena.take<A>(n.block * n.padded_tokens);
    cosines = arena.take<A>(n.padded_tokens);
    weight_rows = reinterpret_cast<F*>(weights);
    grad_score_rows = reinterpret_cast<F*>(grad_scores);
    stacked_weights = stacked_grad_scores = nullptr;
    if (kConverted) {
      for (F** rows : {&weight_rows, &grad_score_rows, &stacked_weights, &stacked_grad_scores})
        *rows = arena.take<F>(n.block * n.padded_tokens / Operand::kPerFactor);
    }
    grad_queries = arena.take<A>(n.block * n.padded_dim);
    for (A** grads : {&grad_keys, &grad_values}) *grads = arena.take<A>(n.tokens * n.padded_dim);
    for (A** row : {&numbers, &none}) *row = arena.take<A>(n.padded_dim);
    reversed = arena.take<A>(reversed_size<A>(g));
  }
};

// One head of one task: where its rows and gradients are.
template <class S, class Operand>
class HeadBackward {
  using F = typename Operand::Factor;
  using A = typename Operand::Sum;

 public:
  HeadBackward(const WindowAttention& p, const Sizes<Operand>& n, BackwardMemory<Operand>& m, const WindowTask& task,
               const WindowTokens<A>& tokens, int head, const Upcoming& upcoming)
      : p_(p), n_(n), m_(m), tokens_(tokens), upcoming_(upcoming), channel_(int64_t(head) * p.head_dim) {
    const int64_t matrix = int64_t(head - task.head_begin) * n.tokens * n.padded_tokens;
    bias_ = m.bias + matrix;
    grad_bias_ = m.grad_bias + matrix;
    factor_ = p.logit_scale ? static_cast<const A*>(p.logit_scale)[head] : A(p.scale);
    if (p.grad_pad_qkv) grad_pad_ = p.grad_pad_qkv + task.share * 3 * p.channels + channel_;
    if (p.logit_scale) grad_logit_scale_ = p.grad_logit_scale + task.share * p.num_heads + head;
  }

  // Adds this window's part of all gradients.
  void window() {
    read();
    const F* keys = Operand::stacked(m_.keys, n_.row, n_.tokens, n_.padded_dim, m_.stacked_keys);
    const F* queries = Operand::stacked(m_.queries, n_.row, n_.tokens, n_.padded_dim, m_.stacked_queries);
    const F* grad = Operand::stacked(m_.grad_out, n_.row, n_.tokens, n_.padded_dim, m_.stacked_grad);
    for (int first = 0; first < n_.tokens; first += n_.block) {
      int rows = std::min(n_.block, n_.tokens - first);
      scores(first, rows);
      const int row = n_.padded_tokens / Operand::kPerFactor;
      product<Operand>(rows, n_.dim_vectors(), n_.token_depth, {m_.grad_score_rows, row, 1}, {keys, n_.padded_dim},
                       {m_.grad_queries, n_.padded_dim});
      for (int i = 0; i < rows; ++i)
        write(m_.grad_queries + i * n_.padded_dim, first + i, 0, m_.queries, m_.query_factors);
      const F* weights = Operand::stacked(m_.weight_rows, row, rows, n_.padded_tokens, m_.stacked_weights);
      const F* grads = Operand::stacked(m_.grad_score_rows, row, rows, n_.padded_tokens, m_.stacked_grad_scores);
      transposed_product(first, rows, grads, queries, m_.grad_keys);
      transposed_product(first, rows, weights, grad, m_.grad_values);
    }
    for (int t = 0; t < n_.tokens; ++t) {
      write(m_.grad_keys + t * n_.padded_dim, t, 1, m_.keys, m_.key_factors);
      write(m_.grad_values + t * n_.padded_dim, t, 2, nullptr, nullptr);
    }
  }

 private:
  void read() {
    auto* qkv = static_cast<const S*>(p_.qkv);
    auto* pad = static_cast<const S*>(p_.pad_qkv);
    const int64_t* source = tokens_.source;
    read_rows(qkv, 3 * p_.channels, channel_, pad, source, n_, m_.queries);
    read_rows(qkv, 3 * p_.channels, channel_ + p_.channels, pad, source, n_, m_.keys);
    read_rows(qkv, 3 * p_.channels, channel_ + 2 * p_.channels, pad, source, n_, m_.values);
    auto* no_gradient = reinterpret_cast<const S*>(m_.none) - channel_;  // results of padding were dropped
    read_rows(static_cast<const S*>(p_.grad_out), p_.channels, channel_, no_gradient, source, n_, m_.grad_out);
    if (p_.logit_scale) {
      inverse_lengths(m_.queries, n_, m_.numbers, m_.query_factors);
      inverse_lengths(m_.keys, n_, m_.numbers, m_.key_factors);
    }
    transpose_rows<Operand>(m_.keys, n_, m_.key_columns);
    transpose_rows<Operand>(m_.values, n_, m_.value_columns);
  }

  // Fills weight_rows with the weights and grad_score_rows with f_ij dS_ij of some queries, and adds to grad_bias.
  void scores(int first, int rows) {
    const int vectors = n_.rows_of_vectors(), Np = n_.padded_tokens;
    product<Operand>(rows, vectors, n_.dim_depth, {m_.queries + first * n_.row, n_.row, 1}, {m_.key_columns, Np},
                     {m_.weights, Np});
    product<Operand>(rows, vectors, n_.dim_depth, {m_.grad_out + first * n_.row, n_.row, 1}, {m_.value_columns, Np},
                     {m_.grad_scores, Np});
    for (int i = 0; i < rows; ++i) {
      const int query = first + i;
      const bool cosine = p_.logit_scale;
      ScoreRow<A> row{cosine ? factor_ * m_.query_factors[query] : factor_,
                      cosine ? m_.key_factors : nullptr,
                      bias_ + int64_t(query) * Np,
                      tokens_.masked ? tokens_.side : nullptr,
                      tokens_.side[query],
                      A(p_.mask_value),
                      cosine ? m_.cosines : nullptr};
      A *weights = m_.weights + i * Np, *grads = m_.grad_scores + i * Np;
      Vector<A> along = {};
      A sum = exponentials(weights, row, vectors, [&](int index, Vector<A> x) {
        store(weights + index * kLanes<A>, x);
        along += x * load(grads + index * kLanes<A>);
      });
      softmax_gradient(row, A(1) / sum, sum_of_lanes<A>(along) / sum, i, grad_bias_ + int64_t(query) * Np);
      prefetch_rows(query);
    }
  }

  // From exponentials and the gradients of the weights to rows of factors. mean: weighted mean of those gradients.
  void softmax_gradient(const ScoreRow<A>& row, A inverse, A mean, int i, A* grad_bias) {
    const int Np = n_.padded_tokens, factors = Np / Operand::kPerFactor;
    A *weights = m_.weights + i * Np, *grads = m_.grad_scores + i * Np;
    Vector<A> with_scale = {};
    for (int index = 0; index < n_.rows_of_vectors(); ++index) {
      const int at = index * kLanes<A>;
      Vector<A> weight = load(weights + at) * inverse;
      Vector<A> grad = weight * (load(grads + at) - mean);
      store(grad_bias + at, load(grad_bias + at) + grad);
      Operand::put(m_.weight_rows + i * factors, index, weight);
      Operand::put(m_.grad_score_rows + i * factors, index, ScoreRow<A>::scaled(row, grad, at));
      if (row.kept) with_scale += grad * load(row.kept + at);
    }
    if (row.kept) *grad_logit_scale_ += double(sum_of_lanes<A>(with_scale)) / double(factor_);
  }

  // Asks for what the next window and head read, and for where this one writes.
  void prefetch_rows(int t) {
    prefetch_qkv<S>(upcoming_, p_, t);
    if (upcoming_.source && upcoming_.source[t] != kPadding)
      prefetch<false>(static_cast<const S*>(p_.grad_out) + upcoming_.source[t] * p_.channels +
                          int64_t(upcoming_.head) * p_.head_dim,
                      p_.head_dim);
    if (tokens_.source[t] == kPadding) return;
    const S* to = static_cast<const S*>(p_.grad_qkv) + tokens_.source[t] * 3 * p_.channels + channel_;
    for (int part = 0; part < 3; ++part) prefetch<true>(to + part * p_.channels, p_.head_dim);
  }

  // sum[N x D] (+)= rows^T x, over queries from `first`; set rather than added to for the first ones.
  void transposed_product(int first, int rows, const F* stacked_rows, const F* x, A* sum) {
    const int depth = (rows + Operand::kPerFactor - 1) / Operand::kPerFactor;
    Strided<F> transposed{stacked_rows, 1, n_.padded_tokens};
    Rows<const F> factors{x + int64_t(first / Operand::kPerFactor) * n_.padded_dim, n_.padded_dim};
    Rows<A> sums{sum, n_.padded_dim};
    if (first == 0)
      product<Operand, false>(n_.tokens, n_.dim_vectors(), depth, transposed, factors, sums);
    else
      product<Operand, true>(n_.tokens, n_.dim_vectors(), depth, transposed, factors, sums);
  }

  // Writes the gradient of queries (part 0), keys (1) or values (2) of one token; `vectors` and their inverse lengths
  // are null where nothing was normalized.
  void write(A* grad, int t, int part, const F* vectors, const A* inverse) {
    if (vectors && p_.logit_scale) take_off_length(grad, vectors + t * n_.row, inverse[t]);
    const int64_t token = tokens_.source[t], channel = part * p_.channels;
    if (token != kPadding) {
      auto* to = static_cast<S*>(p_.grad_qkv) + token * 3 * p_.channels + channel_ + channel;
      store_row(to, grad, n_.head_dim);
    } else {
      for (int c = 0; c < n_.head_dim; ++c) grad_pad_[channel + c] += grad[c];
    }
  }

  void take_off_length(A* grad, const F* vector, A inverse) {
    if (inverse >= A(1 / kNormEps)) return;
    const A* x = Operand::numbers(vector, m_.numbers, n_.padded_dim);
    Vector<A> products = {};
    for (int c = 0; c < n_.padded_dim; c += kLanes<A>) products += load(x + c) * load(grad + c);
    const A share = sum_of_lanes<A>(products) * inverse * inverse;
    for (int c = 0; c < n_.padded_dim; c += kLanes<A>) store(grad + c, load(grad + c) - share * load(x + c));
  }

  const WindowAttention& p_;
  const Sizes<Operand>& n_;
  BackwardMemory<Operand>& m_;
  const WindowTokens<A>& tokens_;
  const Upcoming& upcoming_;
  const int64_t channel_;
  A *bias_, *grad_bias_;
  double *grad_pad_ = nullptr, *grad_logit_scale_ = nullptr;
  A factor_;
};

// Adds the gradients of all (query, key) pairs of a head to the rows of its table, in the order of the pairs.
template <class A>
void gather_bias(const WindowGeometry& g, const A* grad_bias, int padded_tokens, double* grad_table) {
  for (int query = 0; query < g.tokens(); ++query, grad_bias += padded_tokens)
    for (int key_y = 0; key_y < g.window_h; ++key_y) {
      double* last = grad_table + bias_row(g, query, key_y * g.window_w);
      for (int key_x = 0; key_x < g.window_w; ++key_x) last[-key_x] += grad_bias[key_y * g.window_w + key_x];
    }
}

template <class S, class Operand>
void backward(const WindowAttention& p, const WindowTask& task) {
  using A = typename Operand::Sum;
  const Sizes<Operand> n(p);
  const int heads = task.head_end - task.head_begin;
  Arena counter(nullptr);
  BackwardMemory<Operand>(counter, p.geometry, n, heads);
  Arena arena(zeroed_thread_memory(counter.used()));
  BackwardMemory<Operand> memory(arena, p.geometry, n, heads);
  const int64_t bias_size = int64_t(n.tokens) * n.padded_tokens, table = p.geometry.table_rows();
  spread_biases(p, task, n.padded_tokens, A(1), memory.reversed, memory.bias);
  for_each_window(p, task, memory.tokens, [&](const WindowTokens<A>& tokens, int head, const Upcoming& upcoming) {
    HeadBackward<S, Operand>(p, n, memory, task, tokens, head, upcoming).window();
  });
  for (int h = 0; h < heads; ++h) {
    double* grad_table = p.grad_bias_table + (task.share * p.num_heads + task.head_begin + h) * table;
    gather_bias(p.geometry, memory.grad_bias + h * bias_size, n.padded_tokens, grad_table);
  }
}

}  // namespace SWIN_MOE_CAPABILITY
}  // namespace swin_moe
