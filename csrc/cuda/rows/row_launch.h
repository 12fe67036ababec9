// What the CUDA kernels that move whole rows are called with; no torch, no CUDA beyond the stream.
#pragma once

#include "window/window_geometry.h"

#if defined(SWIN_MOE_EMULATION)
#include "cuda_emulation_types.h"
#else
#include <driver_types.h>
#endif

namespace swin_moe {

enum class RowElement : int { kFloat64 = 0, kFloat32 = 1, kBFloat16 = 2, kFloat16 = 3 };

// Rows of channels for experts; see csrc/moe/moe_permute.cpp. Gates are float64 with float64 rows and float32
// otherwise.
struct MoeLaunch {
  const void* rows;           // what is read by row
  const void* grad_out;       // (tokens, channels); moe_gate_gradient only
  const int64_t* index;       // pair (outputs) or position (tokens, top_k)
  const bool* flags;          // vacant (outputs) or keep (tokens, top_k); null = none vacant, all kept
  const void* gate;           // (tokens, top_k); null = 1
  void* out;
  int64_t outputs;            // rows of the result
  int64_t channels;
  int top_k;
  int element, other_element; // RowElements: of rows; of out, or of grad_out in moe_gate_gradient
};

}  // namespace swin_moe

extern "C" {
// The tokens of an unpadded map window by window (`merge` false), or back. token_bytes: of one token.
cudaError_t swin_moe_move_windows(const void* from, void* to, const swin_moe::WindowGeometry* geometry, int64_t batch,
                                  int64_t token_bytes, int merge, cudaStream_t stream);
cudaError_t swin_moe_permute(const swin_moe::MoeLaunch* launch, cudaStream_t stream);
cudaError_t swin_moe_unpermute(const swin_moe::MoeLaunch* launch, cudaStream_t stream);
// out: (tokens, top_k) of float64 with float64 rows and float32 otherwise.
cudaError_t swin_moe_gate_gradient(const swin_moe::MoeLaunch* launch, cudaStream_t stream);
}
