// What the CUDA kernels of detectors are called with; no torch, no CUDA beyond the stream.
#pragma once

#include <cstdint>

#include "detection/deform_geometry.h"
#include "cuda/rows/row_launch.h"

namespace swin_moe {

// See csrc/detection/nms.cpp. Rows are sorted by group and, within one, by falling score.
struct NmsLaunch {
  const void* boxes;      // (N, 4), by input row
  const int64_t* order;   // (N): input row of a sorted row
  const int64_t* group;   // (N), of the sorted rows; null = one
  bool* gone;             // (N), by input row; false before
  int64_t count;
  double threshold;
  int is_double;
};

// See csrc/detection/soft_nms.cpp. Rows are sorted by group and, within one, in input order.
struct SoftLaunch {
  const void* boxes;      // (N, 4), by input row
  const int64_t* order;   // (N): input row of a sorted row
  const int64_t* group;   // (N), of the sorted rows; null = one
  void* scores;           // (N), by input row: old ones, then new ones
  bool* left;             // (N), by sorted row: not final yet
  int64_t count;
  double threshold, sigma, min_score;
  int gaussian, is_double;
};

// See csrc/detection/roi_align.cpp. Weights and places are float64 with float64 elements and float32 otherwise.
struct RoiLaunch {
  const void* from;    // features (B, C, H, W), or the gradient (R, C, S, S)
  const void* rois;    // (R, 5)
  void *rows, *columns;  // (R, S, H) and (R, S, W), zero before: weights of the cells in every bin
  int *row_spans, *column_spans;  // (R, S, 2): first cell and end
  int* image;          // (R); -1 = no numbers, or no such image
  void* out;           // (R, C, S, S), or the gradient (B, C, H, W)
  int64_t boxes, batch, channels, height, width;
  int size, sampling, aligned;
  double scale;
  int element;         // RowElement
};

// See csrc/detection/deform_conv.cpp. A take is what one corner of one read took of a cell: 4 for every tap of every
// output.
struct DeformLaunch {
  const void *x, *offsets, *mask, *grad;  // mask: null = 1
  void* out;                              // the columns, or the gradient of x
  void *grad_offsets, *grad_mask;
  int64_t* taken;                // by take: (image, group) x (area + 1) + cell; the cell `area` is outside of the map
  void* shares;                  // by take: weight times mask
  const int64_t *sorted, *order;  // the values of `taken` in rising order, and their takes, equal ones in their order
  int64_t* spans;                // by value of `taken`: first and end in `sorted`; zero before
  DeformGeometry geometry;
  int is_double;
};

}  // namespace swin_moe

extern "C" {
cudaError_t swin_moe_nms(const swin_moe::NmsLaunch* launch, cudaStream_t stream);
cudaError_t swin_moe_soft_nms(const swin_moe::SoftLaunch* launch, cudaStream_t stream);
// Fills weights, spans and images of all boxes; then one of the other two.
cudaError_t swin_moe_roi_bins(const swin_moe::RoiLaunch* launch, cudaStream_t stream);
cudaError_t swin_moe_roi_align(const swin_moe::RoiLaunch* launch, cudaStream_t stream);
cudaError_t swin_moe_roi_align_backward(const swin_moe::RoiLaunch* launch, cudaStream_t stream);
cudaError_t swin_moe_deform_columns(const swin_moe::DeformLaunch* launch, cudaStream_t stream);
// Gradients of offsets and mask, taken cells and shares; then, with those sorted, the gradient of the map.
cudaError_t swin_moe_deform_slopes(const swin_moe::DeformLaunch* launch, cudaStream_t stream);
cudaError_t swin_moe_deform_spread(const swin_moe::DeformLaunch* launch, cudaStream_t stream);
}
