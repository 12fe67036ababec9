// Where a deformable convolution (arXiv:1703.06211, arXiv:1811.11168) reads: shared by the CPU and the CUDA kernels.
//
// Tap k of the kernel at an output reads the map at its usual place plus an offset (y, x), linear between cells; cells
// outside the map are 0, whatever its own cells hold. Columns are (B, C, taps, outputs).
#pragma once

#include <cmath>
#include <cstdint>

#include "rounded.h"

namespace swin_moe {

struct DeformGeometry {
  int64_t batch, channels, height, width, out_h, out_w;
  int64_t groups;  // of channels that share offsets
  int kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;

  SWIN_MOE_BOTH_SIDES int taps() const { return kernel_h * kernel_w; }
  SWIN_MOE_BOTH_SIDES int64_t outputs() const { return out_h * out_w; }
  SWIN_MOE_BOTH_SIDES int64_t area() const { return height * width; }
  SWIN_MOE_BOTH_SIDES int64_t takes() const { return 4 * batch * groups * taps() * outputs(); }
};

// The four cells about a place: their weights, 0 outside the map, where every cell is the first; and the shares of the
// way to the lower and to the right one.
template <class T>
struct DeformPlace {
  int64_t cell[4];
  T weight[4];
  T down, along;
  bool inside[4];
};

// offsets: Of one image and group, (taps, 2, outputs).
template <class T>
SWIN_MOE_BOTH_SIDES DeformPlace<T> deform_place(const DeformGeometry& g, const T* offsets, int tap, int64_t output) {
  const T y = T(output / g.out_w * g.stride_h - g.padding_h + tap / g.kernel_w * g.dilation_h) +
              offsets[2 * tap * g.outputs() + output];
  const T x = T(output % g.out_w * g.stride_w - g.padding_w + tap % g.kernel_w * g.dilation_w) +
              offsets[(2 * tap + 1) * g.outputs() + output];
  DeformPlace<T> place{};
  if (!(y > T(-1) && y < T(g.height) && x > T(-1) && x < T(g.width))) return place;
  const T top = std::floor(y), left = std::floor(x);
  place.down = y - top;
  place.along = x - left;
  for (int corner = 0; corner < 4; ++corner) {
    const int64_t row = int64_t(top) + corner / 2, column = int64_t(left) + corner % 2;
    place.inside[corner] = row >= 0 && row < g.height && column >= 0 && column < g.width;
    if (!place.inside[corner]) continue;
    place.cell[corner] = row * g.width + column;
    place.weight[corner] = (corner / 2 ? place.down : T(1) - place.down) * (corner % 2 ? place.along : T(1) - place.along);
  }
  return place;
}

template <class T>
SWIN_MOE_BOTH_SIDES T deform_value(const DeformPlace<T>& p, const T* cells) {
  T sum = T(0);  // not a product with the weight 0 outside, which is no number where the first cell is infinite
  for (int corner = 0; corner < 4; ++corner)
    if (p.inside[corner]) sum += p.weight[corner] * cells[p.cell[corner]];
  return sum;
}

// The slope of deform_value along y and x.
template <class T>
SWIN_MOE_BOTH_SIDES void deform_slope(const DeformPlace<T>& p, const T* cells, T& along_y, T& along_x) {
  T value[4];
  for (int corner = 0; corner < 4; ++corner) value[corner] = p.inside[corner] ? cells[p.cell[corner]] : T(0);
  along_y = (T(1) - p.along) * (value[2] - value[0]) + p.along * (value[3] - value[1]);
  along_x = (T(1) - p.down) * (value[1] - value[0]) + p.down * (value[3] - value[2]);
}

}  // namespace swin_moe
