// What the CUDA kernels of routing are called with; no torch, no CUDA beyond the stream.
#pragma once

#include <cstdint>

#if defined(SWIN_MOE_EMULATION)
#include "cuda_emulation_types.h"
#else
#include <driver_types.h>
#endif

namespace swin_moe {

constexpr int64_t kMaxRoutedExperts = 2048;  // a lane marks up to 64 experts as taken
constexpr int kSlotPairs = 256;              // of one chunk, which belong to one group

// See swin_moe/ops/moe/moe_route.py. `wide`: elements are float64, else float32. `entropies`: (tokens,), of each token;
// `confidence`: (tokens,), or null. `order`: (tokens,), which token of its group takes slots when; null: in token order.
// `before`: (groups * chunks, experts), zero before swin_moe_route_slots; chunks of a group are choice-major, kSlotPairs
// pairs each.
struct RouteLaunch {
  const void *clean, *noisy, *bias;  // noisy may be clean; bias may be null
  void *scores, *probabilities, *gate, *threshold, *entropy, *entropies, *confidence;
  const int64_t* order;
  int64_t *expert, *slot, *demand, *kept, *totals, *before;
  bool* keep;
  int64_t tokens, experts, top_k, group_size, groups, capacity, last_capacity, chunks;
  int sigmoid, normalize, wide;
};

// Pointers of gradients that are not there are null; clean is null without grad_probabilities or probabilities.
struct RouteBackwardLaunch {
  const void *grad_scores, *grad_probabilities, *grad_gate, *grad_threshold, *scores, *probabilities;
  const int64_t* expert;
  void *clean, *noisy;
  int64_t tokens, experts, top_k;
  int sigmoid, normalize, wide;
};

}  // namespace swin_moe

extern "C" {
cudaError_t swin_moe_route_choose(const swin_moe::RouteLaunch* launch, cudaStream_t stream);
cudaError_t swin_moe_route_slots(const swin_moe::RouteLaunch* launch, cudaStream_t stream);
cudaError_t swin_moe_route_backward(const swin_moe::RouteBackwardLaunch* launch, cudaStream_t stream);
}
