// x + factor * branch and its LayerNorm, and x + factor * LayerNorm of branch: a warp for a row, whose lanes each keep
// to their own channels, so that what a lane leaves in shared memory only it reads. Sums have a fixed order.
#include "partial_sums.cuh"
#include "residual_norm.h"

namespace swin_moe {
namespace {

constexpr int kNormWarps = 4;  // of a block; two sums of 1536 channels for each fill the 48 KiB that any device gives
constexpr int kNormThreads = 32 * kNormWarps;

// `Width` neighbouring elements, read and written at once.
template <class T, int Width>
struct alignas(sizeof(T) * Width) Vector {
  T values[Width];
};

template <class T>
__device__ __forceinline__ float rounded(float x) {
  T stored;
  from_float(stored, x);
  return to_float(stored);
}

template <class T>
__device__ __forceinline__ float factor_of(const ResidualNormLaunch& p, int64_t row) {
  return p.factor ? rounded<T>(p.factor[row / p.rows_per_image]) : 1.f;
}

template <class T, int Width>
__device__ __forceinline__ Vector<T, Width> load(const void* from, int64_t row, int64_t channels, int64_t vector) {
  return reinterpret_cast<const Vector<T, Width>*>(static_cast<const T*>(from) + row * channels)[vector];
}

template <class T, int Width>
__device__ __forceinline__ Vector<T, Width>& place(void* to, int64_t row, int64_t channels, int64_t vector) {
  return reinterpret_cast<Vector<T, Width>*>(static_cast<T*>(to) + row * channels)[vector];
}

struct Statistics {
  float mean, rstd;
};

// Of the row whose values the lanes left in the warp's part of shared memory, each having summed its own to `total`.
template <int Width>
__device__ __forceinline__ Statistics row_statistics(const ResidualNormLaunch& p, float* kept, float total) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const float mean = warp_sum(total) / float(p.channels);
  float squares = 0.f;
  for (int64_t i = lane; i < p.channels / Width; i += 32) {
    const auto x = load<float, Width>(kept, warp, p.channels, i);
#pragma unroll
    for (int c = 0; c < Width; ++c) squares += (x.values[c] - mean) * (x.values[c] - mean);
  }
  return {mean, 1.f / sqrtf(warp_sum(squares) / float(p.channels) + p.eps)};
}

// The warps' sums for weight and bias, (warps, 2, channels), with the lane's channels of its warp at zero.
template <int Width>
__device__ __forceinline__ float* cleared_sums(int64_t channels) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float* sums = reinterpret_cast<float*>(shared_memory());
  for (int64_t i = lane; i < channels / Width; i += 32)
    place<float, Width>(sums, 2 * warp, channels, i) = place<float, Width>(sums, 2 * warp + 1, channels, i) = {};
  return sums;
}

// Adds what the warps of a block left for weight and bias, in the order of warps.
__device__ __forceinline__ void add_warps(const ResidualNormLaunch& p, const float* sums) {
  for (int64_t cell = threadIdx.x; cell < 2 * p.channels; cell += kNormThreads) {
    float sum = 0.f;
    for (int other = 0; other < kNormWarps; ++other) sum += sums[other * 2 * p.channels + cell];
    p.partials[blockIdx.x * 2 * p.channels + cell] = sum;
  }
}

template <class T, int Width>
__global__ void __launch_bounds__(kNormThreads) residual_norm_kernel(const ResidualNormLaunch p) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t row = int64_t(blockIdx.x) * kNormWarps + warp, channels = p.channels, vectors = channels / Width;
  if (row >= p.rows) return;
  float* kept = reinterpret_cast<float*>(shared_memory());
  const float factor = factor_of<T>(p, row);
  float total = 0.f;
  for (int64_t i = lane; i < vectors; i += 32) {
    const auto x = load<float, Width>(p.x, row, channels, i);
    const auto branch = load<T, Width>(p.branch, row, channels, i);
    Vector<float, Width> sum;
#pragma unroll
    for (int c = 0; c < Width; ++c) {
      sum.values[c] = x.values[c] + rounded<T>(to_float(branch.values[c]) * factor);
      total += sum.values[c];
    }
    place<float, Width>(p.sum, row, channels, i) = sum;
    place<float, Width>(kept, warp, channels, i) = sum;
  }
  const auto [mean, rstd] = row_statistics<Width>(p, kept, total);
  for (int64_t i = lane; i < vectors; i += 32) {
    const auto sum = load<float, Width>(kept, warp, channels, i);
    const auto weight = load<float, Width>(p.weight, 0, channels, i);
    const auto bias = load<float, Width>(p.bias, 0, channels, i);
    Vector<float, Width> normed;
#pragma unroll
    for (int c = 0; c < Width; ++c)
      normed.values[c] = (sum.values[c] - mean) * rstd * weight.values[c] + bias.values[c];
    place<float, Width>(p.normed, row, channels, i) = normed;
  }
  if (lane != 0) return;
  p.mean[row] = mean;
  p.rstd[row] = rstd;
}

