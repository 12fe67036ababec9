// What the kernels of window attention are given, without torch: shared by the binding and the CPU kernels.
//
// Shape legend: B images, H x W tokens, C channels, heads of head_dim = C / heads, N tokens of a window.
#pragma once

#include <cstdint>

#include "window_geometry.h"

namespace swin_moe {

enum class Element { kFloat64, kFloat32, kBFloat16, kFloat16 };
constexpr int kElements = 4;

// Pointers to Element, except where "accumulated" is said: those are float64 for kFloat64 and float32 otherwise. Sums
// over many windows, whose terms nearly cancel, are float64.
struct WindowAttention {
  WindowGeometry geometry;
  int64_t batch, channels;
  int num_heads, head_dim;
  double scale;              // of dot products; not used with logit_scale
  double mask_value;         // added to scores across the seam of the shift
  const void* qkv;           // (B, H, W, 3C)
  const void* pad_qkv;       // (3C), what padding holds; null only where nothing is padded
  const void* bias_table;    // (heads, table_rows), accumulated
  const void* logit_scale;   // (heads), accumulated, factor of cosine scores; null = dot products
  void* out;                 // (B, H, W, C); forward only, and the following only backward
  const void* grad_out;      // (B, H, W, C)
  void* grad_qkv;            // (B, H, W, 3C)
  double* grad_bias_table;   // (shares, heads, table_rows), zeros on entry
  double* grad_logit_scale;  // (shares, heads), zeros on entry; null without logit_scale
  double* grad_pad_qkv;      // (shares, 3C), zeros on entry; null where nothing is padded
};

// Heads [head_begin, head_end) of windows [window_begin, window_end), counted over all images.
struct WindowTask {
  int head_begin, head_end;
  int64_t window_begin, window_end;
  int64_t share;             // row of the partial gradients that belongs to these windows
};

using WindowKernel = void (*)(const WindowAttention&, const WindowTask&);

// The kernels compiled for one set of instructions.
struct WindowKernels {
  WindowKernel forward[kElements];
  WindowKernel backward[kElements];
};

const WindowKernels& window_kernels_default();
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SWIN_MOE_X86_KERNELS 1  // they choose instructions by a pragma of GCC
const WindowKernels& window_kernels_avx2();
const WindowKernels& window_kernels_avx512_bf16();
#endif

}  // namespace swin_moe
