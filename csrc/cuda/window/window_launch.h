// What the CUDA kernels of window attention are called with; no torch, no CUDA beyond the stream.
#pragma once

#include <cstddef>
#include <cstdint>

#include "window/window_geometry.h"

namespace swin_moe {

enum class CudaElement : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Device pointers are to `element` unless a type is given. Shape legend: B images, H x W tokens, C channels.
struct WindowLaunch {
  const void* qkv;               // (B, H, W, 3C)
  const void* pad_qkv;           // (3C), what padding holds; null = zeros
  const float* bias_table;       // (table_rows, heads)
  const float* logit_scale;      // (heads), factor of cosine scores; null = dot products
  void* out;                     // (B, H, W, C)
  // (windows, heads, tokens): log2 of the sums of 2 ** (score * log2 e). Written by forward kernels of 16-bit elements,
  // null = not wanted; read, with out, by backward kernels where swin_moe_window_needs_log_sums.
  float* log_sums;
  // Backward only:
  const void* grad_out;          // (B, H, W, C)
  void* grad_qkv;                // (B, H, W, 3C)
  float* grad_bias_table;        // (table_rows, heads)
  float* grad_logit_scale;       // (heads); null without logit_scale
  float* grad_pad_qkv;           // (3C); null = not wanted
  void* workspace;               // swin_moe_window_workspace bytes, aligned to 16; backward only
  WindowGeometry geometry;
  int64_t batch;
  int num_heads, head_dim;
  float scale, mask_value;
  int element;                   // a CudaElement

  SWIN_MOE_BOTH int channels() const { return num_heads * head_dim; }
  SWIN_MOE_BOTH int64_t windows() const { return batch * geometry.windows(); }
};

}  // namespace swin_moe

#if defined(SWIN_MOE_EMULATION)
#include "cuda_emulation_types.h"
#else
#include <driver_types.h>
#endif

extern "C" {
// Bytes of shared memory of a block of the kernels chosen where `most` are allowed; 0 = none fits. Of the shape, the
// element and `most` alone.
size_t swin_moe_window_shared(const swin_moe::WindowLaunch* launch, int backward, size_t most);
// What the current device allows, which is what the functions below choose by.
size_t swin_moe_window_most_shared();
// Bytes of workspace that swin_moe_window_backward needs.
size_t swin_moe_window_workspace(const swin_moe::WindowLaunch* launch);
// Whether swin_moe_window_backward needs what the forward left in `out` and `log_sums`.
int swin_moe_window_needs_log_sums(const swin_moe::WindowLaunch* launch);
cudaError_t swin_moe_window_forward(const swin_moe::WindowLaunch* launch, cudaStream_t stream);
// Sums in a fixed order: the same bits every time.
cudaError_t swin_moe_window_backward(const swin_moe::WindowLaunch* launch, cudaStream_t stream);
}
