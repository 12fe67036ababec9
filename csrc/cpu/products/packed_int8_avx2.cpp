// The kernel of int8 products with AVX2: by numbers of 16 bits.
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
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#define SWIN_MOE_CAPABILITY with_avx2
#define SWIN_MOE_VECTOR_BYTES 32
#define SWIN_MOE_VECTOR_REGISTERS 16
#define SWIN_MOE_HAS_F16C 1
#include "packed_int8.h"
#pragma GCC pop_options

const swin_moe::Int8Kernels& swin_moe::int8_kernels_avx2() { return with_avx2::int8_kernels(); }
#endif
