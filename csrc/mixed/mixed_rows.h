// The kernels of bfloat16 rows, chosen by what the processor has. bfloat16 is its bits here.
#pragma once

#include "window/window_attention.h"  // SWIN_MOE_X86_KERNELS

#include <cstdint>

namespace swin_moe {

struct NormGradients {
  const uint16_t *grad, *x;
  const float *mean, *rstd, *weight;
  uint16_t* to;  // the gradient of x; null = not asked for
};

// Rows lie one after the other. Sums are added to what is there.
struct MixedKernels {
  void (*norm_rows)(const uint16_t* x, const float* weight, const float* bias, float eps, int64_t rows,
                    int64_t channels, uint16_t* y, float* mean, float* rstd);
  // sums (2, channels): of the gradients of weight and bias.
  void (*norm_gradients)(const NormGradients& at, int64_t first, int64_t rows, int64_t channels, float* sums);
  void (*gelu_rows)(const uint16_t* x, const float* bias, int64_t rows, int64_t channels, uint16_t* y);
  void (*gelu_gradients)(const uint16_t* grad, const uint16_t* x, const float* bias, int64_t rows, int64_t channels,
                         uint16_t* to, float* sums);
  void (*narrow_all)(const float* from, int64_t count, uint16_t* to);
  void (*widen_all)(const uint16_t* from, int64_t count, float* to);
  void (*add_rows)(const uint16_t* x, int64_t rows, int64_t channels, float* sums);
  // x + factor * branch; x may be null, which stands for zeros.
  void (*add_scaled)(const uint16_t* x, const uint16_t* branch, float factor, int64_t count, uint16_t* to);
};

const MixedKernels* mixed_kernels_default();
#if defined(SWIN_MOE_X86_KERNELS)
const MixedKernels* mixed_kernels_avx2();
const MixedKernels* mixed_kernels_avx512_bf16();
#endif

// Those of this processor, or of SWIN_MOE_CPU_CAPABILITY.
const MixedKernels& mixed_kernels();

}  // namespace swin_moe
