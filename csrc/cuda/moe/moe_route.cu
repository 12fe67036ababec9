// Token-choice routing: a warp per token for scores and choices, then slots by chunks of pairs. Sums and slots have a
// fixed order, so no result depends on the order of threads.
#include "cuda/limits.cuh"
#include "route_launch.h"

namespace swin_moe {
namespace {

constexpr int kRouteThreads = 256;

template <class T>
__device__ __forceinline__ T sigmoid_of(T x) {
  return T(1) / (T(1) + T(exp(-x)));
}

template <class T>
struct SoftmaxOf {
  T largest, sum;
  __device__ __forceinline__ SoftmaxOf(const T* row, int64_t experts, int lane) : largest(Limits<T>::kLowest), sum(0) {
    for (int64_t e = lane; e < experts; e += 32) largest = is_larger(row[e], largest) ? row[e] : largest;
    for (int mask = 16; mask; mask /= 2) {
      const T other = __shfl_xor_sync(kAllLanes, largest, mask);
      largest = is_larger(other, largest) ? other : largest;
    }
    for (int64_t e = lane; e < experts; e += 32) sum += T(exp(row[e] - largest));
    sum = warp_sum(sum);
  }
  __device__ __forceinline__ T operator()(T x) const { return T(exp(x - largest)) / sum; }
};

// The choices of a token, best first, equal ones by lower number; what is taken counts as minus infinity. Every lane
// reads the scores that it has written.
template <class T>
__device__ __forceinline__ void choose(const RouteLaunch& p, const T* row, int64_t* chosen, int lane) {
  const T* bias = static_cast<const T*>(p.bias);
  uint64_t taken = 0;
  for (int64_t k = 0; k < p.top_k; ++k) {
    T best = Limits<T>::kLowest;
    int at = int(p.experts);  // none: larger than all
    for (int e = lane, i = 0; e < p.experts; e += 32, ++i) {
      const T value = taken >> i & 1 ? Limits<T>::kLowest : bias ? row[e] + bias[e] : row[e];
      if (at == p.experts || is_larger(value, best)) best = value, at = e;
    }
    for (int mask = 16; mask; mask /= 2) {
      const T other = __shfl_xor_sync(kAllLanes, best, mask);
      const int other_at = __shfl_xor_sync(kAllLanes, at, mask);
      if (is_larger(other, best) || (!is_larger(best, other) && other_at < at)) best = other, at = other_at;
    }
    if (at % 32 == lane) taken |= uint64_t(1) << at / 32;
    if (lane == 0) chosen[k] = at;
  }
}

template <class T>
__global__ void __launch_bounds__(kRouteThreads) choose_kernel(const RouteLaunch p) {
  const int64_t t = (int64_t(blockIdx.x) * kRouteThreads + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  if (t >= p.tokens) return;
  const T* clean = static_cast<const T*>(p.clean) + t * p.experts;
  const T* noisy = static_cast<const T*>(p.noisy) + t * p.experts;
  T* scores = static_cast<T*>(p.scores) + t * p.experts;
  T entropy = 0;
  if (p.sigmoid) {
    T sum = 0;
    for (int64_t e = lane; e < p.experts; e += 32) {
      scores[e] = sigmoid_of(noisy[e]);
      sum += sigmoid_of(clean[e]);
    }
    sum = at_least(warp_sum(sum), Limits<T>::kTiny);
    for (int64_t e = lane; e < p.experts; e += 32) {
      const T share = sigmoid_of(clean[e]) / sum;
      entropy -= T(log(at_least(share, Limits<T>::kTiny))) * share;
    }
  } else {
    const SoftmaxOf<T> own(noisy, p.experts, lane), known(clean, p.experts, lane);
    T* probabilities = static_cast<T*>(p.probabilities);
    for (int64_t e = lane; e < p.experts; e += 32) {
      scores[e] = own(noisy[e]);
      const T share = known(clean[e]);
      if (probabilities) probabilities[t * p.experts + e] = share;
      entropy -= T(log(at_least(share, Limits<T>::kTiny))) * share;
    }
  }
  entropy = warp_sum(entropy);
  int64_t* chosen = p.expert + t * p.top_k;
  choose<T>(p, scores, chosen, lane);
  __syncwarp();
  if (lane != 0) return;
  T* gate = static_cast<T*>(p.gate) + t * p.top_k;
  T sum = 0;
  for (int64_t k = 0; k < p.top_k; ++k) {
    gate[k] = scores[chosen[k]];
    sum += gate[k];
  }
  if (p.confidence) static_cast<T*>(p.confidence)[t] = gate[0];
  if (p.normalize && p.top_k > 1)
    for (int64_t k = 0; k < p.top_k; ++k) gate[k] /= at_least(sum, Limits<T>::kEpsilon);
  static_cast<T*>(p.threshold)[t] = noisy[chosen[p.top_k - 1]];
  static_cast<T*>(p.entropies)[t] = entropy;
}

// Where a thread's pair is, in the order in which pairs of its group take slots: by choice, then by token.
struct PairOfThread {
  int64_t group, chunk, begin, size, pair;
  bool there;
  __device__ __forceinline__ explicit PairOfThread(const RouteLaunch& p) {
    chunk = int64_t(blockIdx.x);
    group = chunk / p.chunks;
    begin = group * p.group_size;
    size = p.tokens - begin < p.group_size ? p.tokens - begin : p.group_size;
    const int64_t i = chunk % p.chunks * kSlotPairs + threadIdx.x;
    there = i < size * p.top_k;
    if (!there) return;
    const int64_t token = i % size;
    pair = (begin + (p.order ? p.order[begin + token] : token)) * p.top_k + i / size;
  }
};

// The rank of every pair among those of its chunk with the same expert, and how many those are.
__global__ void __launch_bounds__(kSlotPairs) rank_kernel(const RouteLaunch p) {
  int* experts = reinterpret_cast<int*>(shared_memory());
  const PairOfThread own(p);
  const int mine = own.there ? int(p.expert[own.pair]) : -1;
  experts[threadIdx.x] = mine;
  __syncthreads();
  if (!own.there) return;
  int rank = 0, all = 0;
  for (int i = 0; i < kSlotPairs; ++i) {
    const bool same = experts[i] == mine;
    all += same;
    rank += same && i < int(threadIdx.x);
  }
  p.slot[own.pair] = rank;
  if (rank == all - 1) p.before[own.chunk * p.experts + mine] = all;
}

// A thread per group and expert: counts of chunks become counts of the chunks before.
__global__ void __launch_bounds__(kRouteThreads) scan_kernel(const RouteLaunch p) {
  const int64_t cell = int64_t(blockIdx.x) * kRouteThreads + threadIdx.x;
  if (cell >= p.groups * p.experts) return;
  const int64_t group = cell / p.experts;
  int64_t* before = p.before + group * p.chunks * p.experts + cell % p.experts;
  int64_t taken = 0;
  for (int64_t chunk = 0; chunk < p.chunks; ++chunk) {
    const int64_t count = before[chunk * p.experts];
    before[chunk * p.experts] = taken;
    taken += count;
  }
  const int64_t limit = p.tokens - group * p.group_size < p.group_size ? p.last_capacity : p.capacity;
  p.demand[cell] = taken;
  p.kept[cell] = limit < 0 || taken < limit ? taken : limit;
}

__global__ void __launch_bounds__(kSlotPairs) slot_kernel(const RouteLaunch p) {
  const PairOfThread own(p);
  if (!own.there) return;
  const int64_t limit = own.size < p.group_size ? p.last_capacity : p.capacity;
  const int64_t slot = p.slot[own.pair] + p.before[own.chunk * p.experts + p.expert[own.pair]];
  p.slot[own.pair] = slot;
  p.keep[own.pair] = limit < 0 || slot < limit;
}

// One block: sums over groups and over tokens.
template <class T>
__global__ void __launch_bounds__(kRouteThreads) totals_kernel(const RouteLaunch p) {
  int64_t* dropped = reinterpret_cast<int64_t*>(shared_memory());
  T* entropies = reinterpret_cast<T*>(dropped + kRouteThreads);
  int64_t lost = 0;
  for (int64_t e = threadIdx.x; e < p.experts; e += kRouteThreads) {
    int64_t wanted = 0, got = 0;
    for (int64_t g = 0; g < p.groups; ++g) {
      wanted += p.demand[g * p.experts + e];
      got += p.kept[g * p.experts + e];
    }
    p.totals[e] = wanted;
    p.totals[p.experts + e] = got;
    lost += wanted - got;
  }
  T entropy = 0;
  for (int64_t t = threadIdx.x; t < p.tokens; t += kRouteThreads) entropy += static_cast<const T*>(p.entropies)[t];
  dropped[threadIdx.x] = lost;
  entropies[threadIdx.x] = entropy;
  for (int half = kRouteThreads / 2; half; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) >= half) continue;
    dropped[threadIdx.x] += dropped[threadIdx.x + half];
    entropies[threadIdx.x] += entropies[threadIdx.x + half];
  }
  if (threadIdx.x != 0) return;
  p.totals[2 * p.experts] = dropped[0];
  *static_cast<T*>(p.entropy) = entropies[0] / T(p.tokens > 1 ? p.tokens : 1);
}

// What a token's gates add to the gradients of its scores.
template <class T>
struct GateGradient {
  const T* grad;
  const int64_t* expert;
  int64_t top_k;
  T divisor, of_sum;
  __device__ __forceinline__ GateGradient(const RouteBackwardLaunch& p, const T* scores, int64_t t)
      : grad(p.grad_gate ? static_cast<const T*>(p.grad_gate) + t * p.top_k : nullptr),
        expert(p.expert + t * p.top_k), top_k(p.top_k), divisor(1), of_sum(0) {
    if (!grad || !p.normalize || top_k == 1) return;
    T sum = 0;
    for (int64_t k = 0; k < top_k; ++k) sum += scores[expert[k]];
    divisor = at_least(sum, Limits<T>::kEpsilon);
    if (!(sum >= Limits<T>::kEpsilon)) return;
    for (int64_t k = 0; k < top_k; ++k) of_sum -= scores[expert[k]] / divisor / divisor * grad[k];
  }
  __device__ __forceinline__ T operator()(int64_t e) const {
    T sum = 0;
    if (!grad) return sum;
    for (int64_t k = 0; k < top_k; ++k)
      if (expert[k] == e) sum += grad[k] / divisor + of_sum;
    return sum;
  }
};

template <class T>
__global__ void __launch_bounds__(kRouteThreads) route_backward_kernel(const RouteBackwardLaunch p) {
  const int64_t t = (int64_t(blockIdx.x) * kRouteThreads + threadIdx.x) / 32, first = t * p.experts;
  const int lane = threadIdx.x % 32;
  if (t >= p.tokens) return;
  const T* scores = static_cast<const T*>(p.scores) + first;
  const T* grad_scores = p.grad_scores ? static_cast<const T*>(p.grad_scores) + first : nullptr;
  const GateGradient<T> of_gates(p, scores, t);
  T sum = 0;
  if (!p.sigmoid)
    for (int64_t e = lane; e < p.experts; e += 32)
      sum += ((grad_scores ? grad_scores[e] : T(0)) + of_gates(e)) * scores[e];
  sum = warp_sum(sum);
  const int64_t last = p.expert[t * p.top_k + p.top_k - 1];
  const T* grad_threshold = static_cast<const T*>(p.grad_threshold);
  for (int64_t e = lane; e < p.experts; e += 32) {
    const T grad = (grad_scores ? grad_scores[e] : T(0)) + of_gates(e), y = scores[e];
    T noisy = p.sigmoid ? grad * (T(1) - y) * y : grad * y - y * sum;
    if (grad_threshold && e == last) noisy += grad_threshold[t];
    static_cast<T*>(p.noisy)[first + e] = noisy;
  }
  if (!p.clean) return;
  const T* grad = static_cast<const T*>(p.grad_probabilities) + first;
  const T* y = static_cast<const T*>(p.probabilities) + first;
  sum = 0;
  for (int64_t e = lane; e < p.experts; e += 32) sum += grad[e] * y[e];
  sum = warp_sum(sum);
  for (int64_t e = lane; e < p.experts; e += 32) static_cast<T*>(p.clean)[first + e] = grad[e] * y[e] - y[e] * sum;
}

int64_t warp_blocks(int64_t tokens) { return (tokens * 32 + kRouteThreads - 1) / kRouteThreads; }

}  // namespace
}  // namespace swin_moe

