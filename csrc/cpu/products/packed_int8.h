// The kernel of packed layers with products of whole numbers.
//
// A row x is least + scale * q with q in [0, 255], a column of weights scale * w with w in [-127, 127]; their product is
// scale_x scale_w sum(q w) + least scale_w sum(w). The sums are exact in 32 bits, so they are the same with every set of
// instructions. Between two matrices rows are rounded in groups of kGroup hidden channels, as they come.
#pragma once

#include "packed_rows.h"

namespace swin_moe {
namespace SWIN_MOE_CAPABILITY {

#if defined(SWIN_MOE_HAS_VNNI)
// Four bytes of a row and of a column each, multiplied and added up by one instruction, which does not saturate.
struct WholeNumbers {
  using Sum = int32_t;
  using Factor = uint32_t;
  using Row = uint8_t;
  using Weight = int8_t;
  static constexpr int kPerFactor = 4;

  SWIN_MOE_INLINE Vector<int32_t> multiply_add(uint32_t a, Vector<uint32_t> b, Vector<int32_t> sum) {
#if SWIN_MOE_VECTOR_BYTES == 64
    return (Vector<int32_t>)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(int(a)), (__m512i)b);
#else
    return (Vector<int32_t>)_mm256_dpbusd_avx_epi32((__m256i)sum, _mm256_set1_epi32(int(a)), (__m256i)b);
#endif
  }
};
#else
// Two numbers of 16 bits each: older instructions add products of bytes up in 16 bits, where 2 * 255 * 127 has no room.
struct WholeNumbers {
  using Sum = int32_t;
  using Factor = uint32_t;
  using Row = int16_t;
  using Weight = int16_t;
  static constexpr int kPerFactor = 2;

  SWIN_MOE_INLINE Vector<int32_t> multiply_add(uint32_t a, Vector<uint32_t> b, Vector<int32_t> sum) {
#if SWIN_MOE_VECTOR_BYTES == 32
    return sum + (Vector<int32_t>)_mm256_madd_epi16(_mm256_set1_epi32(int(a)), (__m256i)b);
#else
    const Vector<int32_t> low = (Vector<int32_t>)(b << 16) >> 16, high = (Vector<int32_t>)b >> 16;
    return sum + int32_t(int16_t(a)) * low + (int32_t(a) >> 16) * high;
#endif
  }
};
#endif

// Rounds to nearest, ties to even; of numbers in [0, 255].
SWIN_MOE_INLINE Vector<int32_t> nearest(Vector<float> x) {
#if SWIN_MOE_VECTOR_BYTES == 64
  return (Vector<int32_t>)_mm512_cvtps_epi32((__m512)x);
#elif SWIN_MOE_VECTOR_BYTES == 32
  return (Vector<int32_t>)_mm256_cvtps_epi32((__m256)x);
#else
  const float rounder = 12582912.0f;  // 1.5 * 2^23: adding it leaves the integer in the low bits
  return (Vector<int32_t>)(x + rounder) & 0xffff;
#endif
}

SWIN_MOE_INLINE Vector<float> as_floats(Vector<int32_t> x) { return __builtin_convertvector(x, Vector<float>); }

// Writes a vector of whole numbers into a row of factors.
SWIN_MOE_INLINE void put_whole(uint32_t* row, int64_t index, Vector<int32_t> q) {
  using N = WholeNumbers::Row;
  N* to = reinterpret_cast<N*>(row) + index * kLanes<int32_t>;
#if SWIN_MOE_VECTOR_BYTES == 64
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)q));
#else
  typedef N Narrow __attribute__((vector_size(kLanes<int32_t> * sizeof(N))));
  const Narrow narrow = __builtin_convertvector(q, Narrow);
  std::memcpy(to, &narrow, sizeof(narrow));
#endif
}

// x = least + scale * q.
struct RowScale {
  float scale, least;
};

