// What kernels of bfloat16 rows share: vectors of 16 floats, in functions that are compiled for what the processor has.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define SWIN_MOE_CAPABILITY clones
#define SWIN_MOE_VECTOR_BYTES 64
#define SWIN_MOE_VECTOR_REGISTERS 32
#include "cpu/clones.h"
#include "cpu/storage.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

namespace swin_moe {

using clones::BFloat16;
using Floats = clones::Vector<float>;
constexpr int kFloats = clones::kLanes<float>;
constexpr int64_t kRunRows = 256;  // whose sums are added up for themselves, however many threads there are
constexpr int64_t kLeastElements = 32768;  // that are worth a thread

inline const BFloat16* half_data(const at::Tensor& x) {
  return reinterpret_cast<const BFloat16*>(x.const_data_ptr<at::BFloat16>());
}
inline BFloat16* half_data_to_write(const at::Tensor& x) {
  return reinterpret_cast<BFloat16*>(x.mutable_data_ptr<at::BFloat16>());
}

// Calls run(number, first row, rows, sums) for every run of rows, and returns the sums (size,) of all in their order.
template <class Run>
at::Tensor sums_of_runs(int64_t rows, int64_t channels, int64_t size, const Run& run) {
  const int64_t runs = std::max<int64_t>(1, (rows + kRunRows - 1) / kRunRows);
  const at::Tensor all = at::empty({runs, size}, at::TensorOptions().dtype(at::kFloat));
  float* sums = all.mutable_data_ptr<float>();
  const int64_t grain = std::max<int64_t>(1, kLeastElements / std::max<int64_t>(kRunRows * channels, 1));
  at::parallel_for(0, runs, grain, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      std::fill(sums + n * size, sums + (n + 1) * size, 0.0f);
      run(n * kRunRows, std::min(kRunRows, rows - n * kRunRows), sums + n * size);
    }
  });
  for (int64_t n = 1; n < runs; ++n)
    for (int64_t i = 0; i < size; ++i) sums[i] += sums[n * size + i];
  return all.select(0, 0);
}

}  // namespace swin_moe
