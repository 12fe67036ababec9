// What forward and backward share: the sizes of a window's matrices, its rows of factors, and one row of scores.
//
// Shape legend: N tokens of a window, Np = N in whole vectors, D = head_dim, Dp = D in whole vectors. Columns from N to
// Np hold scores of -1e30, so that their weights are 0.
#pragma once

#include "cpu/memory.h"
#include "cpu/product.h"

namespace swin_moe {
namespace SWIN_MOE_CAPABILITY {

constexpr double kNoToken = -1e30;   // bias of the columns behind the last token
constexpr double kNormEps = 1e-12;   // smallest length a query or key is divided by, as torch's normalize

SWIN_MOE_INLINE int round_up(int n, int unit) { return (n + unit - 1) / unit * unit; }

template <class Operand>
struct Sizes {
  using F = typename Operand::Factor;
  using A = typename Operand::Sum;
  int tokens, padded_tokens;   // N, Np
  int head_dim, padded_dim;    // D, Dp
  int row;                     // factors of a row of D elements, in whole vectors
  int dim_depth, token_depth;  // factors along D and along N
  int block;                   // rows of scores held at once, even
  bool resident = false;       // rows of scores stay in registers, see window_resident.h

  explicit Sizes(const WindowAttention& p)
      : tokens(p.geometry.tokens()),
        padded_tokens(round_up(tokens, kLanes<A>)),
        head_dim(p.head_dim),
        padded_dim(round_up(head_dim, kLanes<A>)),
        dim_depth((head_dim + Operand::kPerFactor - 1) / Operand::kPerFactor),
        token_depth((tokens + Operand::kPerFactor - 1) / Operand::kPerFactor) {
    row = round_up(dim_depth, kLanes<F>);
    constexpr int kBlockBytes = 32 << 10;  // a block of scores stays in the first-level cache or close to it
    int fitting = kBlockBytes / (padded_tokens * int(sizeof(A)));
    block = std::min(round_up(tokens, 2), std::max(24, fitting / 2 * 2));
  }

  int rows_of_vectors() const { return padded_tokens / kLanes<A>; }
  // Whether nothing stands beyond N and D in whole vectors.
  bool is_full() const { return tokens == padded_tokens && row * Operand::kPerFactor == head_dim; }
  int dim_vectors() const { return padded_dim / kLanes<A>; }
};

// Where the tokens of a window are.
template <class A>
struct WindowTokens {
  int64_t* source;        // (N), token of the whole batch, or kPadding
  IntegerOf<A>* side;     // (Np), side of the seam
  bool masked = false;

  void take(Arena& arena, int tokens, int padded_tokens) {
    source = arena.take<int64_t>(tokens);
    side = arena.take<IntegerOf<A>>(padded_tokens);
  }
  void enter(const WindowGeometry& g, int64_t window_of_batch) {
    const int64_t image = window_of_batch / g.windows(), window = window_of_batch % g.windows();
    const int64_t first = image * g.height * g.width, row = window / g.columns, column = window % g.columns;
    masked = crosses_seam(g, window);
    // As source_token and seam_side, without their divisions.
    for (int y = 0, t = 0; y < g.window_h; ++y) {
      int64_t of_y = row * g.window_h + y + g.shift_h;
      of_y -= of_y >= g.rows * g.window_h ? g.rows * g.window_h : 0;
      const bool below = row == g.rows - 1 && y >= g.window_h - g.shift_h;
      for (int x = 0; x < g.window_w; ++x, ++t) {
        int64_t of_x = column * g.window_w + x + g.shift_w;
        of_x -= of_x >= g.columns * g.window_w ? g.columns * g.window_w : 0;
        source[t] = of_y < g.height && of_x < g.width ? first + of_y * g.width + of_x : kPadding;
        side[t] = 2 * below + (column == g.columns - 1 && x >= g.window_w - g.shift_w);
      }
    }
  }
};

// Copies the part of every token that starts at `channel` into rows of factors; padding reads `pad`.
template <class Operand, class S>
SWIN_MOE_INLINE void read_rows(const S* map, int64_t channels, int64_t channel, const S* pad, const int64_t* source,
                               const Sizes<Operand>& n, typename Operand::Factor* rows) {
  for (int t = 0; t < n.tokens; ++t) {
    const S* token = source[t] == kPadding ? pad : map + source[t] * channels;
    Operand::read(token + channel, rows + t * n.row, n.head_dim);
  }
}

// Asks for the elements of one token to be brought near, of which `from` points to the first.
template <bool kToWrite, class S>
SWIN_MOE_INLINE void prefetch(const S* from, int count) {
  auto* byte = reinterpret_cast<const char*>(from);
  for (int64_t at = 0; at < count * int64_t(sizeof(S)); at += 64)
    __builtin_prefetch(byte + at, kToWrite ? 1 : 0, kToWrite ? 3 : 2);
}

// The window and head that come after the current ones. Their rows are asked for one token at a time between rows of
// scores: reading them waits for memory otherwise, two thirds of the time of small windows.
struct Upcoming {
  const int64_t* source = nullptr;  // null: nothing comes
  int head = 0;
};

// Rows of three parts of memory, by token.
struct RowsAhead {
  const int64_t* source = nullptr;  // null: nothing comes
  const char* first = nullptr;      // the first part of token 0
  int64_t token_bytes = 0, part_bytes = 0, row_bytes = 0;

