// The kernels of a training step in bfloat16 with AVX2 and FMA.
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
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#define SWIN_MOE_CAPABILITY mixed_with_avx2
#define SWIN_MOE_VECTOR_BYTES 32
#define SWIN_MOE_VECTOR_REGISTERS 16
#include "mixed_kernels.h"

const swin_moe::MixedKernels* swin_moe::mixed_kernels_avx2() { return mixed_with_avx2::mixed_kernels_here(); }
#pragma GCC pop_options
#endif
