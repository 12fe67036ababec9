// Vectors of kVectorBytes in the vector extension of GCC and Clang, which the compiler maps to the instructions of the
// translation unit. Each one that includes this defines SWIN_MOE_CAPABILITY (a namespace), SWIN_MOE_VECTOR_BYTES and
// SWIN_MOE_VECTOR_REGISTERS first, and has included the standard headers before it chose its instructions.
#pragma once

#define SWIN_MOE_INLINE static inline __attribute__((always_inline))

namespace swin_moe {
namespace SWIN_MOE_CAPABILITY {

constexpr int kVectorBytes = SWIN_MOE_VECTOR_BYTES;

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
  typedef T unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
  static constexpr int lanes = kVectorBytes / int(sizeof(T));
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
constexpr int kLanes = VectorOf<T>::lanes;

// The integer as wide as T, as the comparison of two vectors yields it.
template <class T>
using IntegerOf = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

template <class T>
SWIN_MOE_INLINE Vector<T> load(const T* from) {
  return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(from);
}

template <class T>
SWIN_MOE_INLINE void store(T* to, Vector<T> x) {
  *reinterpret_cast<typename VectorOf<T>::unaligned*>(to) = x;
}

template <class T>
SWIN_MOE_INLINE Vector<T> broadcast(T x) {
  return Vector<T>{} + x;
}

template <class T>
SWIN_MOE_INLINE Vector<T> larger(Vector<T> x, Vector<T> y) {
  return x > y ? x : y;
}

template <class V, int kStride, int... kLane>
SWIN_MOE_INLINE V swap_lanes(V x, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(x, x, (kLane ^ kStride)...);
}

// Combines all lanes by halving, in the same order on every run.
template <class T, int kStride = kLanes<T> / 2, class Combine>
SWIN_MOE_INLINE T reduce(Vector<T> x, Combine combine) {
  if constexpr (kStride == 0) {
    return x[0];
  } else {
    x = combine(x, swap_lanes<Vector<T>, kStride>(x, std::make_integer_sequence<int, kLanes<T>>{}));
    return reduce<T, kStride / 2>(x, combine);
  }
}

template <class T>
SWIN_MOE_INLINE T sum_of_lanes(Vector<T> x) {
  return reduce<T>(x, [](Vector<T> a, Vector<T> b) __attribute__((always_inline)) { return a + b; });
}

template <class T>
SWIN_MOE_INLINE T largest_lane(Vector<T> x) {
  return reduce<T>(x, [](Vector<T> a, Vector<T> b) __attribute__((always_inline)) { return a > b ? a : b; });
}

// One round of an in-register transposition: exchanges the off-diagonal blocks of kStride x kStride lanes.
template <class T, int kStride, int... kLane>
SWIN_MOE_INLINE void exchange(Vector<T>& upper, Vector<T>& lower, std::integer_sequence<int, kLane...>) {
  constexpr int n = kLanes<T>;
  Vector<T> x = upper, y = lower;
  upper = __builtin_shufflevector(x, y, ((kLane & kStride) ? n + kLane - kStride : kLane)...);
  lower = __builtin_shufflevector(x, y, ((kLane & kStride) ? n + kLane : kLane + kStride)...);
}

template <class T, int kStride = 1>
SWIN_MOE_INLINE void transpose_rounds(Vector<T>* rows) {
  if constexpr (kStride < kLanes<T>) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i)
      if (!(i & kStride))
        exchange<T, kStride>(rows[i], rows[i | kStride], std::make_integer_sequence<int, kLanes<T>>{});
    transpose_rounds<T, 2 * kStride>(rows);
  }
}

// Writes the transpose of a square of lanes; rows of `from` beyond num_rows count as zeros.
template <class T>
SWIN_MOE_INLINE void transpose_square(const T* from, int64_t from_row, int num_rows, T* to, int64_t to_row) {
  Vector<T> rows[kLanes<T>];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i) rows[i] = i < num_rows ? load(from + i * from_row) : Vector<T>{};
  transpose_rounds<T>(rows);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i) store(to + i * to_row, rows[i]);
}

// exp(x) for x <= 0 to 1 part in 1e7; 0 below -87, where float32 would become denormal; NaN stays NaN.
//
// Cody and Waite: x = n log 2 + r with |r| <= log(2) / 2 and log 2 in two parts, exp(r) as a polynomial of degree 6
// (the coefficients of Cephes' expf, Moshier 1987), 2^n through the exponent bits.
SWIN_MOE_INLINE Vector<float> exp_of(Vector<float> x) {
  using Bits = Vector<uint32_t>;  // far below -87 the sums wrap around
  const float rounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  Vector<float> shifted = x * 1.44269504088896341f + rounder;
  Vector<float> n = shifted - rounder;
  Vector<float> r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vector<float> p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  Bits power = (Bits)shifted << 23;  // the rounder's own bits fall out at the top
  Vector<float> y = (Vector<float>)((Bits)p + power);
  return x < -87.0f ? Vector<float>{} : y;
}

SWIN_MOE_INLINE Vector<double> exp_of(Vector<double> x) {
  Vector<double> y;
  for (int i = 0; i < kLanes<double>; ++i) y[i] = std::exp(x[i]);
  return y;
}

}  // namespace SWIN_MOE_CAPABILITY
}  // namespace swin_moe
