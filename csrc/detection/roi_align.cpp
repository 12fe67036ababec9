// Features of boxes by bilinear samples, and their gradient: schemas and the CPU kernels. Arguments:
// swin_moe/ops/detection/roi_align.py. A box has a short list of weights for each of its bins and axes; a channel's map
// stays in the cache while all boxes of its image pass over it, and has one owner, so no result depends on threads. A
// cell of weight 0, as between two samples far apart, takes no part, whatever it holds.
#include "roi_align.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "cpu/clones.h"
#include "roi_geometry.h"

namespace swin_moe {
namespace {

using at::Tensor;

// Of one bin: cells of the axis, and where their weights begin.
struct Bin {
  int first, count;
  int64_t weights;
};

template <class T>
struct BoxBins {
  std::vector<Bin> y, x;   // (R, S)
  std::vector<T> weights;
  std::vector<Span> columns;  // (R): that any of a box's bins takes
  std::vector<std::vector<int64_t>> of_image;
  std::vector<int64_t> broken;  // boxes with what is no finite number
  int bins;
};

template <class T>
void append_axis(const BoxAxis<T>& axis, int bins, int cells, std::vector<T>& row, std::vector<T>& weights,
                 std::vector<Bin>& to) {
  for (int b = 0; b < bins; ++b) {
    const Span span = add_bin(axis, b, cells, row.data());
    to.push_back({span.first, span.end - span.first, int64_t(weights.size())});
    weights.insert(weights.end(), row.begin() + span.first, row.begin() + span.end);
    std::fill(row.begin() + span.first, row.begin() + span.end, T(0));
  }
}

template <class T>
BoxBins<T> make_bins(const char* name, const Tensor& rois, int64_t batch, int64_t height, int64_t width, int bins,
                     T scale, int sampling, bool aligned) {
  BoxBins<T> made;
  made.bins = bins;
  made.of_image.resize(batch);
  std::vector<T> row(std::max(height, width) + 1, T(0));
  const T* roi = rois.const_data_ptr<T>();
  for (int64_t r = 0; r < rois.size(0); ++r, roi += 5) {
    TORCH_CHECK_INDEX(roi[0] >= T(0) && roi[0] < T(batch), name, ": box ", r, " is of image ", roi[0], ", there are ",
                      batch);
    const auto x = box_axis(roi[1], roi[3], scale, bins, sampling, aligned);
    const auto y = box_axis(roi[2], roi[4], scale, bins, sampling, aligned);
    append_axis(y, bins, int(height), row, made.weights, made.y);
    append_axis(x, bins, int(width), row, made.weights, made.x);
    Span columns{int(width), 0};
    for (auto bin = made.x.end() - bins; bin != made.x.end(); ++bin)
      if (bin->count) columns = {std::min(columns.first, bin->first), std::max(columns.end, bin->first + bin->count)};
    made.columns.push_back(columns);
    if (x.finite && y.finite)
      made.of_image[int64_t(roi[0])].push_back(r);
    else
      made.broken.push_back(r);
  }
  return made;
}

// One box over one channel. cells: The map. out: (S, S). sums: As wide as the map.
template <class T>
SWIN_MOE_INLINED void align_box(const BoxBins<T>& bins, int64_t r, const T* cells, int64_t width, T* sums, T* out) {
  const int size = bins.bins;
  const Bin *y = &bins.y[r * size], *x = &bins.x[r * size];
  const Span columns = bins.columns[r];
  const int wide = columns.end - columns.first;
  for (int i = 0; i < size; ++i, out += size) {
    for (int c = 0; c < wide; ++c) sums[c] = T(0);
    const T* weight = bins.weights.data() + y[i].weights;
    for (int k = 0; k < y[i].count; ++k) {
      const T* from = cells + (y[i].first + k) * width + columns.first;
      const T w = weight[k];
      if (w == T(0)) continue;
      for (int c = 0; c < wide; ++c) sums[c] += w * from[c];
    }
    for (int j = 0; j < size; ++j) {
      const T *w = bins.weights.data() + x[j].weights, *from = sums + (x[j].first - columns.first);
      T sum = T(0);
      for (int k = 0; k < x[j].count; ++k) sum += w[k] != T(0) ? w[k] * from[k] : T(0);
      out[j] = sum;
    }
  }
}

// Adds the gradient of one box to one channel's map; grad: (S, S).
template <class T>
SWIN_MOE_INLINED void spread_box(const BoxBins<T>& bins, int64_t r, const T* grad, int64_t width, T* sums, T* cells) {
  const int size = bins.bins;
  const Bin *y = &bins.y[r * size], *x = &bins.x[r * size];
  const Span columns = bins.columns[r];
  const int wide = columns.end - columns.first;
  for (int i = 0; i < size; ++i, grad += size) {
    if (!y[i].count) continue;
    for (int c = 0; c < wide; ++c) sums[c] = T(0);
    for (int j = 0; j < size; ++j) {
      const T *w = bins.weights.data() + x[j].weights, g = grad[j];
      T* to = sums + (x[j].first - columns.first);
      for (int k = 0; k < x[j].count; ++k) to[k] += w[k] != T(0) ? w[k] * g : T(0);
    }
    const T* weight = bins.weights.data() + y[i].weights;
    for (int k = 0; k < y[i].count; ++k) {
      T* to = cells + (y[i].first + k) * width + columns.first;
      const T w = weight[k];
      if (w == T(0)) continue;
      for (int c = 0; c < wide; ++c) to[c] += w * sums[c];
    }
  }
}

SWIN_MOE_CLONES void align(const BoxBins<float>& bins, int64_t r, const float* cells, int64_t width, float* sums,
                           float* out) {
  align_box(bins, r, cells, width, sums, out);
}
SWIN_MOE_CLONES void align(const BoxBins<double>& bins, int64_t r, const double* cells, int64_t width, double* sums,
                           double* out) {
  align_box(bins, r, cells, width, sums, out);
}
SWIN_MOE_CLONES void spread(const BoxBins<float>& bins, int64_t r, const float* grad, int64_t width, float* sums,
                            float* cells) {
  spread_box(bins, r, grad, width, sums, cells);
}
SWIN_MOE_CLONES void spread(const BoxBins<double>& bins, int64_t r, const double* grad, int64_t width, double* sums,
                            double* cells) {
  spread_box(bins, r, grad, width, sums, cells);
}

template <class E>
using SumOf = std::conditional_t<std::is_same_v<E, double>, double, float>;

// Returns numbers as sums have them: where they are, or copied.
template <class E, class T = SumOf<E>>
const T* widened(const E* from, int64_t count, std::vector<T>& copy) {
  if constexpr (std::is_same_v<E, T>) {
    return from;
  } else {
    copy.assign(from, from + count);
    return copy.data();
  }
}

template <class E>
void align_all(const Tensor& features, const BoxBins<SumOf<E>>& bins, Tensor& out) {
  using T = SumOf<E>;
  const int64_t channels = features.size(1), width = features.size(3), area = features.size(2) * width;
  const int64_t square = int64_t(bins.bins) * bins.bins;
  const E* from = features.const_data_ptr<E>();
  E* to = out.mutable_data_ptr<E>();
  at::parallel_for(0, features.size(0) * channels, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> sums(width), copy, found(square);
    for (int64_t plane = begin; plane < end; ++plane) {
      const auto& boxes = bins.of_image[plane / channels];
      if (boxes.empty()) continue;
      const T* cells = widened(from + plane * area, area, copy);
      for (const int64_t r : boxes) {
        align(bins, r, cells, width, sums.data(), found.data());
        std::copy(found.begin(), found.end(), to + (r * channels + plane % channels) * square);
      }
    }
  });
  for (const int64_t r : bins.broken)
    std::fill_n(to + r * channels * square, channels * square, std::numeric_limits<E>::quiet_NaN());
}

template <class E>
void spread_all(const Tensor& grad, const BoxBins<SumOf<E>>& bins, Tensor& out) {
  using T = SumOf<E>;
  const int64_t channels = out.size(1), width = out.size(3), area = out.size(2) * width;
  const int64_t square = int64_t(bins.bins) * bins.bins;
  const E* from = grad.const_data_ptr<E>();
  E* to = out.mutable_data_ptr<E>();
  at::parallel_for(0, out.size(0) * channels, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> sums(width), copy, cells(area);
    for (int64_t plane = begin; plane < end; ++plane) {
      std::fill(cells.begin(), cells.end(), T(0));
      for (const int64_t r : bins.of_image[plane / channels]) {
        const T* given = widened(from + (r * channels + plane % channels) * square, square, copy);
        spread(bins, r, given, width, sums.data(), cells.data());
      }
      std::copy(cells.begin(), cells.end(), to + plane * area);
    }
  });
}

