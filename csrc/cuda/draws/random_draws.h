// What the CUDA kernels of random draws are called with; no torch, no CUDA beyond the stream.
#pragma once

#include "draws/random.h"
#include "cuda/rows/row_launch.h"

namespace swin_moe {

constexpr int kBlocksOfLaunch = 128;  // blocks of a network: their rates are arguments of the kernel

struct DropPathLaunch {
  const int64_t* words;   // seed and step
  const int64_t* sample;  // (batch)
  void* out;              // (purposes, blocks, batch), float32 or float64
  int64_t batch, blocks;
  int64_t purpose[2];
  int purposes, element;  // element: RowElement of out
  int64_t first_block;    // of this launch
  int launch_blocks;
  int64_t threshold[kBlocksOfLaunch];
  double factor[kBlocksOfLaunch];  // as the element type has it
};

struct DropoutLaunch {
  const void* x;
  void* out;
  const int64_t* words;
  const int64_t* rows;
  int64_t count, units;
  DrawSite draw;
  int64_t threshold;
  double factor;  // as the element type has it
  int element;    // RowElement of x and out
};

struct NormalLaunch {
  const int64_t* words;
  const int64_t* rows;
  float* out;
  int64_t count, units;
  DrawSite draw;
};

}  // namespace swin_moe

extern "C" {
cudaError_t swin_moe_drop_path(const swin_moe::DropPathLaunch* launch, cudaStream_t stream);
cudaError_t swin_moe_random_dropout(const swin_moe::DropoutLaunch* launch, cudaStream_t stream);
cudaError_t swin_moe_random_normal(const swin_moe::NormalLaunch* launch, cudaStream_t stream);
}
