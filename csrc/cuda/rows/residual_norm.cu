// x + factor * branch and its LayerNorm, and x + factor * LayerNorm of branch: a warp for a row, whose lanes each keep
// to their own channels, so that what a lane leaves in shared memory only it reads. Sums have a fixed order.
#include <type_traits>

#include "cuda/partial_sums.cuh"
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

// Sums and norms, one template for both: kSumFirst, sum = x + factor * branch and its norm; else sum = x + factor *
// norm of branch. The factor is rounded as what it multiplies is.
template <class T, int Width, bool kSumFirst>
__global__ void __launch_bounds__(kNormThreads) forward_kernel(const ResidualNormLaunch p) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t row = int64_t(blockIdx.x) * kNormWarps + warp, channels = p.channels, vectors = channels / Width;
  if (row >= p.rows) return;
  float* kept = reinterpret_cast<float*>(shared_memory());
  const float factor = factor_of<std::conditional_t<kSumFirst, T, float>>(p, row);
  float total = 0.f;
  for (int64_t i = lane; i < vectors; i += 32) {
    const auto branch = load<T, Width>(p.branch, row, channels, i);
    Vector<float, Width> own{};
    if constexpr (kSumFirst) own = load<float, Width>(p.x, row, channels, i);
#pragma unroll
    for (int c = 0; c < Width; ++c) {
      const float added = to_float(branch.values[c]);
      own.values[c] = kSumFirst ? own.values[c] + rounded<T>(added * factor) : added;
      total += own.values[c];
    }
    if constexpr (kSumFirst) place<float, Width>(p.sum, row, channels, i) = own;
    place<float, Width>(kept, warp, channels, i) = own;
  }
  const auto [mean, rstd] = row_statistics<Width>(p, kept, total);
  for (int64_t i = lane; i < vectors; i += 32) {
    const auto own = load<float, Width>(kept, warp, channels, i);
    const auto weight = load<float, Width>(p.weight, 0, channels, i);
    const auto bias = load<float, Width>(p.bias, 0, channels, i);
    Vector<float, Width> made{};
    if constexpr (!kSumFirst) made = load<float, Width>(p.x, row, channels, i);
#pragma unroll
    for (int c = 0; c < Width; ++c) {
      const float normed = (own.values[c] - mean) * rstd * weight.values[c] + bias.values[c];
      made.values[c] = kSumFirst ? normed : made.values[c] + factor * normed;
    }
    place<float, Width>(kSumFirst ? p.normed : p.sum, row, channels, i) = made;
  }
  if (lane != 0) return;
  p.mean[row] = mean;
  p.rstd[row] = rstd;
}

