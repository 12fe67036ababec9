// Boxes sorted into groups that never meet, coordinate by coordinate.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <vector>

#include "detection/box_overlap.h"

namespace swin_moe {

// What row i of the sorted order is, and where every group begins (one more at the end).
template <class T>
struct BoxGroups {
  std::vector<int64_t> order, starts;
  std::vector<T> x1, y1, x2, y2, area;

  // order_: The order within each group.
  BoxGroups(const at::Tensor& boxes_, const std::optional<at::Tensor>& groups_, std::vector<int64_t> order_)
      : order(std::move(order_)) {
    const at::Tensor boxes = boxes_.contiguous();
    const int64_t count = boxes.size(0);
    std::vector<int64_t> group(count, 0);
    if (groups_) {
      const at::Tensor groups = groups_->contiguous();
      std::copy_n(groups.const_data_ptr<int64_t>(), count, group.begin());
      std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return group[a] < group[b]; });
    }
    const T* from = boxes.template const_data_ptr<T>();
    for (auto* column : {&x1, &y1, &x2, &y2, &area}) column->resize(count);
    for (int64_t i = 0; i < count; ++i) {
      const T* box = from + 4 * order[i];
      x1[i] = box[0];
      y1[i] = box[1];
      x2[i] = box[2];
      y2[i] = box[3];
      area[i] = box_area<T>(at_row(i));
      if (i == 0 || group[order[i]] != group[order[i - 1]]) starts.push_back(i);
    }
    starts.push_back(count);
  }

  Box<T> at_row(int64_t i) const { return {x1[i], y1[i], x2[i], y2[i]}; }
  int64_t groups() const { return int64_t(starts.size()) - 1; }
};

}  // namespace swin_moe
