// Columns of a deformable convolution and their gradients (csrc/detection/deform_geometry.h). A thread owns what a tap
// reads for an output, in all channels of a group. The gradient of the map has owners too: what every read took of
// which cell is written down and sorted by cell, then a thread adds what a cell gave, in the order of taps and outputs
// as the CPU does, so that no result depends on the order of threads.
#include "detection_launch.h"
#include "cuda/warp.cuh"

namespace swin_moe {
namespace {

constexpr int kDeformThreads = 256, kTogether = 8;  // kTogether: channels of a thread

int64_t blocks_of(int64_t count) { return (count + kDeformThreads - 1) / kDeformThreads; }

// A read: of which image and group (their number), tap and output.
struct DeformRead {
  int64_t owner, output;
  int tap;
  bool valid;
};

__device__ __forceinline__ DeformRead read_of(const DeformGeometry& g) {
  const int64_t i = int64_t(blockIdx.x) * kDeformThreads + threadIdx.x, outputs = g.outputs();
  const int64_t owner = i / outputs / g.taps();
  return {owner, i % outputs, int(i / outputs % g.taps()), owner < g.batch * g.groups};
}

template <class T>
__device__ __forceinline__ DeformPlace<T> place_of(const DeformLaunch& p, const DeformRead& r) {
  const T* offsets = static_cast<const T*>(p.offsets) + r.owner * 2 * p.geometry.taps() * p.geometry.outputs();
  return deform_place(p.geometry, offsets, r.tap, r.output);
}

template <class T>
__device__ __forceinline__ T factor_of(const DeformLaunch& p, const DeformRead& r) {
  if (!p.mask) return T(1);
  return static_cast<const T*>(p.mask)[(r.owner * p.geometry.taps() + r.tap) * p.geometry.outputs() + r.output];
}

template <class T>
__global__ void __launch_bounds__(kDeformThreads) deform_columns_kernel(const DeformLaunch p) {
  const DeformGeometry& g = p.geometry;
  const DeformRead r = read_of(g);
  if (!r.valid) return;
  const DeformPlace<T> place = place_of<T>(p, r);
  const T factor = factor_of<T>(p, r);
  const int64_t each = g.channels / g.groups, step = int64_t(g.taps()) * g.outputs();
  const T* cells = static_cast<const T*>(p.x) + r.owner * each * g.area();
  T* to = static_cast<T*>(p.out) + r.owner * each * step + r.tap * g.outputs() + r.output;
  for (int64_t c = 0; c < each; ++c) to[c * step] = deform_value(place, cells + c * g.area()) * factor;
}

// The gradients of offsets and mask, and what every read took of its four cells.
template <class T>
__global__ void __launch_bounds__(kDeformThreads) deform_slopes_kernel(const DeformLaunch p) {
  const DeformGeometry& g = p.geometry;
  const DeformRead r = read_of(g);
  if (!r.valid) return;
  const DeformPlace<T> place = place_of<T>(p, r);
  const T factor = factor_of<T>(p, r);
  const int64_t each = g.channels / g.groups, step = int64_t(g.taps()) * g.outputs();
  const T* cells = static_cast<const T*>(p.x) + r.owner * each * g.area();
  const T* grad = static_cast<const T*>(p.grad) + r.owner * each * step + r.tap * g.outputs() + r.output;
  T along_y = T(0), along_x = T(0), of_mask = T(0);
  for (int64_t c = 0; c < each; ++c) {
    T slope_y, slope_x;
    deform_slope(place, cells + c * g.area(), slope_y, slope_x);
    const T given = grad[c * step] * factor;
    along_y += slope_y * given;
    along_x += slope_x * given;
    if (p.mask) of_mask += deform_value(place, cells + c * g.area()) * grad[c * step];
  }
  const int64_t read = (r.owner * g.taps() + r.tap) * g.outputs() + r.output;
  T* grad_offsets = static_cast<T*>(p.grad_offsets) + 2 * (r.owner * g.taps() + r.tap) * g.outputs() + r.output;
  grad_offsets[0] = along_y;
  grad_offsets[g.outputs()] = along_x;
  if (p.mask) static_cast<T*>(p.grad_mask)[read] = of_mask;
  for (int corner = 0; corner < 4; ++corner) {
    const int64_t cell = place.inside[corner] ? place.cell[corner] : g.area();
    p.taken[4 * read + corner] = r.owner * (g.area() + 1) + cell;
    static_cast<T*>(p.shares)[4 * read + corner] = place.weight[corner] * factor;
  }
}

// Where the takes of each cell begin and end among the sorted ones.
__global__ void __launch_bounds__(kDeformThreads) deform_spans_kernel(const DeformLaunch p) {
  const int64_t i = int64_t(blockIdx.x) * kDeformThreads + threadIdx.x, count = p.geometry.takes();
  if (i >= count) return;
  const int64_t cell = p.sorted[i];
  if (i == 0 || p.sorted[i - 1] != cell) p.spans[2 * cell] = i;
  if (i + 1 == count || p.sorted[i + 1] != cell) p.spans[2 * cell + 1] = i + 1;
}

// A thread for a cell of an image and group, and kTogether of its channels.
template <class T>
__global__ void __launch_bounds__(kDeformThreads) deform_spread_kernel(const DeformLaunch p) {
  const DeformGeometry& g = p.geometry;
  const int64_t each = g.channels / g.groups, parts = (each + kTogether - 1) / kTogether;
  const int64_t i = int64_t(blockIdx.x) * kDeformThreads + threadIdx.x;
  const int64_t cell = i % g.area(), first = i / g.area() % parts * kTogether, owner = i / g.area() / parts;
  if (owner >= g.batch * g.groups) return;
  const int64_t step = int64_t(g.taps()) * g.outputs();
  const int64_t* span = p.spans + 2 * (owner * (g.area() + 1) + cell);
  const T* grad = static_cast<const T*>(p.grad) + (owner * each + first) * step;
  T sums[kTogether] = {};
  for (int64_t k = span[0]; k < span[1]; ++k) {
    const int64_t take = p.order[k], read = take / 4 - owner * step;
    const T share = static_cast<const T*>(p.shares)[take];
#pragma unroll
    for (int c = 0; c < kTogether; ++c)
      if (first + c < each) sums[c] += share * grad[c * step + read];
  }
  T* to = static_cast<T*>(p.out) + (owner * each + first) * g.area() + cell;
  for (int c = 0; c < kTogether && first + c < each; ++c) to[c * g.area()] = sums[c];
}

template <class T>
cudaError_t spread(const DeformLaunch& p, cudaStream_t stream) {
  const DeformGeometry& g = p.geometry;
  const int64_t takes = blocks_of(g.takes());
  const int64_t parts = (g.channels / g.groups + kTogether - 1) / kTogether;
  const int64_t cells = blocks_of(g.batch * g.groups * parts * g.area());
  if (!takes || !cells) return cudaSuccess;
  const cudaError_t error = launch(deform_spans_kernel, takes, kDeformThreads, 0, stream, p);
  return error != cudaSuccess ? error : launch(deform_spread_kernel<T>, cells, kDeformThreads, 0, stream, p);
}

}  // namespace
}  // namespace swin_moe

cudaError_t swin_moe_deform_columns(const swin_moe::DeformLaunch* launch_, cudaStream_t stream) {
  using namespace swin_moe;
  const DeformLaunch& p = *launch_;
  const int64_t blocks = blocks_of(p.geometry.takes() / 4);
  if (p.is_double) return launch(deform_columns_kernel<double>, blocks, kDeformThreads, 0, stream, p);
  return launch(deform_columns_kernel<float>, blocks, kDeformThreads, 0, stream, p);
}

cudaError_t swin_moe_deform_slopes(const swin_moe::DeformLaunch* launch_, cudaStream_t stream) {
  using namespace swin_moe;
  const DeformLaunch& p = *launch_;
  const int64_t blocks = blocks_of(p.geometry.takes() / 4);
  if (p.is_double) return launch(deform_slopes_kernel<double>, blocks, kDeformThreads, 0, stream, p);
  return launch(deform_slopes_kernel<float>, blocks, kDeformThreads, 0, stream, p);
}

cudaError_t swin_moe_deform_spread(const swin_moe::DeformLaunch* launch, cudaStream_t stream) {
  using namespace swin_moe;
  return launch->is_double ? spread<double>(*launch, stream) : spread<float>(*launch, stream);
}