// A block takes every gridDim-th group of rows; its warps' sums for weight and bias are added in order at the end.
// Where the norm comes first the gradient of x is that of the sum: only the branch's, weight's and bias's are made.
template <class T, int Width, bool kSumFirst>
__global__ void __launch_bounds__(kNormThreads) backward_kernel(const ResidualNormLaunch p, int64_t step) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t channels = p.channels, vectors = channels / Width;
  using Normed = std::conditional_t<kSumFirst, float, T>;
  float* sums = cleared_sums<Width>(channels);
  for (int64_t row = int64_t(blockIdx.x) * kNormWarps + warp; row < p.rows; row += step) {
    const float mean = p.mean[row], rstd = p.rstd[row];
    const float factor = factor_of<std::conditional_t<kSumFirst, T, float>>(p, row);
    float plain = 0.f, along = 0.f;
    for (int64_t i = lane; i < vectors; i += 32) {
      const auto own = load<Normed, Width>(kSumFirst ? p.sum : p.branch, row, channels, i);
      const auto grad = load<float, Width>(kSumFirst ? p.grad_normed : p.grad_sum, row, channels, i);
      const auto weight = load<float, Width>(p.weight, 0, channels, i);
      auto& of_weight = place<float, Width>(sums, 2 * warp, channels, i);
      auto& of_bias = place<float, Width>(sums, 2 * warp + 1, channels, i);
#pragma unroll
      for (int c = 0; c < Width; ++c) {
        const float normal = (to_float(own.values[c]) - mean) * rstd;
        const float given = kSumFirst ? grad.values[c] : grad.values[c] * factor;
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
      const auto own = load<Normed, Width>(kSumFirst ? p.sum : p.branch, row, channels, i);
      const auto grad = load<float, Width>(kSumFirst ? p.grad_normed : p.grad_sum, row, channels, i);
      const auto weight = load<float, Width>(p.weight, 0, channels, i);
      Vector<float, Width> x{};
      if (kSumFirst && p.grad_sum) x = load<float, Width>(p.grad_sum, row, channels, i);
      Vector<T, Width> branch;
#pragma unroll
      for (int c = 0; c < Width; ++c) {
        const float normal = (to_float(own.values[c]) - mean) * rstd;
        const float given = kSumFirst ? grad.values[c] : grad.values[c] * factor;
        const float through = rstd * (given * weight.values[c] - plain - normal * along);
        if constexpr (kSumFirst) x.values[c] += through;
        from_float(branch.values[c], kSumFirst ? x.values[c] * factor : through);
      }
      if constexpr (kSumFirst) place<float, Width>(p.grad_x, row, channels, i) = x;
      place<T, Width>(p.grad_branch, row, channels, i) = branch;
    }
  }
  __syncthreads();
  add_warps(p, sums);
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

enum class Pass { kForward, kBackward };

template <class T, int Width, bool kSumFirst>
cudaError_t run(const ResidualNormLaunch& p, Pass pass, cudaStream_t stream) {
  if (pass == Pass::kForward)
    return launch(forward_kernel<T, Width, kSumFirst>, (p.rows + kNormWarps - 1) / kNormWarps, kNormThreads,
                  kNormWarps * p.channels * sizeof(float), stream, p);
  const int64_t blocks = swin_moe_residual_norm_blocks(p.rows);
  const cudaError_t error = launch(backward_kernel<T, Width, kSumFirst>, blocks, kNormThreads,
                                   2 * kNormWarps * p.channels * sizeof(float), stream, p, blocks * kNormWarps);
  if (error != cudaSuccess) return error;
  return sum_partials(p.partials, blocks, {2 * p.channels, 2 * p.channels, 0}, p.grad_weight, stream);
}

template <bool kSumFirst>
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
    case RowElement::kFloat32:
      return wide ? run<float, 4, kSumFirst>(p, pass, stream) : run<float, 1, kSumFirst>(p, pass, stream);
    case RowElement::kBFloat16:
      return wide ? run<BFloat16, 4, kSumFirst>(p, pass, stream) : run<BFloat16, 1, kSumFirst>(p, pass, stream);
    case RowElement::kFloat16:
      return wide ? run<Float16, 4, kSumFirst>(p, pass, stream) : run<Float16, 1, kSumFirst>(p, pass, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace
}  // namespace swin_moe

cudaError_t swin_moe_residual_norm(const swin_moe::ResidualNormLaunch* p, cudaStream_t stream) {
  return swin_moe::run_element<true>(*p, swin_moe::Pass::kForward, stream);
}

cudaError_t swin_moe_residual_norm_backward(const swin_moe::ResidualNormLaunch* p, cudaStream_t stream) {
  return swin_moe::run_element<true>(*p, swin_moe::Pass::kBackward, stream);
}

cudaError_t swin_moe_norm_residual(const swin_moe::ResidualNormLaunch* p, cudaStream_t stream) {
  return swin_moe::run_element<false>(*p, swin_moe::Pass::kForward, stream);
}

cudaError_t swin_moe_norm_residual_backward(const swin_moe::ResidualNormLaunch* p, cudaStream_t stream) {
  return swin_moe::run_element<false>(*p, swin_moe::Pass::kBackward, stream);
}

int64_t swin_moe_residual_norm_blocks(int64_t rows) {
  const int64_t groups = (rows + swin_moe::kNormWarps - 1) / swin_moe::kNormWarps;
  return groups < swin_moe::kEnoughBackwardBlocks ? groups : swin_moe::kEnoughBackwardBlocks;
}