SWIN_MOE_INLINE bool any_lane(Vector<int32_t> x) {
#if SWIN_MOE_VECTOR_BYTES == 64
  return _mm512_test_epi32_mask((__m512i)x, (__m512i)x) != 0;
#elif SWIN_MOE_VECTOR_BYTES == 32
  return !_mm256_testz_si256((__m256i)x, (__m256i)x);
#else
  return reduce<int32_t>(x, [](Vector<int32_t> a, Vector<int32_t> b) __attribute__((always_inline)) { return a | b; }) != 0;
#endif
}

// Writes a row of `count` numbers as whole ones and returns what they stand for. What is behind the last number is
// written to a whole vector, as anything: its weights are 0. A number that is not finite makes the scale not-a-number.
SWIN_MOE_INLINE RowScale quantize_row(const float* x, int64_t count, uint32_t* to) {
  constexpr int n = kLanes<float>;
  float least = x[0], most = x[0];
  bool finite = true;
  int64_t c = 0;
  if (count >= n) {
    Vector<float> low = load(x), high = low;
    Vector<int32_t> bad = low - low != 0.0f;
    for (c = n; c + n <= count; c += n) {
      const Vector<float> v = load(x + c);
      low = v < low ? v : low;
      high = v > high ? v : high;
      bad |= v - v != 0.0f;
    }
    least = -largest_lane<float>(-low);
    most = largest_lane<float>(high);
    finite = !any_lane(bad);
  }
  for (; c < count; ++c) {
    least = x[c] < least ? x[c] : least;
    most = x[c] > most ? x[c] : most;
    finite = finite && x[c] - x[c] == 0.0f;
  }
  const float range = most - least;
  const bool some = range > 1e-30f;
  const float inverse = some ? 255.0f / range : 0.0f;
  for (c = 0; c < count; c += n) put_whole(to, c / n, nearest((load(x + c) - least) * inverse));
  return {!finite ? std::nanf("") : some ? range / 255.0f : 0.0f, least};
}

// What belongs to the columns of an int8 matrix.
struct Columns {
  const float *scale, *sum;  // of all inputs
  int64_t count;             // padded
  SWIN_MOE_INLINE const float* of_group(const Columns& columns, int64_t group) {
    return columns.sum + (1 + group) * columns.count;
  }
};

SWIN_MOE_INLINE Columns columns_of(const PackedMatrix& matrix, int64_t expert) {
  using Operand = WholeNumbers;
  const int64_t count = Panels<Operand>(matrix.outputs).padded_columns();
  auto* scale = reinterpret_cast<const float*>(reinterpret_cast<const char*>(matrix_of<Operand>(matrix, expert)) +
                                               panel_bytes<Operand>(matrix.outputs, matrix.inputs));
  return {scale, scale + count, count};
}

// weight: (outputs, inputs). A column of zeros has scale 0; one with a number that is not finite has none.
inline void pack_int8(const float* weight, int64_t outputs, int64_t inputs, void* packed) {
  using Operand = WholeNumbers;
  using W = Operand::Weight;
  const Panels<Operand> panels(outputs);
  const int64_t depth = depth_of<Operand>(inputs), count = panels.padded_columns();
  std::memset(packed, 0, packed_bytes<Operand>(outputs, inputs));
  auto* scales = reinterpret_cast<float*>(static_cast<char*>(packed) + panel_bytes<Operand>(outputs, inputs));
  float* sums = scales + count;
  for (int64_t panel = 0; panel < panels.count; ++panel) {
    const int64_t begin = panels.first(panel) * panels.kColumns, width = panels.width(panel) * panels.kColumns;
    W* to = static_cast<W*>(packed) + begin * depth * Operand::kPerFactor;
    for (int64_t column = begin; column < std::min(begin + width, outputs); ++column) {
      const float* from = weight + column * inputs;
      float most = 0, poison = 0;
      for (int64_t i = 0; i < inputs; ++i) {
        most = std::abs(from[i]) > most ? std::abs(from[i]) : most;
        poison += from[i] * 0.0f;
      }
      const float scale = scales[column] = most / 127.0f + poison;
      if (!(scale > 0)) continue;
      for (int64_t i = 0; i < inputs; ++i) {
        const float q = std::nearbyint(from[i] / scale);
        to[(i / Operand::kPerFactor * width + column - begin) * Operand::kPerFactor + i % Operand::kPerFactor] = W(q);
        sums[column] += q;
        sums[(1 + i / kGroup) * count + column] += q;
      }
    }
  }
}

