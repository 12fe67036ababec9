// Soft non-maximum suppression: schema and the CPU kernel. Arguments: swin_moe/ops/detection/soft_nms.py.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <vector>

#include "cpu/detection/box_groups.h"
#include "nms.h"
#include "soft_decay.h"

namespace swin_moe {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// One group: the best that is left is final, and takes score from the others. Equal scores: the first row.
template <class T>
void soften(const BoxGroups<T>& g, int64_t begin, int64_t end, const SoftDecay<T>& decay, T* scores) {
  std::vector<int64_t> left;  // in input order
  for (int64_t row = begin; row < end; ++row)
    if (scores[row] >= decay.min_score)
      left.push_back(row);
    else
      scores[row] = -std::numeric_limits<T>::infinity();
  while (!left.empty()) {
    size_t best = 0;
    for (size_t i = 1; i < left.size(); ++i)
      if (scores[left[i]] > scores[left[best]]) best = i;
    const int64_t row = left[best];
    size_t stay = 0;
    for (size_t i = 0; i < left.size(); ++i) {
      if (i == best) continue;
      const int64_t other = left[i];
      scores[other] *= decay.factor(box_overlap(g.at_row(row), g.area[row], g.at_row(other), g.area[other]));
      if (scores[other] >= decay.min_score)
        left[stay++] = other;
      else
        scores[other] = -std::numeric_limits<T>::infinity();
    }
    left.resize(stay);
  }
}

Tensor soft_nms_cpu(const Tensor& boxes, const Tensor& scores_, const OptionalTensor& groups, double threshold,
                    double sigma, bool gaussian, double min_score) {
  check_boxes("soft_nms", boxes, scores_, groups);
  check_soft("soft_nms", sigma, gaussian);
  const int64_t count = boxes.size(0);
  const Tensor scores = scores_.contiguous();
  Tensor out = at::empty_like(scores);
  AT_DISPATCH_FLOATING_TYPES(boxes.scalar_type(), "soft_nms", [&] {
    std::vector<int64_t> order(count);
    std::iota(order.begin(), order.end(), 0);
    const BoxGroups<scalar_t> g(boxes, groups, std::move(order));
    const SoftDecay<scalar_t> decay{scalar_t(threshold), scalar_t(sigma), scalar_t(min_score), gaussian};
    const scalar_t* from = scores.const_data_ptr<scalar_t>();
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    std::vector<scalar_t> sorted(count);
    for (int64_t i = 0; i < count; ++i) sorted[i] = from[g.order[i]];
    at::parallel_for(0, g.groups(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group)
        soften<scalar_t>(g, g.starts[group], g.starts[group + 1], decay, sorted.data());
    });
    for (int64_t i = 0; i < count; ++i) to[g.order[i]] = sorted[i];
  });
  return out;
}

}  // namespace
}  // namespace swin_moe

TORCH_LIBRARY_FRAGMENT(swin_moe, m) {
  m.def(
      "soft_nms(Tensor boxes, Tensor scores, Tensor? groups, float threshold, float sigma, bool gaussian, float "
      "min_score) -> Tensor");
}

TORCH_LIBRARY_IMPL(swin_moe, CPU, m) { m.impl("soft_nms", &swin_moe::soft_nms_cpu); }