  template <class S>
  static RowsAhead of(const Upcoming& next, const WindowAttention& p) {
    return {next.source, reinterpret_cast<const char*>(static_cast<const S*>(p.qkv) + int64_t(next.head) * p.head_dim),
            3 * p.channels * int64_t(sizeof(S)), p.channels * int64_t(sizeof(S)), p.head_dim * int64_t(sizeof(S))};
  }
  SWIN_MOE_INLINE void ask(const RowsAhead& rows, int token) {
    if (!rows.source || rows.source[token] == kPadding) return;
    const char* part = rows.first + rows.source[token] * rows.token_bytes;
    for (int number = 0; number < 3; ++number, part += rows.part_bytes) prefetch<false>(part, int(rows.row_bytes));
  }
};

template <class S>
SWIN_MOE_INLINE void prefetch_qkv(const Upcoming& next, const WindowAttention& p, int token) {
  RowsAhead::ask(RowsAhead::of<S>(next, p), token);
}

// Runs visit(tokens, head, upcoming) for all windows and heads of a task.
template <class A, class Visit>
SWIN_MOE_INLINE void for_each_window(const WindowAttention& p, const WindowTask& task, WindowTokens<A>* tokens,
                                     Visit visit) {
  tokens[0].enter(p.geometry, task.window_begin);
  for (int64_t window = task.window_begin; window < task.window_end; ++window) {
    WindowTokens<A>& current = tokens[(window - task.window_begin) % 2];
    WindowTokens<A>& next = tokens[(window - task.window_begin + 1) % 2];
    const bool last = window + 1 == task.window_end;
    if (!last) next.enter(p.geometry, window + 1);
    for (int head = task.head_begin; head < task.head_end; ++head) {
      Upcoming upcoming;
      if (head + 1 < task.head_end)
        upcoming = {current.source, head + 1};
      else if (!last)
        upcoming = {next.source, task.head_begin};
      else if (task.head_end < p.num_heads && task.window_end - task.window_begin == 1)
        upcoming = {current.source, task.head_end};  // of the next task
      visit(current, head, upcoming);
    }
  }
}

// Writes the transpose of rows: (factors of a row, Np).
template <class Operand>
__attribute__((noinline)) void transpose_rows(const typename Operand::Factor* rows, const Sizes<Operand>& n,
                                              typename Operand::Factor* columns) {
  using F = typename Operand::Factor;
  for (int t = 0; t < n.padded_tokens; t += kLanes<F>)
    for (int c = 0; c < n.row; c += kLanes<F>)
      transpose_square<F>(rows + t * n.row + c, n.row, n.tokens - t, columns + c * n.padded_tokens + t,
                          n.padded_tokens);
}

// Writes 1 / max(length, eps) of every row.
template <class Operand>
SWIN_MOE_INLINE void inverse_lengths(const typename Operand::Factor* rows, const Sizes<Operand>& n,
                                     typename Operand::Sum* space, typename Operand::Sum* inverse) {
  using A = typename Operand::Sum;
  for (int t = 0; t < n.tokens; ++t) {
    const A* x = Operand::numbers(rows + t * n.row, space, n.padded_dim);
    Vector<A> squares = {};
    for (int c = 0; c < n.padded_dim; c += kLanes<A>) squares += load(x + c) * load(x + c);
    inverse[t] = A(1) / std::max(std::sqrt(sum_of_lanes<A>(squares)), A(kNormEps));
  }
}

// Elements of a bias table whose rows are reversed, see spread_bias.
template <class A>
SWIN_MOE_INLINE int64_t reversed_size(const WindowGeometry& g) {
  return g.table_rows() + kLanes<A>;
}

// Writes the bias of every (query, key) pair of one head, times `unit`: (N, Np). reversed: space for reversed_size. In
// rows of the table that are reversed, the keys of a window's row follow each other.
template <class A>
void spread_bias(const WindowGeometry& g, const A* table, int padded_tokens, A unit, A* reversed, A* bias) {
  const int row = 2 * g.window_w - 1;
  for (int y = 0; y < 2 * g.window_h - 1; ++y)
    for (int x = 0; x < row; ++x) reversed[y * row + x] = table[y * row + row - 1 - x] * unit;
  const int width = g.window_w, tokens = g.tokens();
  for (int query_y = 0; query_y < g.window_h; ++query_y)
    for (int query_x = 0; query_x < width; ++query_x, bias += padded_tokens) {
      const A* from = reversed + (query_y + g.window_h - 1) * row + width - 1 - query_x;  // of the first row of keys
      const int copied = query_y > 0 ? 1 : g.window_h;
      for (int key_y = 0; key_y < copied; ++key_y, from -= row)
        for (int x = 0; x < width; x += kLanes<A>)
          store(bias + key_y * width + x, load(from + x));  // beyond: overwritten next
      if (query_y > 0) {  // the others are those of the query above, one row of keys further
        const A* above = bias - width * padded_tokens - width;
        int key = width;
        if (key < tokens) store(bias + key, load(above + key));
        for (key = round_up(key, kLanes<A>); key < tokens; key += kLanes<A>) store(bias + key, load(above + key));
      }
      for (int key = tokens; key < padded_tokens; ++key) bias[key] = A(kNoToken);
    }
}

// Spreads the tables of the heads of a task: (heads of the task, N, Np), which a vector may be written behind.
template <class A>
void spread_biases(const WindowAttention& p, const WindowTask& task, int padded_tokens, A unit, A* reversed, A* bias) {
  for (int head = task.head_begin; head < task.head_end; ++head) {
    spread_bias(p.geometry, static_cast<const A*>(p.bias_table) + int64_t(head) * p.geometry.table_rows(),
                padded_tokens, unit, reversed, bias);
    bias += int64_t(p.geometry.tokens()) * padded_tokens;
  }
}

// What one row of plain products is turned into scores with.
template <class A>
struct ScoreRow {
  A factor;                    // on the whole row
  const A* key_factors;        // (Np), or null: 1
  const A* bias;               // (Np)
  const IntegerOf<A>* sides;   // (Np), or null: not masked
  IntegerOf<A> side;           // of the query
  A mask_value;
  A* kept = nullptr;           // (Np), gets the scores before bias and mask; null: not needed