struct Int8Memory {
  using F = WholeNumbers::Factor;
  int64_t rows, row, hidden_row, value_row, sums_row;  // rows of a block; factors, or floats, of a row
  F *a, *hidden;
  float *numbers, *values, *sums;
  int32_t* panel;
  RowScale *scale, *hidden_scale;

  static int64_t factors(int64_t count) {
    constexpr int64_t spread = 64 / sizeof(F);  // rows a power of two apart would share a set of the cache
    return (whole_vectors<int32_t>(count) + WholeNumbers::kPerFactor - 1) / WholeNumbers::kPerFactor + spread;
  }

  Int8Memory(Arena& arena, const PackedLayers& p, int64_t most_rows) {
    const bool two = p.second.data != nullptr, whole = two || p.after.weight;
    const int64_t outputs = two ? p.second.outputs : p.first.outputs;
    row = factors(p.first.inputs);
    hidden_row = two ? factors(kGroup) : 0;
    value_row = two ? kGroup + kLanes<float> : 0;
    sums_row = whole ? Panels<WholeNumbers>(outputs).padded_columns() + kLanes<float> : 0;
    const int64_t fitting = kBlockBytes / (4 * (row + hidden_row + value_row + sums_row));
    rows = std::min(most_rows, std::clamp(fitting, kLeastRows, kMostRows));
    a = arena.take<F>(rows * row);
    hidden = arena.take<F>(rows * hidden_row);
    numbers = arena.take<float>(whole_vectors<float>(p.first.inputs));
    values = arena.take<float>(rows * value_row);
    sums = arena.take<float>(rows * sums_row);
    panel = arena.take<int32_t>(rows * kPanelVectors * kLanes<int32_t>);
    scale = arena.take<RowScale>(rows);
    hidden_scale = arena.take<RowScale>(two ? rows : 0);
  }
};

// Writes a block's rows, normalized, as whole numbers. next: what is read then.
template <class S>
void read_int8_block(const PackedLayers& p, const Int8Memory& m, int64_t begin, int rows, Next next) {
  Ahead ahead(next, rows);
  for (int i = 0; i < rows; ++i) {
    Ahead::ask(ahead);
    read_row<S>(p, p.from ? p.from[begin + i] : begin + i, m.numbers);
    if (p.before.weight) normalize_row(m.numbers, p.first.inputs, p.before);
    m.scale[i] = quantize_row(m.numbers, p.first.inputs, m.a + i * m.row);
  }
}

// What a panel of sums stands for: calls write(row, vector, numbers) with each vector of the product and its bias.
template <int kVectors, class Write>
SWIN_MOE_INLINE void finish_vectors(int rows, const int32_t* sums, const RowScale* of_rows, const float* scale,
                                    const float* sum, const float* bias, Write write) {
  constexpr int n = kLanes<float>;
  Vector<float> scales[kVectors], of_columns[kVectors], biases[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    scales[v] = load(scale + v * n);
    of_columns[v] = load(sum + v * n);
    biases[v] = bias ? load(bias + v * n) : Vector<float>{};
  }
  for (int i = 0; i < rows; ++i, sums += kVectors * n) {
    const RowScale row = of_rows[i];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      write(i, v, (as_floats(load(sums + v * n)) * row.scale + of_columns[v] * row.least) * scales[v] + biases[v]);
  }
}

// bias: null for none.
template <class Write>
SWIN_MOE_INLINE void finish_panel(int width, int rows, const int32_t* sums, const RowScale* of_rows, const float* scale,
                                  const float* sum, const float* bias, Write write) {
  switch (width) {
    case 1: return finish_vectors<1>(rows, sums, of_rows, scale, sum, bias, write);
    case 2: return finish_vectors<2>(rows, sums, of_rows, scale, sum, bias, write);
    case 3: return finish_vectors<3>(rows, sums, of_rows, scale, sum, bias, write);
    default: return finish_vectors<kPanelVectors>(rows, sums, of_rows, scale, sum, bias, write);
  }
}

