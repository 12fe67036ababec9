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
  bool int8;                  // for Int8Kernels
};

// Pointers to Element, except where "accumulated" is said: see window_attention.h.
struct PackedLayers {
  RowSource source;
  bool accumulated_in, accumulated_out;  // x, out hold accumulated numbers
  const void* x;              // kRows: (N, K); kMerged: (B, height, width, channels); kPatches: (B, channels, height, width)
  const int64_t* from;        // (N) rows of x that are read, kRows; null: in order
  int64_t height, width, channels;
  int64_t rows_of_image, columns_of_image;  // what an image becomes, kMerged and kPatches
  int64_t patch_h, patch_w;
  RowNorm before, after;
  PackedMatrix first, second; // second.data null: one matrix
  const void* gate;           // (N) factors of the result, accumulated; null: 1. Only with two matrices
  const int64_t* to;          // (N) rows of inner, residual and out that are read and written; null: in order
  const void* inner;          // (N, O), accumulated, added before the norm of the result; null: none. Of two matrices
  const void* residual;       // (N, O), accumulated; null: none
  void* out;                  // (N, O)
};

struct PackedTask {
  int64_t expert, row_begin, row_end;
  int64_t next_expert;        // whose rows come after these, -1: none
};

// Where tokens go: their norm, a router and its scores. Numbers are accumulated ones but where Element is said.
struct PackedRouter {
  const void* x;              // (T, K)
  RowNorm norm;
  PackedMatrix projector;     // of a cosine router, whose results are divided by their lengths; data null: none
  PackedMatrix router;        // (experts), of the projected tokens or of the tokens
  bool sigmoid;               // scores are sigmoids of logits, else their softmax
  void* rows;                 // (T, K) of Element, gets the normalized tokens
  void* scores;               // (T, experts)
};

// The sum of a token's experts, and what is added to it.
struct PackedCombine {
  const void* y;              // (N, O) accumulated, the experts' results
  const int64_t* position;    // (T, choices), rows of y
  const bool* keep;           // (T, choices)
  const void* gate;           // (T, choices), accumulated
  int64_t choices, outputs;
  bool only_dropped;          // tokens with an expert are already written
  RowNorm after;
  const void *inner, *residual;  // (T, O), accumulated: added before the norm, and after; null: none
  void* out;                  // (T, O), accumulated
};

struct PackedKernels {
  int64_t (*packed_bytes)(int64_t outputs, int64_t inputs);
  void (*pack)(const void* weight, int64_t outputs, int64_t inputs, void* packed);  // of one expert, (outputs, inputs)
  void (*run)(const PackedLayers&, const PackedTask&);
  void (*route)(const PackedRouter&, int64_t begin, int64_t end);      // tokens
  void (*combine)(const PackedCombine&, int64_t begin, int64_t end);   // tokens
  int vector_lanes;           // accumulated numbers of a vector: biases and norms are padded to its multiples
};

// Products of whole numbers: weights in int8 with a scale for each output, rows in uint8 with a scale and a least number
// of their own. A row's scale is found when it is read, so nothing has to be known of the data beforehand.
struct Int8Kernels {
  int64_t (*packed_bytes)(int64_t outputs, int64_t inputs);
  void (*pack)(const float* weight, int64_t outputs, int64_t inputs, void* packed);
  void (*run[kElements])(const PackedLayers&, const PackedTask&);  // null for kFloat64
};

// Largest sum that 32 bits hold, of products of 255 and 127.
constexpr int64_t kMostInt8Inputs = 0x7fffffff / (255 * 127);

const Int8Kernels& int8_kernels_default();
#if defined(SWIN_MOE_X86_KERNELS)
const Int8Kernels& int8_kernels_avx2();
const Int8Kernels& int8_kernels_avx_vnni();  // AVX2 with dot products of bytes
const Int8Kernels& int8_kernels_avx512();
#endif

// By Element.
const PackedKernels* packed_kernels_default();
#if defined(SWIN_MOE_X86_KERNELS)
const PackedKernels* packed_kernels_avx2();
const PackedKernels* packed_kernels_avx512_bf16();
#endif

}  // namespace swin_moe