// A block takes every gridDim-th group of rows; its warps' sums for weight and bias are added in their order at the end.
template <class T, int Width>
__global__ void __launch_bounds__(kNormThreads) residual_norm_backward_kernel(const ResidualNormLaunch p, int64_t step) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t channels = p.channels, vectors = channels / Width;
  float* sums = cleared_sums<Width>(channels);
  for (int64_t row = int64_t(blockIdx.x) * kNormWarps + warp; row < p.rows; row += step) {
    const float mean = p.mean[row], rstd = p.rstd[row], factor = factor_of<T>(p, row);
    float plain = 0.f, along = 0.f;
    for (int64_t i = lane; i < vectors; i += 32) {
      const auto sum = load<float, Width>(p.sum, row, channels, i);
      const auto grad = load<float, Width>(p.grad_normed, row, channels, i);
      const auto weight = load<float, Width>(p.weight, 0, channels, i);
      auto& of_weight = place<float, Width>(sums, 2 * warp, channels, i);
      auto& of_bias = place<float, Width>(sums, 2 * warp + 1, channels, i);
#pragma unroll
      for (int c = 0; c < Width; ++c) {
        const float normal = (sum.values[c] - mean) * rstd, scaled = grad.values[c] * weight.values[c];
        plain += scaled;
        along += scaled * normal;
        of_weight.values[c] += grad.values[c] * normal;
        of_bias.values[c] += grad.values[c];
      }
    }
    plain = warp_sum(plain) / float(channels);
    along = warp_sum(along) / float(channels);
    for (int64_t i = lane; i < vectors; i += 32) {
      const auto sum = load<float, Width>(p.sum, row, channels, i);
      const auto grad = load<float, Width>(p.grad_normed, row, channels, i);
      const auto weight = load<float, Width>(p.weight, 0, channels, i);
      Vector<float, Width> x{};
      if (p.grad_sum) x = load<float, Width>(p.grad_sum, row, channels, i);
      Vector<T, Width> branch;
#pragma unroll
      for (int c = 0; c < Width; ++c) {
        const float normal = (sum.values[c] - mean) * rstd;
        x.values[c] += rstd * (grad.values[c] * weight.values[c] - plain - normal * along);
        from_float(branch.values[c], x.values[c] * factor);
      }
      place<float, Width>(p.grad_x, row, channels, i) = x;
      place<T, Width>(p.grad_branch, row, channels, i) = branch;
    }
  }
  __syncthreads();
  add_warps(p, sums);
}

template <class T, int Width>
__global__ void __launch_bounds__(kNormThreads) norm_residual_kernel(const ResidualNormLaunch p) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t row = int64_t(blockIdx.x) * kNormWarps + warp, channels = p.channels, vectors = channels / Width;
  if (row >= p.rows) return;
  float* kept = reinterpret_cast<float*>(shared_memory());
  const float factor = factor_of<float>(p, row);
  float total = 0.f;
  for (int64_t i = lane; i < vectors; i += 32) {
    const auto branch = load<T, Width>(p.branch, row, channels, i);
    Vector<float, Width> wide;
#pragma unroll
    for (int c = 0; c < Width; ++c) total += wide.values[c] = to_float(branch.values[c]);
    place<float, Width>(kept, warp, channels, i) = wide;
  }
  const auto [mean, rstd] = row_statistics<Width>(p, kept, total);
  for (int64_t i = lane; i < vectors; i += 32) {
    const auto branch = load<float, Width>(kept, warp, channels, i);
    const auto weight = load<float, Width>(p.weight, 0, channels, i);
    const auto bias = load<float, Width>(p.bias, 0, channels, i);
    auto sum = load<float, Width>(p.x, row, channels, i);
#pragma unroll
    for (int c = 0; c < Width; ++c)
      sum.values[c] += factor * ((branch.values[c] - mean) * rstd * weight.values[c] + bias.values[c]);
    place<float, Width>(p.sum, row, channels, i) = sum;
  }
  if (lane != 0) return;
  p.mean[row] = mean;
  p.rstd[row] = rstd;
}

