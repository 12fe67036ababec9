// What the kernels of packed layers are given, without torch: shared by the binding and the kernels.
//
// One call reads rows, normalizes them, multiplies them by one packed matrix or by two with GELU between, normalizes
// the result, adds the residual and writes it, a block of rows at a time, so that nothing between leaves the cache.
//
// Shape legend: N rows, K inputs, H hidden channels, O outputs, E experts (1 of a plain layer).
#pragma once

#include <cstdint>

#include "window/window_attention.h"

namespace swin_moe {

// Where the K numbers of a row come from.
enum class RowSource { kRows, kMerged, kPatches };

struct RowNorm {
  const void *weight, *bias;  // (K or O in whole vectors), accumulated; null: no norm
  double eps;
};

struct PackedMatrix {
  const void* data;           // (E, packed bytes)
  const void* bias;           // (E, columns in whole vectors), accumulated; null: none
  int64_t inputs, outputs;
};

// Pointers to Element, except where "accumulated" is said: see window_attention.h.
struct PackedLayers {
  RowSource source;
  bool accumulated_in, accumulated_out;  // x, out hold accumulated numbers
  const void* x;              // kRows: (N, K); kMerged: (B, height, width, channels); kPatches: (B, channels, height, width)
  int64_t height, width, channels;
  int64_t rows_of_image, columns_of_image;  // what an image becomes, kMerged and kPatches
  int64_t patch_h, patch_w;
  RowNorm before, after;
  PackedMatrix first, second; // second.data null: one matrix
  const void* residual;       // (N, O), accumulated; null: none
  void* out;                  // (N, O)
};

struct PackedTask {
  int64_t expert, row_begin, row_end;
  int64_t next_expert;        // whose rows come after these, -1: none
};

struct PackedKernels {
  int64_t (*packed_bytes)(int64_t outputs, int64_t inputs);
  void (*pack)(const void* weight, int64_t outputs, int64_t inputs, void* packed);  // of one expert, (outputs, inputs)
  void (*run)(const PackedLayers&, const PackedTask&);
  int vector_lanes;           // accumulated numbers of a vector: biases and norms are padded to its multiples
};

// By Element.
const PackedKernels* packed_kernels_default();
#if defined(SWIN_MOE_X86_KERNELS)
const PackedKernels* packed_kernels_avx2();
const PackedKernels* packed_kernels_avx512_bf16();
#endif

}  // namespace swin_moe
