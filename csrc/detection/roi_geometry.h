// Which cells of a map a bin of a box takes, and with what weights: shared by the CPU and the CUDA kernels.
//
// An axis of a box is cut into bins, and sample k of bin b lies at start + b bin + (k + 0.5) bin / count cells. A sample
// beyond -1 or the last cell + 1 counts as 0, between -1 and 0 it is the first cell, else it is linear between two. The
// mean over a bin of two axes is the product of two means. Source: mmcv's RoIAlign (1.3.0), arXiv:1703.06870.
#pragma once

#include <cmath>
#include <cstdint>

#include "rounded.h"

namespace swin_moe {

constexpr int kMostSamples = 1 << 22;  // of a bin and axis: whose number float32 holds with its half

template <class T>
struct BoxAxis {
  T start, bin;  // cells
  T count;       // samples of a bin, a whole number
  bool finite;
};

template <class T>
SWIN_MOE_BOTH_SIDES BoxAxis<T> box_axis(T low, T high, T scale, int bins, int sampling, bool aligned) {
  const T offset = aligned ? T(0.5) : T(0);
  const T start = rounded_product(low, scale) - offset, end = rounded_product(high, scale) - offset;
  T side = end - start;
  if (!aligned && side < T(1)) side = T(1);  // as before the half cell was known: never less than a cell
  const T bin = side / T(bins);
  T count = sampling > 0 ? T(sampling) : std::ceil(bin);
  if (!(count > T(0))) count = T(0);
  if (count > T(kMostSamples)) count = T(kMostSamples);
  return {start, bin, count, bin - bin == T(0) && start - start == T(0)};
}

struct Span {
  int first, end;  // cells
};

// Adds the weights of the cells in the mean of bin b to `row`, one number for every cell of the axis; returns which.
template <class T>
SWIN_MOE_BOTH_SIDES Span add_bin(const BoxAxis<T>& axis, int b, int cells, T* row) {
  Span span{cells, 0};
  if (!axis.finite || axis.count == T(0)) return {0, 0};
  const T base = axis.start + rounded_product(T(b), axis.bin);
  // Of the samples of a huge box, only those near the map are looked at. Slack: positions are rounded.
  int64_t begin = 0, end = int64_t(axis.count);
  if (axis.count > T(64) && axis.bin > T(0)) {
    const double per_cell = double(axis.count) / double(axis.bin);
    const double slack = 4.0 + 1e-6 * (double(axis.count) + std::fabs(double(base)) * per_cell);
    const double low = (-1.0 - double(base)) * per_cell - slack, high = (double(cells) - double(base)) * per_cell + slack;
    if (high <= 0.0 || low >= double(axis.count)) return {0, 0};
    if (low > 0.0) begin = int64_t(low);
    if (high < double(axis.count)) end = int64_t(high) + 1;
  }
  for (int64_t k = begin; k < end; ++k) {
    T place = base + rounded_product(T(k) + T(0.5), axis.bin) / axis.count;
    if (!(place >= T(-1) && place <= T(cells))) continue;
    if (place < T(0)) place = T(0);
    if (place > T(cells - 1)) place = T(cells - 1);
    const int first = int(place), second = first + 1 < cells ? first + 1 : first;
    const T share = place - T(first);
    row[first] += (T(1) - share) / axis.count;
    row[second] += share / axis.count;
    if (first < span.first) span.first = first;
    if (second + 1 > span.end) span.end = second + 1;
  }
  return span.end ? span : Span{0, 0};
}

}  // namespace swin_moe
