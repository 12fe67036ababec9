// What the factors of a matrix product are: numbers of the type that sums are kept in, or pairs of bfloat16 adjacent
// along the summed dimension, which one instruction multiplies and adds up.
//
// Rows hold one token each. "Stacked" rows are the form in which tokens are the summed dimension of the right factor:
// kPerFactor tokens in one row.
#pragma once

#include "storage.h"

namespace swin_moe {
namespace SWIN_MOE_CAPABILITY {

template <class A>
struct Numbers {
  using Sum = A;
  using Factor = A;
  static constexpr int kPerFactor = 1;

  SWIN_MOE_INLINE Vector<A> multiply_add(A a, Vector<A> b, Vector<A> sum) { return sum + a * b; }

  // Copies count elements of a tensor into a row.
  template <class S>
  SWIN_MOE_INLINE void read(const S* from, A* row, int count) {
    load_row(from, row, count);
  }
  // Returns kPerFactor numbers of a tensor as one factor.
  template <class S>
  SWIN_MOE_INLINE A factor(const S* from) {
    if constexpr (std::is_same_v<S, A>)
      return from[0];
    else
      return A(widen(from[0]));
  }
  // Writes a vector of sums into a row, as vector number `index` of it.
  SWIN_MOE_INLINE void put(A* row, int index, Vector<A> x) { store(row + index * kLanes<A>, x); }
  SWIN_MOE_INLINE void put_weight(A* row, int index, Vector<A> x) { put(row, index, x); }
  // Returns a row as numbers, in `space` if it has to be converted.
  SWIN_MOE_INLINE const A* numbers(const A* row, A*, int) { return row; }
  // Returns the stacked form of num_rows rows of `columns` numbers, in `space` if it differs.
  SWIN_MOE_INLINE const A* stacked(const A* rows, int64_t, int, int, A*) { return rows; }
};

#if defined(SWIN_MOE_HAS_AVX512_BF16)
struct Pairs {
  using Sum = float;
  using Factor = uint32_t;  // the first of the pair in the low half
  static constexpr int kPerFactor = 2;

  SWIN_MOE_INLINE Vector<float> multiply_add(uint32_t a, Vector<uint32_t> b, Vector<float> sum) {
    return (Vector<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)b);
  }

  SWIN_MOE_INLINE void read(const BFloat16* from, uint32_t* row, int count) {
    auto* to = reinterpret_cast<uint16_t*>(row);
    for (int i = 0; i < count; i += 32) {
      __mmask32 inside = count - i >= 32 ? ~0u : (1u << (count - i)) - 1;
      _mm512_storeu_si512(to + i, _mm512_maskz_loadu_epi16(inside, from + i));
    }
  }

  SWIN_MOE_INLINE uint32_t factor(const BFloat16* from) { return from[0].bits | uint32_t(from[1].bits) << 16; }

  SWIN_MOE_INLINE void put(uint32_t* row, int index, Vector<float> x) {
    store_narrow(reinterpret_cast<BFloat16*>(row) + index * kLanes<float>, x);
  }
  // The same of numbers none of which is denormal, which the processor's instruction takes for zero.
  SWIN_MOE_INLINE void put_weight(uint32_t* row, int index, Vector<float> x) {
    auto* to = reinterpret_cast<__m256i*>(reinterpret_cast<uint16_t*>(row) + index * kLanes<float>);
    _mm256_storeu_si256(to, (__m256i)_mm512_cvtneps_pbh((__m512)x));
  }

  SWIN_MOE_INLINE const float* numbers(const uint32_t* row, float* space, int count) {
    auto* from = reinterpret_cast<const BFloat16*>(row);
    for (int i = 0; i < count; i += kLanes<float>) store(space + i, load_as_float(from + i));
    return space;
  }

  // stride counts factors of a row, columns is a multiple of the lanes, and `space` gets columns factors a row.
  SWIN_MOE_INLINE const uint32_t* stacked(const uint32_t* rows, int64_t stride, int num_rows, int columns,
                                          uint32_t* space) {
    for (int i = 0; i < num_rows; i += 2) {
      auto* first = reinterpret_cast<const BFloat16*>(rows + i * stride);
      auto* second = reinterpret_cast<const BFloat16*>(rows + (i + 1) * stride);
      uint32_t* to = space + int64_t(i / 2) * columns;
      for (int c = 0; c < columns; c += kLanes<float>) {
        Vector<uint32_t> low = (Vector<uint32_t>)load_as_float(first + c) >> 16;
        Vector<uint32_t> high = {};
        if (i + 1 < num_rows) high = (Vector<uint32_t>)load_as_float(second + c);
        store(to + c, low | high);
      }
    }
    return space;
  }
};
#endif

}  // namespace SWIN_MOE_CAPABILITY
}  // namespace swin_moe
