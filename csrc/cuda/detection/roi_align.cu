// Features of boxes and their gradient. A first kernel writes what every bin of a box takes of the rows and columns of
// the map; both others read these weights. A cell whose weight is 0 takes no part, whatever it holds. The gradient of a
// cell has one owner that goes over the boxes near it in their order, so that no result depends on the order of threads.
#include "detection/roi_geometry.h"
#include "detection_launch.h"
#include "cuda/rows/row_groups.cuh"

namespace swin_moe {
namespace {

constexpr int kRoiThreads = 256, kTile = 16, kTogether = 8;  // cells of a side of a block, channels of a thread

template <class T>
__global__ void __launch_bounds__(kRoiThreads) roi_bins_kernel(const RoiLaunch p) {
  const int64_t i = int64_t(blockIdx.x) * kRoiThreads + threadIdx.x;  // box, axis, bin
  if (i >= p.boxes * 2 * p.size) return;
  const int64_t r = i / (2 * p.size);
  const bool is_x = i / p.size % 2;
  const int b = int(i % p.size);
  const T* roi = static_cast<const T*>(p.rois) + 5 * r;
  const auto y = box_axis(roi[2], roi[4], T(p.scale), p.size, p.sampling, p.aligned != 0);
  const auto x = box_axis(roi[1], roi[3], T(p.scale), p.size, p.sampling, p.aligned != 0);
  const bool is_there = roi[0] >= T(0) && roi[0] < T(p.batch) && x.finite && y.finite;
  if (!is_x && b == 0) p.image[r] = is_there ? int(roi[0]) : -1;
  const int cells = int(is_x ? p.width : p.height);
  T* row = static_cast<T*>(is_x ? p.columns : p.rows) + (r * p.size + b) * cells;
  Span span{0, 0};
  if (is_there) span = add_bin(is_x ? x : y, b, cells, row);
  int* to = (is_x ? p.column_spans : p.row_spans) + (r * p.size + b) * 2;
  to[0] = span.first;
  to[1] = span.end;
}

// A thread for every number of the result.
template <class E>
__global__ void __launch_bounds__(kRoiThreads) roi_align_kernel(const RoiLaunch p) {
  using T = typename SumOf<E>::Type;
  const int64_t i = int64_t(blockIdx.x) * kRoiThreads + threadIdx.x;
  if (i >= p.boxes * p.channels * p.size * p.size) return;
  const int column = int(i % p.size), row = int(i / p.size % p.size);
  const int64_t channel = i / p.size / p.size % p.channels, r = i / p.size / p.size / p.channels;
  const int image = p.image[r];
  T sum = image < 0 ? T(NAN) : T(0);
  if (image >= 0) {
    const int64_t y = r * p.size + row, x = r * p.size + column;
    const T* of_row = static_cast<const T*>(p.rows) + y * p.height;
    const T* of_column = static_cast<const T*>(p.columns) + x * p.width;
    const E* cells = static_cast<const E*>(p.from) + (image * p.channels + channel) * p.height * p.width;
    for (int h = p.row_spans[2 * y]; h < p.row_spans[2 * y + 1]; ++h) {
      if (of_row[h] == T(0)) continue;
      T across = T(0);
      for (int w = p.column_spans[2 * x]; w < p.column_spans[2 * x + 1]; ++w)
        if (of_column[w] != T(0)) across += of_column[w] * to_float(cells[h * p.width + w]);
      sum += of_row[h] * across;
    }
  }
  from_float(static_cast<E*>(p.out)[i], sum);
}

// Adds what one box gives to a cell, to kTogether channels of it.
template <class E, class T>
__device__ __forceinline__ void add_box(const RoiLaunch& p, int64_t r, int64_t h, int64_t w, int64_t channel,
                                        T (&sums)[kTogether]) {
  for (int i = 0; i < p.size; ++i) {
    const int64_t y = r * p.size + i;
    if (h < p.row_spans[2 * y] || h >= p.row_spans[2 * y + 1]) continue;
    const T down = static_cast<const T*>(p.rows)[y * p.height + h];
    for (int j = 0; j < p.size; ++j) {
      const int64_t x = r * p.size + j;
      if (w < p.column_spans[2 * x] || w >= p.column_spans[2 * x + 1]) continue;
      const T weight = down * static_cast<const T*>(p.columns)[x * p.width + w];
      if (weight == T(0)) continue;
      const E* grad = static_cast<const E*>(p.from) + ((r * p.channels + channel) * p.size + i) * p.size + j;
#pragma unroll
      for (int c = 0; c < kTogether; ++c)
        if (channel + c < p.channels) sums[c] += weight * T(to_float(grad[int64_t(c) * p.size * p.size]));
    }
  }
}

// Whether any bin of box r takes cells from `first` up to a tile's side on. spans: Of the boxes' bins along that axis.
__device__ __forceinline__ bool meets_tile(const RoiLaunch& p, const int* spans, int64_t r, int64_t first) {
  for (int64_t bin = r * p.size; bin < (r + 1) * p.size; ++bin)
    if (spans[2 * bin] < first + kTile && spans[2 * bin + 1] > first) return true;
  return false;
}

// Writes the numbers of the threads with `found` to `list` in rising order; returns how many there are. All threads of
// a block take part; both lists are shared memory that nobody reads any more.
__device__ __forceinline__ int list_threads(bool found, int* list, int* of_warps) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int before = 0, all = found;  // of the lanes below this one, and of its group of lanes
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int others = __shfl_xor_sync(kAllLanes, all, distance);
    if (lane & distance) before += others;
    all += others;
  }
  if (lane == 0) of_warps[warp] = all;
  __syncthreads();
  int count = 0;
  for (int w = 0; w < kRoiThreads / 32; ++w) {
    if (w == warp && found) list[count + before] = threadIdx.x;
    count += of_warps[w];
  }
  __syncthreads();
  return count;
}

