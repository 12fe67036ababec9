// What the CUDA kernels that order rows for experts are called with; no torch, no CUDA beyond the stream.
#pragma once

#include <cstdint>

#if defined(SWIN_MOE_EMULATION)
#include "cuda_emulation_types.h"
#else
#include <driver_types.h>
#endif

namespace swin_moe {

// See csrc/moe/moe_plan.cpp. `pair` is zero before.
struct PlanLaunch {
  const int64_t *expert, *slot;  // (tokens, top_k)
  const bool* keep;              // (tokens, top_k)
  const int64_t* kept;           // (groups, experts)
  int64_t *position, *pair;      // (tokens, top_k), (rows)
  bool* vacant;                  // (rows); null without padding
  int64_t *counts, *first;       // (experts), and (groups, experts): row of the first pair
  int64_t pairs, top_k, groups, experts, group_size, rows, padded_rows;  // padded_rows < 0: without padding
};

}  // namespace swin_moe

extern "C" cudaError_t swin_moe_plan(const swin_moe::PlanLaunch* launch, cudaStream_t stream);