// The gradient of x is that of the sum, so only the branch's and those of weight and bias are made.
template <class T, int Width>
__global__ void __launch_bounds__(kNormThreads) norm_residual_backward_kernel(const ResidualNormLaunch p, int64_t step) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t channels = p.channels, vectors = channels / Width;
  float* sums = cleared_sums<Width>(channels);
  for (int64_t row = int64_t(blockIdx.x) * kNormWarps + warp; row < p.rows; row += step) {
    const float mean = p.mean[row], rstd = p.rstd[row], factor = factor_of<float>(p, row);
    float plain = 0.f, along = 0.f;
    for (int64_t i = lane; i < vectors; i += 32) {
      const auto branch = load<T, Width>(p.branch, row, channels, i);
      const auto grad = load<float, Width>(p.grad_sum, row, channels, i);
      const auto weight = load<float, Width>(p.weight, 0, channels, i);
      auto& of_weight = place<float, Width>(sums, 2 * warp, channels, i);
      auto& of_bias = place<float, Width>(sums, 2 * warp + 1, channels, i);
#pragma unroll
      for (int c = 0; c < Width; ++c) {
        const float normal = (to_float(branch.values[c]) - mean) * rstd, given = grad.values[c] * factor;
        const float scaled = given * weight.values[c];
        plain += scaled;
        along += scaled * normal;
        of_weight.values[c] += given * normal;
        of_bias.values[c] += given;
      }
    }
    plain = warp_sum(plain) / float(channels);
    along = warp_sum(along) / float(channels);
    for (int64_t i = lane; i < vectors; i += 32) {
      const auto branch = load<T, Width>(p.branch, row, channels, i);
      const auto grad = load<float, Width>(p.grad_sum, row, channels, i);
      const auto weight = load<float, Width>(p.weight, 0, channels, i);
      Vector<T, Width> made;
#pragma unroll
      for (int c = 0; c < Width; ++c) {
        const float normal = (to_float(branch.values[c]) - mean) * rstd;
        from_float(made.values[c], rstd * (grad.values[c] * factor * weight.values[c] - plain - normal * along));
      }
      place<T, Width>(p.grad_branch, row, channels, i) = made;
    }
  }
  __syncthreads();
  add_warps(p, sums);
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

enum class Pass { kSumThenNorm, kSumThenNormBackward, kNormThenSum, kNormThenSumBackward };

template <class T, int Width>
cudaError_t run(const ResidualNormLaunch& p, Pass pass, cudaStream_t stream) {
  const bool backward = pass == Pass::kSumThenNormBackward || pass == Pass::kNormThenSumBackward;
  if (!backward)
    return launch(pass == Pass::kSumThenNorm ? residual_norm_kernel<T, Width> : norm_residual_kernel<T, Width>,
                  (p.rows + kNormWarps - 1) / kNormWarps, kNormThreads, kNormWarps * p.channels * sizeof(float),
                  stream, p);
  const int64_t blocks = swin_moe_residual_norm_blocks(p.rows);
  const cudaError_t error = launch(
      pass == Pass::kSumThenNormBackward ? residual_norm_backward_kernel<T, Width>
                                         : norm_residual_backward_kernel<T, Width>,
      blocks, kNormThreads, 2 * kNormWarps * p.channels * sizeof(float), stream, p, blocks * kNormWarps);
  if (error != cudaSuccess) return error;
  return sum_partials(p.partials, blocks, {2 * p.channels, 2 * p.channels, 0}, p.grad_weight, stream);
}

cudaError_t run_element(const ResidualNormLaunch& p, Pass pass, cudaStream_t stream) {
  if (p.channels > kLargestNormChannels) return cudaErrorInvalidValue;
  bool wide = p.channels % 4 == 0;
  for (const void* rows : {static_cast<const void*>(p.x), p.branch, static_cast<const void*>(p.weight),
                           static_cast<const void*>(p.bias), static_cast<const void*>(p.sum),
                           static_cast<const void*>(p.normed), static_cast<const void*>(p.grad_sum),
                           static_cast<const void*>(p.grad_normed), static_cast<const void*>(p.grad_x),
                           static_cast<const void*>(p.grad_branch)})
    wide = wide && aligned(rows);
  switch (RowElement(p.element)) {
    case RowElement::kFloat32: return wide ? run<float, 4>(p, pass, stream) : run<float, 1>(p, pass, stream);
    case RowElement::kBFloat16:
      return wide ? run<BFloat16, 4>(p, pass, stream) : run<BFloat16, 1>(p, pass, stream);
    case RowElement::kFloat16:
      return wide ? run<Float16, 4>(p, pass, stream) : run<Float16, 1>(p, pass, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace
}  // namespace swin_moe

cudaError_t swin_moe_residual_norm(const swin_moe::ResidualNormLaunch* p, cudaStream_t stream) {
  return swin_moe::run_element(*p, swin_moe::Pass::kSumThenNorm, stream);
}

cudaError_t swin_moe_residual_norm_backward(const swin_moe::ResidualNormLaunch* p, cudaStream_t stream) {
  return swin_moe::run_element(*p, swin_moe::Pass::kSumThenNormBackward, stream);
}

cudaError_t swin_moe_norm_residual(const swin_moe::ResidualNormLaunch* p, cudaStream_t stream) {
  return swin_moe::run_element(*p, swin_moe::Pass::kNormThenSum, stream);
}

cudaError_t swin_moe_norm_residual_backward(const swin_moe::ResidualNormLaunch* p, cudaStream_t stream) {
  return swin_moe::run_element(*p, swin_moe::Pass::kNormThenSumBackward, stream);
}

int64_t swin_moe_residual_norm_blocks(int64_t rows) {
  const int64_t groups = (rows + swin_moe::kNormWarps - 1) / swin_moe::kNormWarps;
  return groups < swin_moe::kEnoughBackwardBlocks ? groups : swin_moe::kEnoughBackwardBlocks;
}
