// Rows by groups of lanes: as many lanes of a warp for a row as it has vectors, up to all 32.
#pragma once

#include "cuda/warp.cuh"

namespace swin_moe {

constexpr int kRowThreads = 256;

// What products and sums of elements are kept in.
template <class T>
struct SumOf {
  using Type = float;
};
template <>
struct SumOf<double> {
  using Type = double;
};

// `Width` neighbouring elements, read and written at once.
template <class T, int Width>
struct alignas(sizeof(T) * Width > 16 ? 16 : sizeof(T) * Width) Elements {
  T values[Width];
};

// Rounds sums to elements, those of 16 bits two at a time.
template <class T, class Sum, int Width>
__device__ __forceinline__ void round_to(Elements<T, Width>& to, const Sum (&sums)[Width]) {
  if constexpr (sizeof(T) == 2 && Width % 2 == 0) {
#pragma unroll
    for (int c = 0; c < Width; c += 2) store_pair(to.values + c, sums[c], sums[c + 1]);
  } else {
#pragma unroll
    for (int c = 0; c < Width; ++c) from_float(to.values[c], sums[c]);
  }
}

// Which row a group works on, and which of its vectors a lane starts with.
struct RowGroup {
  int64_t row;
  int lane, lanes;

  __device__ __forceinline__ explicit RowGroup(int lanes_)
      : row(int64_t(blockIdx.x) * (unsigned(kRowThreads) / unsigned(lanes_)) + threadIdx.x / unsigned(lanes_)),
        lane(threadIdx.x % unsigned(lanes_)), lanes(lanes_) {}
};

// a / b for numbers that are not negative: a device divides 64 bits by a call, and most are smaller.
__device__ __forceinline__ int64_t quotient(int64_t a, int b) {
  return a <= 0xffffffffLL ? int64_t(uint32_t(a) / uint32_t(b)) : a / b;
}

// A divisor of kRowThreads.
inline int lanes_for(int64_t vectors) {
  int lanes = 1;
  while (lanes < 32 && lanes < vectors) lanes *= 2;
  return lanes;
}

inline int64_t row_blocks(int64_t rows, int lanes) { return (rows * lanes + kRowThreads - 1) / kRowThreads; }

}  // namespace swin_moe
