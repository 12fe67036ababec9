// What the CUDA kernels of balance losses are called with; no torch, no CUDA beyond the stream.
#pragma once

#include "moe/moe_balance.h"

#if defined(SWIN_MOE_EMULATION)
#include "cuda_emulation_types.h"
#else
#include <driver_types.h>
#endif

namespace swin_moe {

constexpr int64_t kBalanceRows = 128;  // tokens of a chunk, which belong to one group

// See swin_moe/ops/moe/moe_balance.py. Elements are float64 where `wide`, else float32; a token's group is its number
// divided by group_size, which is at most the number of tokens.
struct BalanceLaunch {
  const void *scores, *threshold, *logits;      // (tokens, experts), (tokens), (tokens, experts); null: not used
  const int64_t* expert;                        // (tokens, top_k)
  void *sums, *load, *log_sum;                  // (groups, experts) twice, (tokens); read by the backward
  void *partials, *squares;                     // (groups * chunks, 2, experts), (groups * chunks)
  void *balance, *aux;                          // ()
  const void* grad;                             // (), of aux
  void *grad_scores, *grad_threshold, *grad_logits;
  int64_t tokens, experts, top_k, group_size, groups, chunks;  // chunks: of a group
  double noise_std, weight, z_weight;
  int64_t kind;                                 // BalanceKind
  int wide;
};

}  // namespace swin_moe

extern "C" {
cudaError_t swin_moe_balance(const swin_moe::BalanceLaunch* launch, cudaStream_t stream);
cudaError_t swin_moe_balance_backward(const swin_moe::BalanceLaunch* launch, cudaStream_t stream);
}
