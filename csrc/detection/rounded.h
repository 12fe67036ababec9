// Arithmetic that rounds alike on host and device, where a decision hangs on the last bit.
#pragma once

#if defined(__CUDACC__)
#define SWIN_MOE_BOTH_SIDES __host__ __device__ __forceinline__
#else
#define SWIN_MOE_BOTH_SIDES inline
#endif

namespace swin_moe {

// x y, rounded before anything is added: nvcc would fuse the two.
SWIN_MOE_BOTH_SIDES float rounded_product(float x, float y) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(x, y);
#else
  return x * y;
#endif
}
SWIN_MOE_BOTH_SIDES double rounded_product(double x, double y) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(x, y);
#else
  return x * y;
#endif
}

}  // namespace swin_moe
