// Non-maximum suppression: schema and the CPU kernel. Arguments: swin_moe/ops/detection/nms.py. Boxes that meet are side
// by side, so that one box is compared with many at once; not compiled for wider vectors, which would fuse products and
// sums and with them move a decision.
#include "nms.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/argsort.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstring>
#include <vector>

#include "cpu/detection/box_groups.h"

namespace swin_moe {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Marks the rows after `row` and before `end` that it overlaps by more than the threshold.
template <class T>
void suppress(const BoxGroups<T>& g, int64_t row, int64_t end, T threshold, uint8_t* __restrict__ gone) {
  const Box<T> box = g.at_row(row);
  const T area = g.area[row];
  const T *x1 = g.x1.data(), *y1 = g.y1.data(), *x2 = g.x2.data(), *y2 = g.y2.data(), *areas = g.area.data();
  for (int64_t j = row + 1; j < end; ++j)
    gone[j] |= uint8_t(box_overlap<T>(box, area, {x1[j], y1[j], x2[j], y2[j]}, areas[j]) > threshold);
}

Tensor nms_cpu(const Tensor& boxes, const Tensor& scores, const OptionalTensor& groups, double threshold) {
  check_boxes("nms", boxes, scores, groups);
  const int64_t count = boxes.size(0);
  const Tensor order = at::argsort(scores, /*stable=*/true, /*dim=*/0, /*descending=*/true);
  const int64_t* by_score = order.const_data_ptr<int64_t>();
  std::vector<uint8_t> gone(count);  // by input row
  AT_DISPATCH_FLOATING_TYPES(boxes.scalar_type(), "nms", [&] {
    const BoxGroups<scalar_t> g(boxes, groups, std::vector<int64_t>(by_score, by_score + count));
    std::vector<uint8_t> sorted(count);
    at::parallel_for(0, g.groups(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = g.starts[begin], next = begin + 1; row < g.starts[end]; ++row) {
        while (row >= g.starts[next]) ++next;
        if (!sorted[row]) suppress<scalar_t>(g, row, g.starts[next], scalar_t(threshold), sorted.data());
        gone[g.order[row]] = sorted[row];
      }
    });
  });
  int64_t kept = 0;
  for (const uint8_t row : gone) kept += !row;
  Tensor out = at::empty({kept}, order.options());
  int64_t* to = out.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < count; ++i)
    if (!gone[by_score[i]]) *to++ = by_score[i];
  return out;
}

}  // namespace
}  // namespace swin_moe

TORCH_LIBRARY_FRAGMENT(swin_moe, m) {
  m.def("nms(Tensor boxes, Tensor scores, Tensor? groups, float threshold) -> Tensor");
}

TORCH_LIBRARY_IMPL(swin_moe, CPU, m) { m.impl("nms", &swin_moe::nms_cpu); }
