// Intersection over union of two boxes: shared by the CPU and the CUDA kernels, and rounded alike everywhere.
#pragma once

#include "rounded.h"

namespace swin_moe {

template <class T>
struct Box {
  T x1, y1, x2, y2;
};

template <class T>
SWIN_MOE_BOTH_SIDES T box_area(const Box<T>& box) {
  return rounded_product(box.x2 - box.x1, box.y2 - box.y1);
}

// 0 where there is no area, or what is no number.
template <class T>
SWIN_MOE_BOTH_SIDES T box_overlap(const Box<T>& a, T area_a, const Box<T>& b, T area_b) {
  T width = (a.x2 < b.x2 ? a.x2 : b.x2) - (a.x1 > b.x1 ? a.x1 : b.x1);
  T height = (a.y2 < b.y2 ? a.y2 : b.y2) - (a.y1 > b.y1 ? a.y1 : b.y1);
  width = width > T(0) ? width : T(0);
  height = height > T(0) ? height : T(0);
  const T shared = rounded_product(width, height), both = area_a + area_b - shared;
  const T overlap = shared / (both > T(0) ? both : T(1));
  return both > T(0) ? overlap : T(0);
}

}  // namespace swin_moe
