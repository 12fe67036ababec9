// What the kernels ask of the hardware, and nothing else: matrix instructions, asynchronous copies, conversions,
// launch.
//
// SWIN_MOE_EMULATION replaces this file's device code by tests/csrc/cuda_emulation.h, so that the kernels themselves
// run on the host. Everything a kernel uses beyond plain C++ and the names of CUDA C++ belongs here.
#pragma once

#include <cstddef>
#include <cstdint>

namespace swin_moe {

// Storage of 16-bit elements; their arithmetic is float32.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

}  // namespace swin_moe

#if defined(SWIN_MOE_EMULATION)
#include "cuda_emulation.h"
#else
#include <cuda_runtime.h>

namespace swin_moe {

constexpr unsigned kAllLanes = 0xffffffffu;
// A launch is not divided further than into so many: several for each multiprocessor, a few times over.
constexpr int64_t kEnoughBlocks = 2048;
// The same of a backward kernel, whose blocks end with a sum over pairs of tokens: two rounds of three blocks on each of
// the 132 multiprocessors of an H100.
constexpr int64_t kEnoughBackwardBlocks = 792;

extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];
__device__ __forceinline__ unsigned char* shared_memory() { return dynamic_shared_memory; }
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Four 8 x 8 matrices of 16-bit elements; lane l names row l % 8 of matrix l / 8, 16 bytes. Register m of lane l then
// holds elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of matrix m.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same of the transposed matrices.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// c (16 x 8, float32) += a (16 x 16) b (16 x 8).
__device__ __forceinline__ void multiply_add(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1, BFloat16) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply_add(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Float16) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two elements in one register, the first in the low half, rounded to nearest even.
__device__ __forceinline__ uint32_t pack(float first, float second, BFloat16) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
  return packed;
}
__device__ __forceinline__ uint32_t pack(float first, float second, Float16) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
  return packed;
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(BFloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
__device__ __forceinline__ float to_float(Float16 x) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
}

// threadIdx.x, read anew: numbers made of it are not kept in registers from window to window.
__device__ __forceinline__ int fresh_thread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// 16 bytes from global to shared memory, both aligned, or zeros, and nothing is read; complete after wait_for_copies.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(inside ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// 2 ** x to about 2 units in the last place of float32; 0 for minus infinity.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x to one unit in the last place of float32, of a normal number.
__device__ __forceinline__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / sqrt(x) to about two units in the last place of float32; infinity for zero and what is not a normal number.
__device__ __forceinline__ float reciprocal_root_fast(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// What a block of the current device can have; 0 without one.
inline size_t most_shared_bytes() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  const cudaError_t error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return error == cudaSuccess ? size_t(bytes) : 0;
}

template <class... P>
cudaError_t launch(void (*kernel)(P...), int64_t blocks, int threads, size_t shared_bytes, cudaStream_t stream,
                   P... arguments) {
  constexpr size_t kWithoutAsking = 48 << 10;
  if (blocks == 0) return cudaSuccess;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  if (shared_bytes > kWithoutAsking) {
    cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                             cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  kernel<<<unsigned(blocks), unsigned(threads), shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace swin_moe
#endif

namespace swin_moe {

__device__ __forceinline__ void store_pair(float* to, float first, float second) {
  to[0] = first;
  to[1] = second;
}
template <class T>
__device__ __forceinline__ void store_pair(T* to, float first, float second) {
  *reinterpret_cast<uint32_t*>(to) = pack(first, second, T{});
}

__device__ __forceinline__ void load_pair(const float* from, float& first, float& second) {
  first = from[0];
  second = from[1];
}
template <class T>
__device__ __forceinline__ void unpack(uint32_t both, float& first, float& second, T) {
  first = to_float(T{uint16_t(both)});
  second = to_float(T{uint16_t(both >> 16)});
}
template <class T>
__device__ __forceinline__ void load_pair(const T* from, float& first, float& second) {
  unpack(*reinterpret_cast<const uint32_t*>(from), first, second, T{});
}

// 16 aligned bytes at once.
struct alignas(16) Vector {
  uint32_t words[4];
};
struct alignas(16) FourFloats {
  float values[4];
};
__device__ __forceinline__ void load_four(const float* from, float* to) {
  const FourFloats four = *reinterpret_cast<const FourFloats*>(from);
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = four.values[i];
}
__device__ __forceinline__ void store_four(float* to, const float (&from)[4]) {
  *reinterpret_cast<FourFloats*>(to) = {{from[0], from[1], from[2], from[3]}};
}

// The same of any element, to float32 and from it times a factor.
__device__ __forceinline__ void load_vector(const float* from, float (&to)[4]) { load_four(from, to); }
__device__ __forceinline__ void store_vector(float* to, const float (&from)[4], float factor) {
  *reinterpret_cast<FourFloats*>(to) = {{from[0] * factor, from[1] * factor, from[2] * factor, from[3] * factor}};
}
template <class T>
__device__ __forceinline__ void load_vector(const T* from, float (&to)[8]) {
  const Vector vector = *reinterpret_cast<const Vector*>(from);
#pragma unroll
  for (int i = 0; i < 4; ++i) unpack(vector.words[i], to[2 * i], to[2 * i + 1], T{});
}
template <class T>
__device__ __forceinline__ void store_vector(T* to, const float (&from)[8], float factor) {
  Vector vector;
#pragma unroll
  for (int i = 0; i < 4; ++i) vector.words[i] = pack(from[2 * i] * factor, from[2 * i + 1] * factor, T{});
  *reinterpret_cast<Vector*>(to) = vector;
}

// float64 stays what it is, so that one source serves every element.
__device__ __forceinline__ double to_float(double x) { return x; }
__device__ __forceinline__ void from_float(double& to, double x) { to = x; }
__device__ __forceinline__ void from_float(float& to, float x) { to = x; }
template <class T>
__device__ __forceinline__ void from_float(T& to, float x) {
  to.bits = uint16_t(pack(x, 0.f, T{}));
}

// Over groups of 2^n lanes, which all get the sum.
template <class T>
__device__ __forceinline__ T lane_sum(T x, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}
template <class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}

// Over the four lanes that share the rows of a fragment.
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

}  // namespace swin_moe
