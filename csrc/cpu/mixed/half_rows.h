// Rows of bfloat16 as vectors of floats.
#pragma once

#include "cpu/storage.h"

namespace swin_moe {
namespace SWIN_MOE_CAPABILITY {

using Floats = Vector<float>;
constexpr int kFloats = kLanes<float>;

SWIN_MOE_INLINE const BFloat16* as_half(const uint16_t* x) { return reinterpret_cast<const BFloat16*>(x); }
SWIN_MOE_INLINE BFloat16* as_half(uint16_t* x) { return reinterpret_cast<BFloat16*>(x); }

// Rounds by the processor where it has an instruction for it, which takes what is denormal for 0.
SWIN_MOE_INLINE void store_half(BFloat16* to, Floats x) {
#if defined(SWIN_MOE_HAS_AVX512_BF16)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
  store_narrow(to, x);
#endif
}

}  // namespace SWIN_MOE_CAPABILITY
}  // namespace swin_moe
