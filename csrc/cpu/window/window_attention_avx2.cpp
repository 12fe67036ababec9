// The kernels of window attention with AVX2, FMA and F16C.
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

#include "window/window_attention.h"

#if defined(SWIN_MOE_X86_KERNELS)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#define SWIN_MOE_CAPABILITY with_avx2
#define SWIN_MOE_VECTOR_BYTES 32
#define SWIN_MOE_VECTOR_REGISTERS 16
#define SWIN_MOE_HAS_F16C 1
#include "window_backward.h"
#include "window_kernels.h"
#pragma GCC pop_options

const swin_moe::WindowKernels& swin_moe::window_kernels_avx2() {
  static const WindowKernels kernels = with_avx2::make_window_kernels<with_avx2::Numbers<float>>();
  return kernels;
}
#endif