cudaError_t swin_moe_route_choose(const swin_moe::RouteLaunch* p, cudaStream_t stream) {
  using namespace swin_moe;
  if (p->experts > kMaxRoutedExperts) return cudaErrorInvalidValue;
  return launch(p->wide ? choose_kernel<double> : choose_kernel<float>, warp_blocks(p->tokens), kRouteThreads, 0,
                stream, *p);
}

cudaError_t swin_moe_route_slots(const swin_moe::RouteLaunch* p, cudaStream_t stream) {
  using namespace swin_moe;
  const int64_t chunks = p->groups * p->chunks, cells = p->groups * p->experts;
  cudaError_t error = launch(rank_kernel, chunks, kSlotPairs, kSlotPairs * sizeof(int), stream, *p);
  if (error != cudaSuccess) return error;
  error = launch(scan_kernel, (cells + kRouteThreads - 1) / kRouteThreads, kRouteThreads, 0, stream, *p);
  if (error != cudaSuccess) return error;
  error = launch(slot_kernel, chunks, kSlotPairs, 0, stream, *p);
  if (error != cudaSuccess) return error;
  return launch(p->wide ? totals_kernel<double> : totals_kernel<float>, 1, kRouteThreads,
                kRouteThreads * (sizeof(int64_t) + sizeof(double)), stream, *p);
}

cudaError_t swin_moe_route_backward(const swin_moe::RouteBackwardLaunch* p, cudaStream_t stream) {
  using namespace swin_moe;
  return launch(p->wide ? route_backward_kernel<double> : route_backward_kernel<float>, warp_blocks(p->tokens),
                kRouteThreads, 0, stream, *p);
}
