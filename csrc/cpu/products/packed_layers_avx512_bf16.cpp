// The kernels of packed layers with AVX-512 and its bfloat16 dot products.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "products/packed_layers.h"

#if defined(SWIN_MOE_X86_KERNELS)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,avx2,fma,f16c,bmi,bmi2,prefer-vector-width=512")
#define SWIN_MOE_CAPABILITY with_avx512_bf16
#define SWIN_MOE_VECTOR_BYTES 64
#define SWIN_MOE_VECTOR_REGISTERS 32
#define SWIN_MOE_HAS_F16C 1
#define SWIN_MOE_HAS_AVX512_BF16 1
#include "packed_kernels.h"
#pragma GCC pop_options

const swin_moe::PackedKernels* swin_moe::packed_kernels_avx512_bf16() {
  return with_avx512_bf16::packed_kernels_by_element<with_avx512_bf16::Pairs>();
}
#endif
