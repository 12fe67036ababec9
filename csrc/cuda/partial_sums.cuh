// Sums of partial results in a fixed order: the same bits whatever the order in which blocks ran.
#pragma once

#include "warp.cuh"

namespace swin_moe {

// Where the sum of a cell goes: cells are (outer, inner) and out is (inner, outer), after `zeros` cells that are zero.
struct SumLayout {
  int64_t cells, inner, zeros;
};

constexpr int kSumCells = 32, kSumSlices = 16;

// partials (count, cells) -> out. A block sums 32 cells; each of its 16 slices takes every 16th partial.
static __global__ void __launch_bounds__(kSumCells* kSumSlices)
    sum_partials_kernel(const float* partials, int64_t count, SumLayout layout, float* out) {
  float* sums = reinterpret_cast<float*>(shared_memory());
  const int column = threadIdx.x % kSumCells, slice = threadIdx.x / kSumCells;
  const int64_t cell = int64_t(blockIdx.x) * kSumCells + column - layout.zeros;
  float sum = 0.f;
  if (cell >= 0 && cell < layout.cells) {
#pragma unroll 4
    for (int64_t i = slice; i < count; i += kSumSlices) sum += partials[i * layout.cells + cell];
  }
  sums[slice * kSumCells + column] = sum;
  __syncthreads();
  if (slice != 0 || cell >= layout.cells) return;
  for (int other = 1; other < kSumSlices; ++other) sum += sums[other * kSumCells + column];
  if (cell < 0)
    out[cell + layout.zeros] = 0.f;
  else
    out[layout.zeros + cell % layout.inner * (layout.cells / layout.inner) + cell / layout.inner] = sum;
}

inline cudaError_t sum_partials(const float* partials, int64_t count, const SumLayout& layout, float* out,
                                cudaStream_t stream) {
  const int64_t blocks = (layout.cells + layout.zeros + kSumCells - 1) / kSumCells;
  return launch(sum_partials_kernel, blocks, kSumCells * kSumSlices, kSumCells * kSumSlices * sizeof(float), stream,
                partials, count, layout, out);
}

}  // namespace swin_moe