  SWIN_MOE_INLINE Vector<A> scaled(const ScoreRow& row, Vector<A> x, int at) {
    x *= row.factor;
    return row.key_factors ? x * load(row.key_factors + at) : x;
  }
};

// Turns a row of plain products into exp(score - largest score), handed to put(index, vector); returns their sum.
template <class A, class Put>
SWIN_MOE_INLINE A exponentials(A* products, const ScoreRow<A>& row, int vectors, Put put) {
  Vector<A> largest = broadcast(A(kNoToken));
  for (int i = 0; i < vectors; ++i) {
    int at = i * kLanes<A>;
    Vector<A> x = ScoreRow<A>::scaled(row, load(products + at), at);
    if (row.kept) store(row.kept + at, x);
    x += load(row.bias + at);
    if (row.sides) x = load(row.sides + at) == row.side ? x : x + row.mask_value;
    store(products + at, x);
    largest = larger<A>(largest, x);
  }
  A most = largest_lane<A>(largest);
  Vector<A> sum = {};
  for (int i = 0; i < vectors; ++i) {
    Vector<A> x = exp_of(load(products + i * kLanes<A>) - most);
    sum += x;
    put(i, x);
  }
  return sum_of_lanes<A>(sum);
}

}  // namespace SWIN_MOE_CAPABILITY
}  // namespace swin_moe
