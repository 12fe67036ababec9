// Limits of floating-point types, and comparisons that keep what is no number.
#pragma once

#include <cfloat>
#include <cmath>

#include "warp.cuh"

namespace swin_moe {

template <class T>
struct Limits;
template <>
struct Limits<float> {
  static constexpr float kTiny = FLT_MIN, kEpsilon = FLT_EPSILON, kLowest = -HUGE_VALF;
};
template <>
struct Limits<double> {
  static constexpr double kTiny = DBL_MIN, kEpsilon = DBL_EPSILON, kLowest = -HUGE_VAL;
};

// As torch.clamp(min=least): not-a-number stays.
template <class T>
__device__ __forceinline__ T at_least(T x, T least) {
  return x < least ? least : x;
}

// As torch.max: not-a-number is larger than all.
template <class T>
__device__ __forceinline__ bool is_larger(T a, T b) {
  return a > b || (a != a && b == b);
}

}  // namespace swin_moe
