// Rows of packed layers: where their numbers come from, LayerNorm, GELU, and how results are written.
#pragma once

#include "cpu/memory.h"
#include "packed_matrix.h"

namespace swin_moe {
namespace SWIN_MOE_CAPABILITY {

constexpr int64_t kMostRows = 256, kLeastRows = 24;  // of a block
constexpr int64_t kBlockBytes = 640 << 10;          // of rows and sums of a block, in the second-level cache

template <class A>
SWIN_MOE_INLINE int64_t whole_vectors(int64_t count) {
  return (count + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

template <class A>
const A* bias_of(const PackedMatrix& matrix, int64_t expert) {
  auto* bias = static_cast<const A*>(matrix.bias);
  return bias ? bias + expert * whole_vectors<A>(matrix.outputs) : nullptr;
}

template <class Operand>
const typename Operand::Factor* matrix_of(const PackedMatrix& matrix, int64_t expert) {
  const int64_t bytes = packed_bytes<Operand>(matrix.outputs, matrix.inputs);
  return reinterpret_cast<const typename Operand::Factor*>(static_cast<const char*>(matrix.data) + expert * bytes);
}

// What is read first of panel `number` of an expert's matrix; nothing of no expert.
template <class Operand>
Next start_of(const PackedMatrix& matrix, int64_t expert, int rows, int64_t number) {
  if (expert < 0) return {};
  const Panels<Operand> panels(matrix.outputs);
  const int64_t depth = depth_of<Operand>(matrix.inputs);
  return start_of_panel(rows, panel_of(matrix_of<Operand>(matrix, expert), panels, depth, number), panels, number, 0,
                        depth);
}

// 1 / x to 1 part in 1e7, of normal numbers.
SWIN_MOE_INLINE Vector<float> reciprocal(Vector<float> x) {
#if defined(SWIN_MOE_HAS_AVX512_BF16)
  Vector<float> y = (Vector<float>)_mm512_rcp14_ps((__m512)x);  // and one step of Newton's: a third of a division's time
  return y * (2.0f - x * y);
#else
  return 1.0f / x;
#endif
}

// x times the share of the normal distribution below x. That share, less one half, is an odd function: x P(x^2) / Q(x^2)
// with degrees 4 and 5, fitted for the smallest largest error on [0, 5.5] (1e-7); beyond, it is one half.
SWIN_MOE_INLINE Vector<float> gelu_of(Vector<float> x) {
  const float end = 5.5f;
  Vector<float> near = x < -end ? broadcast(-end) : x;
  near = near > end ? broadcast(end) : near;
  Vector<float> square = near * near;
  Vector<float> p = square * 7.350802206929075e-06f + 4.0967657696455717e-04f;
  Vector<float> q = square * 6.03773514740169e-07f + 1.4714356802869588e-04f;
  p = p * square + 6.145765073597431e-03f;
  q = q * square + 3.2588273752480745e-03f;
  p = p * square + 5.8166828006505966e-02f;
  q = q * square + 4.250158369541168e-02f;
  p = p * square + 3.989415764808655e-01f;
  q = q * square + 3.124581277370453e-01f;
  q = q * square + 1.0f;
  Vector<float> y = x * (near * p * reciprocal(q) + 0.5f);
  return x < -end ? Vector<float>{} : y;
}

SWIN_MOE_INLINE Vector<double> gelu_of(Vector<double> x) {
  Vector<double> y;
  for (int i = 0; i < kLanes<double>; ++i) y[i] = 0.5 * x[i] * std::erfc(-x[i] * 0.70710678118654752440);
  return y;
}

// Writes a vector of sums into a row of factors, rounded by the processor where it has an instruction for it.
template <class Operand>
SWIN_MOE_INLINE void put_rounded(typename Operand::Factor* row, int index, Vector<typename Operand::Sum> x) {
#if defined(SWIN_MOE_HAS_AVX512_BF16)
  if constexpr (Operand::kPerFactor == 2) {
    auto* to = reinterpret_cast<__m256i*>(reinterpret_cast<uint16_t*>(row) + index * kLanes<float>);
    return _mm256_storeu_si256(to, (__m256i)_mm512_cvtneps_pbh((__m512)x));
  }
#endif
  Operand::put(row, index, x);
}

template <class T, class A>
SWIN_MOE_INLINE void store_vector(T* to, Vector<A> x) {
  if constexpr (std::is_same_v<T, A>) {
    store(to, x);
  } else {
#if defined(SWIN_MOE_HAS_AVX512_BF16)
    if constexpr (std::is_same_v<T, BFloat16>)
      return _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)x));
#endif
    store_narrow(to, x);
  }
}

// Sums of terms(c) of all whole vectors of a row of `count` numbers, in four parts: one alone waits for each addition.
template <class A, class Terms>
SWIN_MOE_INLINE A sum_of_row(int64_t count, Terms terms) {
  constexpr int kParts = 4;
  Vector<A> sums[kParts] = {};
  int64_t c = 0;
  for (; c + kParts * kLanes<A> <= count; c += kParts * kLanes<A>)
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i) sums[i] += terms(c + i * kLanes<A>);
  for (; c + kLanes<A> <= count; c += kLanes<A>) sums[0] += terms(c);
  return sum_of_lanes<A>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Hands the vectors of a normalized row of `count` numbers to put(index, vector), which may write them over the row. There
// are zeros behind the row to a whole vector, as behind weight and bias.
template <class A, class Put>
SWIN_MOE_INLINE void normalized_row(const A* row, int64_t count, const RowNorm& norm, Put put) {
  auto *weight = static_cast<const A*>(norm.weight), *bias = static_cast<const A*>(norm.bias);
  const int64_t whole = count / kLanes<A> * kLanes<A>;
  A total = sum_of_row<A>(count, [&](int64_t c) __attribute__((always_inline)) { return load(row + c); });
  for (int64_t i = whole; i < count; ++i) total += row[i];
  const A mean = total / A(count);
  A squares = sum_of_row<A>(count, [&](int64_t c) __attribute__((always_inline)) {
    const Vector<A> x = load(row + c) - mean;
    return x * x;
  });
  for (int64_t i = whole; i < count; ++i) squares += (row[i] - mean) * (row[i] - mean);
  const A scale = A(1) / std::sqrt(squares / A(count) + A(norm.eps));
  for (int64_t c = 0; c < count; c += kLanes<A>) {
    const Vector<A> factor = load(weight + c) * scale;
    put(int(c / kLanes<A>), (load(row + c) - mean) * factor + load(bias + c));
  }
}

template <class A>
void normalize_row(A* row, int64_t count, const RowNorm& norm) {
  normalized_row(row, count, norm,
                 [&](int index, Vector<A> x) __attribute__((always_inline)) { store(row + index * kLanes<A>, x); });
}

// Copies count numbers of accumulated type or of S.
template <class S, class A>
SWIN_MOE_INLINE void read_numbers(const PackedLayers& p, int64_t at, int64_t count, A* to) {
  if (p.accumulated_in)
    load_row(static_cast<const A*>(p.x) + at, to, int(count));
  else
    load_row(static_cast<const S*>(p.x) + at, to, int(count));
}

// Writes the 2 x 2 tokens that a merged row joins, in the order of the official cat; zeros beyond the map.
template <class S, class A>
void read_merged(const PackedLayers& p, int64_t image, int64_t row, int64_t column, A* to) {
  for (int part = 0; part < 4; ++part, to += p.channels) {
    int64_t y = 2 * row + part % 2, x = 2 * column + part / 2;
    if (y < p.height && x < p.width)
      read_numbers<S>(p, ((image * p.height + y) * p.width + x) * p.channels, p.channels, to);
    else
      std::fill_n(to, p.channels, A(0));
  }
}

constexpr int kPatch = 4;  // the width that nearly all networks have: its copy is one instruction

// Writes the pixels of a patch, (channels, patch_h, patch_w); zeros beyond the image.
template <class S, class A>
void read_patch(const PackedLayers& p, int64_t image, int64_t row, int64_t column, A* to) {
  for (int64_t channel = 0; channel < p.channels; ++channel)
    for (int64_t i = 0; i < p.patch_h; ++i, to += p.patch_w) {
      int64_t y = row * p.patch_h + i, x = column * p.patch_w;
      int64_t inside = y < p.height ? std::clamp<int64_t>(p.width - x, 0, p.patch_w) : 0;
      const int64_t from = ((image * p.channels + channel) * p.height + y) * p.width + x;
      if (p.accumulated_in && inside == kPatch && p.patch_w == kPatch) {
        std::memcpy(to, static_cast<const A*>(p.x) + from, kPatch * sizeof(A));
        continue;
      }
      if (inside > 0) read_numbers<S>(p, from, inside, to);
      std::fill_n(to + inside, p.patch_w - inside, A(0));
    }
}

// Reads row number `row` into numbers, zeros behind them to a whole vector.
template <class S, class A>
void read_row(const PackedLayers& p, int64_t row, A* numbers) {
  const int64_t inputs = p.first.inputs;
  if (p.source == RowSource::kRows) {
    read_numbers<S>(p, row * inputs, inputs, numbers);
  } else {
    int64_t of_image = row % (p.rows_of_image * p.columns_of_image), image = row / (p.rows_of_image * p.columns_of_image);
    if (p.source == RowSource::kMerged)
      read_merged<S>(p, image, of_image / p.columns_of_image, of_image % p.columns_of_image, numbers);
    else
      read_patch<S>(p, image, of_image / p.columns_of_image, of_image % p.columns_of_image, numbers);
  }
  std::fill(numbers + inputs, numbers + (inputs + kLanes<A> - 1) / kLanes<A> * kLanes<A>, A(0));
}

// sums = (sums + bias) * gate + inner, of whole vectors but of `inner`, which ends with the row.
template <class A>
SWIN_MOE_INLINE void finish_sums(A* sums, const A* bias, A gate, const A* inner, int64_t count) {
  int64_t c = 0;
  for (; c + kLanes<A> <= count; c += kLanes<A>) {
    Vector<A> x = load(sums + c);
    if (bias) x += load(bias + c);
    x *= gate;
    if (inner) x += load(inner + c);
    store(sums + c, x);
  }
  for (; c < count; ++c) sums[c] = (sums[c] + (bias ? bias[c] : A(0))) * gate + (inner ? inner[c] : A(0));
}

// Writes columns [begin, end) of a row of sums to the result, with bias and residual; the sums start at `begin`.
template <class T, class A>
SWIN_MOE_INLINE void write_columns(const A* sums, const A* bias, const A* residual, T* out, int64_t begin, int64_t end) {
  int64_t c = begin;
  for (; c + kLanes<A> <= end; c += kLanes<A>) {
    Vector<A> x = load(sums + (c - begin));
    if (bias) x += load(bias + c);
    if (residual) x += load(residual + c);
    store_vector<T, A>(out + c, x);
  }
  for (; c < end; ++c) {
    A x = sums[c - begin] + (bias ? bias[c] : A(0)) + (residual ? residual[c] : A(0));
    store_row(out + c, &x, 1);
  }
}

// Writes the sums of a block's rows, which are whole.
template <class T, class A>
void write_rows(const PackedLayers& p, Rows<A> of_block, const A* bias, int64_t outputs, int64_t begin, int rows) {
  for (int i = 0; i < rows; ++i) {
    A* sums = of_block.data + i * of_block.stride;
    const int64_t to = (p.to ? p.to[begin + i] : begin + i) * outputs;
    auto* residual = p.residual ? static_cast<const A*>(p.residual) + to : nullptr;
    auto* added = bias;
    if (p.gate || p.inner || p.after.weight) {
      finish_sums(sums, bias, p.gate ? static_cast<const A*>(p.gate)[begin + i] : A(1),
                  p.inner ? static_cast<const A*>(p.inner) + to : nullptr, outputs);
      if (p.after.weight) normalize_row(sums, outputs, p.after);
      added = nullptr;
    }
    write_columns(sums, added, residual, static_cast<T*>(p.out) + to, 0, outputs);
  }
}

}  // namespace SWIN_MOE_CAPABILITY
}  // namespace swin_moe
