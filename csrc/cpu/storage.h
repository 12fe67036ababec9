// Rows of tensors in memory to and from the type that sums are kept in.
#pragma once

#include "vector.h"

namespace swin_moe {
namespace SWIN_MOE_CAPABILITY {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

SWIN_MOE_INLINE float widen(BFloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }

// Rounds to nearest, ties to even; NaN stays NaN.
SWIN_MOE_INLINE BFloat16 narrow(float x, BFloat16) {
  uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return {uint16_t(bits >> 16 | 0x40)};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// Shifts exponent and mantissa into place and corrects the bias by a product, which also serves denormals.
SWIN_MOE_INLINE float widen(Float16 x) {
  uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  float value = std::bit_cast<float>(magnitude) * 0x1p112f;
  if (value >= 65536.0f) value = std::bit_cast<float>(magnitude | 0x7f800000u);  // infinities and NaN
  return std::bit_cast<float>(std::bit_cast<uint32_t>(value) | uint32_t(x.bits & 0x8000) << 16);
}

SWIN_MOE_INLINE Float16 narrow(float x, Float16) {
  uint32_t bits = std::bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000;
  uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // rounds to 65536 or more
  if (magnitude < 0x38800000) {  // denormal: adding 0.5 leaves its multiples of 2^-24, rounded, in the low bits
    float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return {uint16_t(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000))};
  }
  return {uint16_t(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13)};
}

#if defined(SWIN_MOE_HAS_F16C)
SWIN_MOE_INLINE Vector<float> load_as_float(const Float16* from) {
#if SWIN_MOE_VECTOR_BYTES == 64
  return (Vector<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#else
  return (Vector<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#endif
}

SWIN_MOE_INLINE void store_narrow(Float16* to, Vector<float> x) {
#if SWIN_MOE_VECTOR_BYTES == 64
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#else
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#endif
}
#else
SWIN_MOE_INLINE Vector<float> load_as_float(const Float16* from) {
  Vector<float> x;
  for (int i = 0; i < kLanes<float>; ++i) x[i] = widen(from[i]);
  return x;
}

SWIN_MOE_INLINE void store_narrow(Float16* to, Vector<float> x) {
  for (int i = 0; i < kLanes<float>; ++i) to[i] = narrow(x[i], Float16{});
}
#endif

typedef uint16_t HalfVector __attribute__((vector_size(kVectorBytes / 2)));
typedef uint16_t UnalignedHalfVector __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));

SWIN_MOE_INLINE Vector<float> load_as_float(const BFloat16* from) {
  HalfVector bits = *reinterpret_cast<const UnalignedHalfVector*>(from);
  return (Vector<float>)(__builtin_convertvector(bits, Vector<uint32_t>) << 16);
}

SWIN_MOE_INLINE Vector<uint32_t> rounded_bfloat16(Vector<float> x) {
  Vector<uint32_t> bits = (Vector<uint32_t>)x;
  Vector<uint32_t> rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return x == x ? rounded : bits >> 16 | 0x40;
}

SWIN_MOE_INLINE void store_narrow(BFloat16* to, Vector<float> x) {
  *reinterpret_cast<UnalignedHalfVector*>(to) = __builtin_convertvector(rounded_bfloat16(x), HalfVector);
}

// Reads count elements; what lies behind them in `to` is left alone.
template <class S, class A>
SWIN_MOE_INLINE void load_row(const S* from, A* to, int count) {
  if constexpr (std::is_same_v<S, A>) {
    int i = 0;
    for (; i + kLanes<A> <= count; i += kLanes<A>) store(to + i, load(from + i));
    for (; i < count; ++i) to[i] = from[i];
  } else {
    int i = 0;
    for (; i + kLanes<A> <= count; i += kLanes<A>) store(to + i, load_as_float(from + i));
    for (; i < count; ++i) to[i] = widen(from[i]);
  }
}

template <class S, class A>
SWIN_MOE_INLINE void store_row(S* to, const A* from, int count) {
  if constexpr (std::is_same_v<S, A>) {
    load_row(from, to, count);
  } else {
    int i = 0;
    for (; i + kLanes<A> <= count; i += kLanes<A>) store_narrow(to + i, load(from + i));
    for (; i < count; ++i) to[i] = narrow(from[i], S{});
  }
}

}  // namespace SWIN_MOE_CAPABILITY
}  // namespace swin_moe
