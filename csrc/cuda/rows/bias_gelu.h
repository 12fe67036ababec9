// What the kernels that add the bias of each row's expert are called with; no torch, no CUDA beyond the stream.
#pragma once

#include "draws/random.h"
#include "row_launch.h"

namespace swin_moe {

// Rows are (rows, channels), those of an expert together.
struct BiasGeluLaunch {
  const void* x;           // products without the bias, of `element`
  const void* grad;        // of the results; backward only
  void* out;               // the results (x itself, if it is to be added to); of the backward the gradient of x
  const float* bias;       // (experts, channels)
  float* partials;         // (swin_moe_bias_gelu_tiles + experts, channels); backward only
  float* grad_bias;        // (experts, channels); backward only
  const int32_t* ends;     // (experts), where the rows of each end; null = all have as many
  const int64_t* words;    // seed and step; null = nothing is dropped
  const int64_t* numbers;  // (rows), the global number of each row
  int64_t rows, channels, experts;
  DrawSite draw;
  int64_t threshold;
  float factor;            // of what is not dropped, as the element type has it
  int element;             // RowElement of x, grad and out: not float64
};

}  // namespace swin_moe

extern "C" {
// dropout(gelu(x + bias)); zeros in rows that belong to no expert.
cudaError_t swin_moe_bias_gelu(const swin_moe::BiasGeluLaunch* launch, cudaStream_t stream);
cudaError_t swin_moe_bias_gelu_backward(const swin_moe::BiasGeluLaunch* launch, cudaStream_t stream);
// x + bias alone, which leaves rows of no expert alone, and the gradient of the bias.
cudaError_t swin_moe_expert_bias(const swin_moe::BiasGeluLaunch* launch, cudaStream_t stream);
cudaError_t swin_moe_expert_bias_gradient(const swin_moe::BiasGeluLaunch* launch, cudaStream_t stream);
// Pieces of rows whose sums the backward keeps apart.
int64_t swin_moe_bias_gelu_tiles(int64_t rows, int64_t channels);
}
