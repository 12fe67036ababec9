// Soft non-maximum suppression: a block owns a group of boxes. Round by round its threads find the best box that is left
// (of equal ones the first), which is final, and take score from the others.
#include "detection/box_overlap.h"
#include "detection/soft_decay.h"
#include "box_groups.cuh"
#include "detection_launch.h"
#include "cuda/limits.cuh"

namespace swin_moe {
namespace {

constexpr int kSoftThreads = 256, kWarps = kSoftThreads / 32;

template <class T>
struct Best {
  T score;
  int64_t row;  // sorted row; -1 = none
};

template <class T>
__device__ __forceinline__ Best<T> better(Best<T> a, Best<T> b) {
  if (b.row < 0) return a;
  if (a.row < 0 || b.score > a.score || (b.score == a.score && b.row < a.row)) return b;
  return a;
}

template <class T>
struct SoftShared {
  Best<T> of_warp[kWarps];
};

// Returns the best of all threads, to each of them.
template <class T>
__device__ Best<T> best_of_block(Best<T> mine, SoftShared<T>& s) {
  for (int distance = 16; distance > 0; distance /= 2) {
    const Best<T> other{__shfl_xor_sync(kAllLanes, mine.score, distance),
                        __shfl_xor_sync(kAllLanes, mine.row, distance)};
    mine = better(mine, other);
  }
  if (threadIdx.x % 32 == 0) s.of_warp[threadIdx.x / 32] = mine;
  __syncthreads();
  Best<T> best = s.of_warp[0];
  for (int warp = 1; warp < kWarps; ++warp) best = better(best, s.of_warp[warp]);
  __syncthreads();
  return best;
}

template <class T>
__device__ __forceinline__ Box<T> soft_box(const SoftLaunch& p, int64_t row) {
  const T* from = static_cast<const T*>(p.boxes) + 4 * p.order[row];
  return {from[0], from[1], from[2], from[3]};
}

// One group, rows start to end.
template <class T>
__device__ void soften(const SoftLaunch& p, int64_t start, int64_t end, SoftShared<T>& s) {
  T* scores = static_cast<T*>(p.scores);
  const SoftDecay<T> decay{T(p.threshold), T(p.sigma), T(p.min_score), p.gaussian != 0};
  for (int64_t row = start + threadIdx.x; row < end; row += kSoftThreads) {
    T& score = scores[p.order[row]];
    p.left[row] = score >= decay.min_score;
    if (!p.left[row]) score = Limits<T>::kLowest;
  }
  for (;;) {
    Best<T> mine{T(0), -1};
    for (int64_t row = start + threadIdx.x; row < end; row += kSoftThreads)
      if (p.left[row]) mine = better(mine, Best<T>{scores[p.order[row]], row});
    const Best<T> best = best_of_block(mine, s);
    if (best.row < 0) return;
    const Box<T> box = soft_box<T>(p, best.row);
    const T area = box_area(box);
    for (int64_t row = start + threadIdx.x; row < end; row += kSoftThreads) {
      if (!p.left[row]) continue;
      if (row == best.row) {
        p.left[row] = false;
        continue;
      }
      const Box<T> other = soft_box<T>(p, row);
      T& score = scores[p.order[row]];
      score *= decay.factor(box_overlap(box, area, other, box_area(other)));
      if (score >= decay.min_score) continue;
      p.left[row] = false;
      score = Limits<T>::kLowest;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kSoftThreads) soft_nms_kernel(const SoftLaunch p) {
  SoftShared<T>& s = *reinterpret_cast<SoftShared<T>*>(shared_memory());
  for_groups(p.group, p.count, [&](int64_t start, int64_t end) { soften<T>(p, start, end, s); });
}

}  // namespace
}  // namespace swin_moe

cudaError_t swin_moe_soft_nms(const swin_moe::SoftLaunch* launch_, cudaStream_t stream) {
  using namespace swin_moe;
  const SoftLaunch& p = *launch_;
  const int64_t blocks = group_blocks(p.group, p.count);
  if (p.is_double)
    return launch(soft_nms_kernel<double>, blocks, kSoftThreads, sizeof(SoftShared<double>), stream, p);
  return launch(soft_nms_kernel<float>, blocks, kSoftThreads, sizeof(SoftShared<float>), stream, p);
}
