// Sums over rows of scores and of queries, where their terms cancel: in float32 with what each rounding lost beside
// them (Ogita, Rump and Oishi, Accurate Sum and Dot Product, 2005). With 16-bit elements these are plain float32, whose
// roundings vanish beside those of the elements.
#pragma once

#include "detection/rounded.h"
#include "cuda/warp.cuh"

namespace swin_moe {

// A number of a row in float32. Low: what `high` lacks, of float32 elements alone.
template <class T>
struct RowNumber {
  float high;

  __device__ __forceinline__ float times(float x) const { return x * high; }
  __device__ __forceinline__ float taken_from(float x) const { return x - high; }
};
template <>
struct RowNumber<float> {
  float high, low;

  __device__ __forceinline__ float times(float x) const { return fmaf(x, high, x * low); }
  __device__ __forceinline__ float taken_from(float x) const { return x - high - low; }
};

// `high`, and what it lacks where that is a remainder of rounding; zero where numbers were not finite, or too small.
__device__ __forceinline__ RowNumber<float> with_remainder(float high, float low) {
  return {high, fabsf(low) <= 1e-5f * fabsf(high) ? low : 0.f};
}

// Adds up terms of a row.
template <class T>
struct RowSum {
  float high = 0.f;

  __device__ __forceinline__ void add(float x) { high += x; }
  __device__ __forceinline__ void add_product(float x, float y) { high += x * y; }
  __device__ __forceinline__ void shrink(float factor) { high *= factor; }
  __device__ __forceinline__ void meet(int distance) { high += __shfl_xor_sync(kAllLanes, high, distance); }
  __device__ __forceinline__ float value() const { return high; }
};
template <>
struct RowSum<float> {
  float high = 0.f, low = 0.f;

  __device__ __forceinline__ void add(float x) {
    const float sum = high + x, added = sum - high;
    low += (high - (sum - added)) + (x - added);
    high = sum;
  }
  __device__ __forceinline__ void add_product(float x, float y) {
    const float product = rounded_product(x, y);
    low += fmaf(x, y, -product);
    add(product);
  }
  // Of the rounding of `high` nothing is kept: the factor has an error of its own.
  __device__ __forceinline__ void shrink(float factor) {
    high *= factor;
    low *= factor;
  }
  __device__ __forceinline__ void meet(int distance) {
    const float other_low = __shfl_xor_sync(kAllLanes, low, distance);
    const float other = __shfl_xor_sync(kAllLanes, high, distance);
    low += other_low;  // before the rounding, so that all lanes get the same bits
    add(other);
  }
  __device__ __forceinline__ float value() const {
    const float sum = high + low;
    return sum - sum == 0.f ? sum : high;  // infinities have no remainder
  }
};

// Over the four lanes that share the rows of a fragment, and over a warp; all get the sum.
template <class T>
__device__ __forceinline__ RowSum<T> quad_sum(RowSum<T> sum) {
  sum.meet(1);
  sum.meet(2);
  return sum;
}
template <class T>
__device__ __forceinline__ RowSum<T> warp_sum(RowSum<T> sum) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) sum.meet(distance);
  return sum;
}

__device__ __forceinline__ RowNumber<float> number(const RowSum<float>& sum) {
  return with_remainder(sum.high, sum.low);
}
template <class T>
__device__ __forceinline__ RowNumber<T> number(const RowSum<T>& sum) {
  return {sum.high};
}

// One over a sum, by one step of Newton's from the rounded one.
__device__ __forceinline__ RowNumber<float> reciprocal(const RowSum<float>& sum) {
  const float high = 1.f / sum.high;
  return with_remainder(high, high * (fmaf(-sum.high, high, 1.f) - sum.low * high));
}
template <class T>
__device__ __forceinline__ RowNumber<T> reciprocal(const RowSum<T>& sum) {
  return {reciprocal_fast(sum.high)};
}

__device__ __forceinline__ RowNumber<float> product(const RowSum<float>& sum, const RowNumber<float>& factor) {
  const float high = sum.high * factor.high, low = fmaf(sum.high, factor.low, sum.low * factor.high);
  return with_remainder(high, fmaf(sum.high, factor.high, -high) + low);
}
template <class T>
__device__ __forceinline__ RowNumber<T> product(const RowSum<T>& sum, const RowNumber<T>& factor) {
  return {sum.high * factor.high};
}

}  // namespace swin_moe
