// Non-maximum suppression without a host loop and without a matrix of all pairs: a block owns a group. It takes the boxes
// by 64: one thread each finds whom it suppresses among them, one thread settles who stays, and all threads compare the
// rest of the group with those. Every decision is a function of the order alone.
#include "detection/box_overlap.h"
#include "box_groups.cuh"
#include "detection_launch.h"

namespace swin_moe {
namespace {

constexpr int kNmsThreads = 256, kChunk = 64;

template <class T>
struct NmsShared {
  Box<T> box[kChunk];
  T area[kChunk];
  uint64_t meets[kChunk];  // bit j: row suppresses row j of the chunk
  uint64_t stays;
};

template <class T>
__device__ __forceinline__ Box<T> box_of(const NmsLaunch& p, int64_t row) {
  const T* from = static_cast<const T*>(p.boxes) + 4 * p.order[row];
  return {from[0], from[1], from[2], from[3]};
}

// Settles the boxes of a chunk among themselves.
template <class T>
__device__ void settle_chunk(const NmsLaunch& p, int64_t first, int count, NmsShared<T>& s) {
  const int me = int(threadIdx.x);
  const T threshold = T(p.threshold);
  if (me < count) {
    s.box[me] = box_of<T>(p, first + me);
    s.area[me] = box_area(s.box[me]);
  }
  __syncthreads();
  if (me < count) {
    uint64_t meets = 0;
    for (int j = me + 1; j < count; ++j)
      if (box_overlap(s.box[me], s.area[me], s.box[j], s.area[j]) > threshold) meets |= uint64_t(1) << j;
    s.meets[me] = meets;
  }
  __syncthreads();
  if (me == 0) {
    uint64_t stays = 0, gone = 0;
    for (int j = 0; j < count; ++j) {
      if (gone >> j & 1 || p.gone[p.order[first + j]]) continue;
      stays |= uint64_t(1) << j;
      gone |= s.meets[j];
    }
    s.stays = stays;
  }
  __syncthreads();
  if (me < count) p.gone[p.order[first + me]] = !(s.stays >> me & 1);
}

template <class T>
__global__ void __launch_bounds__(kNmsThreads) nms_kernel(const NmsLaunch p) {
  NmsShared<T>& s = *reinterpret_cast<NmsShared<T>*>(shared_memory());
  for_groups(p.group, p.count, [&](int64_t start, int64_t end) {
    for (int64_t first = start; first < end; first += kChunk) {
      const int count = int(end - first < kChunk ? end - first : kChunk);
      settle_chunk<T>(p, first, count, s);
      for (int64_t row = first + count + threadIdx.x; row < end; row += kNmsThreads) {
        bool& gone = p.gone[p.order[row]];
        if (gone) continue;
        const Box<T> box = box_of<T>(p, row);
        const T area = box_area(box);
        for (int j = 0; j < count; ++j)
          if (s.stays >> j & 1 && box_overlap(s.box[j], s.area[j], box, area) > T(p.threshold)) {
            gone = true;
            break;
          }
      }
      __syncthreads();
    }
  });
}

}  // namespace
}  // namespace swin_moe

cudaError_t swin_moe_nms(const swin_moe::NmsLaunch* launch_, cudaStream_t stream) {
  using namespace swin_moe;
  const NmsLaunch& p = *launch_;
  const int64_t blocks = group_blocks(p.group, p.count);
  if (p.is_double) return launch(nms_kernel<double>, blocks, kNmsThreads, sizeof(NmsShared<double>), stream, p);
  return launch(nms_kernel<float>, blocks, kNmsThreads, sizeof(NmsShared<float>), stream, p);
}