// Writes gelu(a W1 + bias) of a group of columns as whole numbers. next: what is read after their panels.
inline void hidden_group(const PackedLayers& p, const Int8Memory& m, int64_t expert, int rows, int64_t group, Next next) {
  using Operand = WholeNumbers;
  constexpr int n = kLanes<float>;
  constexpr int64_t kPanels = kGroup / (kPanelVectors * n);
  const Panels<Operand> panels(p.first.outputs);
  const int64_t depth = depth_of<Operand>(p.first.inputs);
  const int64_t first = group * kPanels, last = std::min(first + kPanels, panels.count);
  const Columns columns = columns_of(p.first, expert);
  auto* bias = bias_of<float>(p.first, expert);
  for (int64_t number = first; number < last; ++number) {
    const int width = panels.width(number), stride = width * n;
    auto* panel = panel_of(matrix_of<Operand>(p.first, expert), panels, depth, number);
    panel_product<Operand>(rows, width, depth, {m.a, m.row, 1}, panel, {m.panel, stride}, false,
                           number + 1 < last ? start_of<Operand>(p.first, expert, rows, number + 1) : next);
    const int64_t column = panels.first(number) * n;
    float* values = m.values + (column - group * kGroup);
    finish_panel(width, rows, m.panel, m.scale, columns.scale + column, columns.sum + column, bias ? bias + column : bias,
                 [&](int i, int v, Vector<float> x) __attribute__((always_inline)) {
                   store(values + i * m.value_row + v * n, gelu_of(x));
                 });
  }
  const int64_t count = std::min(kGroup, p.first.outputs - group * kGroup);
  for (int i = 0; i < rows; ++i)
    m.hidden_scale[i] = quantize_row(m.values + i * m.value_row, count, m.hidden + i * m.hidden_row);
}

// Writes the products of a block's rows with both matrices, group by group of hidden channels. next: whose first matrix is
// read then.
inline void two_int8_products(const PackedLayers& p, const Int8Memory& m, int64_t expert, int rows, int64_t next) {
  using Operand = WholeNumbers;
  constexpr int n = kLanes<float>;
  constexpr int64_t kSteps = kGroup / Operand::kPerFactor;
  const Panels<Operand> hidden(p.first.outputs), panels(p.second.outputs);
  const int64_t depth = depth_of<Operand>(p.second.inputs), groups = groups_of(p.second.inputs);
  const Columns columns = columns_of(p.second, expert);
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t begin = group * kSteps, steps = std::min(begin + kSteps, depth) - begin;
    const auto part = [&](int64_t number) {
      auto* panel = panel_of(matrix_of<Operand>(p.second, expert), panels, depth, number);
      return start_of_panel(rows, panel, panels, number, begin, steps);
    };
    hidden_group(p, m, expert, rows, group, part(0));
    const float* of_group = Columns::of_group(columns, group);
    for (int64_t number = 0; number < panels.count; ++number) {
      const int width = panels.width(number), stride = width * n;
      Next then;
      if (number + 1 < panels.count)
        then = part(number + 1);
      else if (group + 1 < groups)
        then = start_of<Operand>(p.first, expert, rows, (group + 1) * (kGroup / (kPanelVectors * n)));
      else
        then = start_of<Operand>(p.first, next, rows, 0);
      panel_product<Operand>(rows, width, steps, {m.hidden, m.hidden_row, 1},
                             static_cast<const Operand::Factor*>(part(number).from), {m.panel, stride}, false, then);
      const int64_t column = panels.first(number) * n;
      finish_panel(width, rows, m.panel, m.hidden_scale, columns.scale + column, of_group + column, nullptr,
                   [&](int i, int v, Vector<float> x) __attribute__((always_inline)) {
                     float* sums = m.sums + i * m.sums_row + column + v * n;
                     store(sums, group > 0 ? load(sums) + x : x);
                   });
    }
  }
}

// Writes a vector of the result, or the part of it that is left of its row, with the residual.
template <class T>
SWIN_MOE_INLINE void write_vector(Vector<float> x, const float* residual, T* out, int64_t left) {
  if (left >= kLanes<float>) {
    if (residual) x += load(residual);
    return store_vector<T, float>(out, x);
  }
  float numbers[kLanes<float>];
  store(numbers, x);
  write_columns<T, float>(numbers, nullptr, residual, out, 0, left);
}