// A block for a tile of cells and kTogether channels of an image, a thread for every cell. Of the boxes, kRoiThreads at
// a time, each thread looks at one; then all go over those that are of this image and reach into this tile. Left to
// itself the compiler fits five blocks to a multiprocessor (sm_90) and spills.
template <class E>
__global__ void __launch_bounds__(kRoiThreads, 4) roi_align_backward_kernel(const RoiLaunch p) {
  using T = typename SumOf<E>::Type;
  const int64_t across = (p.width + kTile - 1) / kTile, tiles = across * ((p.height + kTile - 1) / kTile);
  const int64_t parts = (p.channels + kTogether - 1) / kTogether;
  const int64_t tile = blockIdx.x % tiles, channel = blockIdx.x / tiles % parts * kTogether;
  const int64_t image = blockIdx.x / tiles / parts;
  const int64_t first_row = tile / across * kTile, first_column = tile % across * kTile;
  const int64_t h = first_row + threadIdx.x / kTile, w = first_column + threadIdx.x % kTile;
  const bool inside = h < p.height && w < p.width;
  int *list = reinterpret_cast<int*>(shared_memory()), *of_warps = list + kRoiThreads;
  T sums[kTogether] = {};
  for (int64_t first = 0; first < p.boxes; first += kRoiThreads) {
    const int64_t own = first + threadIdx.x;
    const bool near = own < p.boxes && p.image[own] == image &&
                      meets_tile(p, p.row_spans, own, first_row) &&
                      meets_tile(p, p.column_spans, own, first_column);
    const int count = list_threads(near, list, of_warps);
    for (int k = 0; inside && k < count; ++k) add_box<E>(p, first + list[k], h, w, channel, sums);
    __syncthreads();  // nobody reads the list any more
  }
  if (!inside) return;
  E* out = static_cast<E*>(p.out) + ((image * p.channels + channel) * p.height + h) * p.width + w;
  for (int c = 0; c < kTogether && channel + c < p.channels; ++c) from_float(out[c * p.height * p.width], sums[c]);
}

template <class E>
cudaError_t align(const RoiLaunch& p, cudaStream_t stream) {
  const int64_t count = p.boxes * p.channels * p.size * p.size;
  return launch(roi_align_kernel<E>, (count + kRoiThreads - 1) / kRoiThreads, kRoiThreads, 0, stream, p);
}

template <class E>
cudaError_t align_backward(const RoiLaunch& p, cudaStream_t stream) {
  const int64_t tiles = ((p.width + kTile - 1) / kTile) * ((p.height + kTile - 1) / kTile);
  const int64_t blocks = tiles * ((p.channels + kTogether - 1) / kTogether) * p.batch;
  constexpr size_t kShared = (kRoiThreads + kRoiThreads / 32) * sizeof(int);
  return launch(roi_align_backward_kernel<E>, blocks, kRoiThreads, kShared, stream, p);
}

template <class E>
cudaError_t run(const RoiLaunch& p, bool backward, cudaStream_t stream) {
  return backward ? align_backward<E>(p, stream) : align<E>(p, stream);
}

cudaError_t run_element(const RoiLaunch& p, bool backward, cudaStream_t stream) {
  switch (RowElement(p.element)) {
    case RowElement::kFloat64: return run<double>(p, backward, stream);
    case RowElement::kFloat32: return run<float>(p, backward, stream);
    case RowElement::kBFloat16: return run<BFloat16>(p, backward, stream);
    case RowElement::kFloat16: return run<Float16>(p, backward, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace swin_moe

cudaError_t swin_moe_roi_bins(const swin_moe::RoiLaunch* launch_, cudaStream_t stream) {
  using namespace swin_moe;
  const RoiLaunch& p = *launch_;
  const int64_t count = p.boxes * 2 * p.size, blocks = (count + kRoiThreads - 1) / kRoiThreads;
  if (p.element == int(RowElement::kFloat64)) return launch(roi_bins_kernel<double>, blocks, kRoiThreads, 0, stream, p);
  return launch(roi_bins_kernel<float>, blocks, kRoiThreads, 0, stream, p);
}

cudaError_t swin_moe_roi_align(const swin_moe::RoiLaunch* launch, cudaStream_t stream) {
  return swin_moe::run_element(*launch, false, stream);
}

cudaError_t swin_moe_roi_align_backward(const swin_moe::RoiLaunch* launch, cudaStream_t stream) {
  return swin_moe::run_element(*launch, true, stream);
}
