// What the kernels of residual sum and LayerNorm are called with; no torch, no CUDA beyond the stream.
#pragma once

#include "row_launch.h"

namespace swin_moe {

constexpr int64_t kLargestNormChannels = 1536;  // LARGEST_CHANNELS of swin_moe/ops/residual_norm.py

// Rows are (rows, channels); what is not named otherwise is float32.
struct ResidualNormLaunch {
  const float* x;
  const void* branch;     // of `element`
  const float* factor;    // (rows / rows_per_image); null = 1
  const float* weight;    // (channels)
  const float* bias;      // (channels)
  float* sum;             // read by the backward
  float* normed;
  float* mean;            // (rows); read by the backward
  float* rstd;            // (rows); read by the backward
  const float* grad_sum;  // null = 0
  const float* grad_normed;
  float* grad_x;
  void* grad_branch;      // of `element`
  float* partials;        // (swin_moe_residual_norm_blocks, 2, channels)
  float* grad_weight;     // (2, channels): of weight, of bias
  int64_t rows, rows_per_image, channels;
  float eps;
  int element;            // RowElement of branch: not float64
};

}  // namespace swin_moe

extern "C" {
cudaError_t swin_moe_residual_norm(const swin_moe::ResidualNormLaunch* launch, cudaStream_t stream);
cudaError_t swin_moe_residual_norm_backward(const swin_moe::ResidualNormLaunch* launch, cudaStream_t stream);
// The same of x + factor * LayerNorm(branch): without normed, grad_normed and grad_x, which is grad_sum.
cudaError_t swin_moe_norm_residual(const swin_moe::ResidualNormLaunch* launch, cudaStream_t stream);
cudaError_t swin_moe_norm_residual_backward(const swin_moe::ResidualNormLaunch* launch, cudaStream_t stream);
// Partial sums of the backward of so many rows.
int64_t swin_moe_residual_norm_blocks(int64_t rows);
}