// Multiplies a block's rows by the first matrix and writes each panel as it comes, or keeps them all for a norm.
template <class T>
void one_int8_product(const PackedLayers& p, const Int8Memory& m, int64_t expert, int64_t begin, int rows, int64_t next) {
  using Operand = WholeNumbers;
  constexpr int n = kLanes<float>;
  const int64_t outputs = p.first.outputs, depth = depth_of<Operand>(p.first.inputs);
  const Panels<Operand> panels(outputs);
  const Columns columns = columns_of(p.first, expert);
  auto *bias = bias_of<float>(p.first, expert), *residual = static_cast<const float*>(p.residual);
  T* out = static_cast<T*>(p.out);
  for (int64_t number = 0; number < panels.count; ++number) {
    const int width = panels.width(number), stride = width * n;
    const int64_t column = panels.first(number) * n;
    auto* panel = panel_of(matrix_of<Operand>(p.first, expert), panels, depth, number);
    const Next then = number + 1 < panels.count ? start_of<Operand>(p.first, expert, rows, number + 1)
                                                : start_of<Operand>(p.first, next, rows, 0);
    panel_product<Operand>(rows, width, depth, {m.a, m.row, 1}, panel, {m.panel, stride}, false, then);
    const float* of_panel = bias ? bias + column : bias;
    if (p.after.weight) {
      finish_panel(width, rows, m.panel, m.scale, columns.scale + column, columns.sum + column, of_panel,
                   [&](int i, int v, Vector<float> x) __attribute__((always_inline)) {
                     store(m.sums + i * m.sums_row + column + v * n, x);
                   });
    } else {
      finish_panel(width, rows, m.panel, m.scale, columns.scale + column, columns.sum + column, of_panel,
                   [&](int i, int v, Vector<float> x) __attribute__((always_inline)) {
                     const int64_t first = column + v * n, at = (begin + i) * outputs + first;
                     write_vector(x, residual ? residual + at : residual, out + at, outputs - first);
                   });
    }
  }
  if (p.after.weight) write_rows<T, float>(p, {m.sums, m.sums_row}, nullptr, outputs, begin, rows);
}

template <class T, class S>
void run_int8_blocks(const PackedLayers& p, const PackedTask& task) {
  Arena counter(nullptr);
  Int8Memory(counter, p, task.row_end - task.row_begin);
  Arena arena(thread_memory(counter.used()));
  const Int8Memory memory(arena, p, task.row_end - task.row_begin);
  const int64_t blocks = (task.row_end - task.row_begin + memory.rows - 1) / memory.rows;
  int64_t begin = task.row_begin;
  for (int64_t block = 0; block < blocks; ++block) {
    const int rows = int((task.row_end - begin) / (blocks - block));
    const int64_t next = block + 1 < blocks ? task.expert : task.next_expert;
    read_int8_block<S>(p, memory, begin, rows, start_of<WholeNumbers>(p.first, task.expert, rows, 0));
    if (p.second.data) {
      two_int8_products(p, memory, task.expert, rows, next);
      write_rows<T, float>(p, {memory.sums, memory.sums_row}, bias_of<float>(p.second, task.expert), p.second.outputs,
                           begin, rows);
    } else {
      one_int8_product<T>(p, memory, task.expert, begin, rows, next);
    }
    begin += rows;
  }
}

template <class S>
void run_int8(const PackedLayers& p, const PackedTask& task) {
  if (p.accumulated_out)
    run_int8_blocks<float, S>(p, task);
  else
    run_int8_blocks<S, S>(p, task);
}

inline const Int8Kernels& int8_kernels() {
  static const Int8Kernels kernels{
      packed_bytes<WholeNumbers>, pack_int8, {nullptr, run_int8<float>, run_int8<BFloat16>, run_int8<Float16>}};
  return kernels;
}

}  // namespace SWIN_MOE_CAPABILITY
}  // namespace swin_moe
