// The kernels of a training step in bfloat16 with AVX-512 and its rounding to bfloat16.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "mixed/mixed_rows.h"

#if defined(SWIN_MOE_X86_KERNELS)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,avx2,fma,f16c,bmi,bmi2,prefer-vector-width=512")
#define SWIN_MOE_CAPABILITY mixed_with_avx512_bf16
#define SWIN_MOE_VECTOR_BYTES 64
#define SWIN_MOE_VECTOR_REGISTERS 32
#define SWIN_MOE_HAS_AVX512_BF16 1
#include "mixed_kernels.h"

const swin_moe::MixedKernels* swin_moe::mixed_kernels_avx512_bf16() { return mixed_with_avx512_bf16::mixed_kernels_here(); }
#pragma GCC pop_options
#endif