// Calls `run.operator()<element>(bins)` with the bins of all boxes on a map.
template <class Run>
void with_bins(const char* name, at::ScalarType type, const Tensor& rois, int64_t batch, int64_t height, int64_t width,
               int64_t size, double scale, int64_t sampling, bool aligned, Run run) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, type, "roi_align", [&] {
    using T = SumOf<scalar_t>;
    run.template operator()<scalar_t>(make_bins<T>(name, rois.contiguous(), batch, height, width, int(size), T(scale),
                                                   int(sampling), aligned));
  });
}

Tensor roi_align_cpu(const Tensor& features_, const Tensor& rois, int64_t size, double scale, int64_t sampling,
                     bool aligned) {
  constexpr const char* kName = "roi_align";
  check_roi_features(kName, features_);
  check_rois(kName, features_, rois, size, scale, sampling);
  const Tensor features = features_.contiguous();
  Tensor out = at::empty({rois.size(0), features.size(1), size, size}, features.options());
  with_bins(kName, features.scalar_type(), rois, features.size(0), features.size(2), features.size(3), size, scale,
            sampling, aligned, [&]<class E>(const BoxBins<SumOf<E>>& bins) { align_all<E>(features, bins, out); });
  return out;
}

Tensor roi_align_backward_cpu(const Tensor& grad_, const Tensor& rois, int64_t batch, int64_t height, int64_t width,
                              double scale, int64_t sampling, bool aligned) {
  constexpr const char* kName = "roi_align_backward";
  check_roi_gradient(kName, grad_, rois);
  check_roi_map(kName, batch, grad_.size(1), height, width);
  check_rois(kName, grad_, rois, grad_.size(2), scale, sampling);
  const Tensor grad = grad_.contiguous();
  Tensor out = at::empty({batch, grad.size(1), height, width}, grad.options());
  with_bins(kName, grad.scalar_type(), rois, batch, height, width, grad.size(2), scale, sampling, aligned,
            [&]<class E>(const BoxBins<SumOf<E>>& bins) { spread_all<E>(grad, bins, out); });
  return out;
}

}  // namespace
}  // namespace swin_moe

TORCH_LIBRARY_FRAGMENT(swin_moe, m) {
  m.def(
      "roi_align(Tensor features, Tensor rois, int size, float scale, int sampling, bool aligned) -> Tensor");
  m.def(
      "roi_align_backward(Tensor grad, Tensor rois, SymInt batch, SymInt height, SymInt width, float scale, int "
      "sampling, bool aligned) -> Tensor");
}

TORCH_LIBRARY_IMPL(swin_moe, CPU, m) {
  m.impl("roi_align", &swin_moe::roi_align_cpu);
  m.impl("roi_align_backward", &swin_moe::roi_align_backward_cpu);
}
