// What operators of bfloat16 rows share.
#pragma once

#include "mixed_rows.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>

namespace swin_moe {

constexpr int64_t kRunRows = 256;  // whose sums are added up for themselves, however many threads there are
constexpr int64_t kLeastElements = 32768;  // that are worth a thread

inline const uint16_t* half_data(const at::Tensor& x) {
  return reinterpret_cast<const uint16_t*>(x.const_data_ptr<at::BFloat16>());
}
inline uint16_t* half_data_to_write(const at::Tensor& x) {
  return reinterpret_cast<uint16_t*>(x.mutable_data_ptr<at::BFloat16>());
}

// Calls run(first row, rows, sums) for every run of rows, and returns the sums (size,) of all in their order.
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
