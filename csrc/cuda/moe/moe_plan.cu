// The order of rows for experts in two launches: where every expert and group starts, then every pair to its row. A row
// has one owner, so no result depends on the order of threads.
#include "plan_launch.h"
#include "cuda/warp.cuh"

namespace swin_moe {
namespace {

constexpr int kPlanThreads = 256;

// One block, which sees its own counts behind the barrier: any number of experts, which shared memory would not hold.
// Every thread takes some experts, over all groups.
__global__ void __launch_bounds__(kPlanThreads) plan_starts_kernel(const PlanLaunch p) {
  for (int64_t e = threadIdx.x; e < p.experts; e += kPlanThreads) {
    int64_t count = 0;
    for (int64_t g = 0; g < p.groups; ++g) count += p.kept[g * p.experts + e];
    p.counts[e] = count;
  }
  __syncthreads();
  for (int64_t e = threadIdx.x; e < p.experts; e += kPlanThreads) {
    int64_t next = e * p.padded_rows;
    if (p.padded_rows < 0) {
      next = 0;
      for (int64_t lower = 0; lower < e; ++lower) next += p.counts[lower];
    }
    for (int64_t g = 0; g < p.groups; ++g) {
      p.first[g * p.experts + e] = next;
      next += p.kept[g * p.experts + e];
    }
  }
}

// A thread for every pair, and for every row of the padded order.
__global__ void __launch_bounds__(kPlanThreads) plan_place_kernel(const PlanLaunch p) {
  const int64_t i = int64_t(blockIdx.x) * kPlanThreads + threadIdx.x;
  if (i < p.pairs) {
    const int64_t group = p.groups == 1 ? 0 : i / p.top_k / p.group_size;
    const bool stays = p.keep[i];
    const int64_t row = stays ? p.first[group * p.experts + p.expert[i]] + p.slot[i] : 0;
    p.position[i] = row;
    if (stays && row < p.rows) p.pair[row] = i;
  }
  if (p.vacant && i < p.rows) p.vacant[i] = i % p.padded_rows >= p.counts[i / p.padded_rows];
}

}  // namespace
}  // namespace swin_moe

cudaError_t swin_moe_plan(const swin_moe::PlanLaunch* launch_, cudaStream_t stream) {
  using namespace swin_moe;
  const PlanLaunch& p = *launch_;
  const cudaError_t error = launch(plan_starts_kernel, 1, kPlanThreads, 0, stream, p);
  if (error != cudaSuccess) return error;
  const int64_t threads = p.vacant && p.rows > p.pairs ? p.rows : p.pairs;
  return launch(plan_place_kernel, (threads + kPlanThreads - 1) / kPlanThreads, kPlanThreads, 0, stream, p);
}
