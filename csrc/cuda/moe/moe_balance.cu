// Balance losses and the z-loss: sums over the tokens of chunks, of groups, then the losses; one pass back. Every sum
// has a fixed order. Formulas are those of swin_moe/moe/losses.py.
#include "balance_launch.h"
#include "cuda/limits.cuh"
#include "route_launch.h"
#include "cuda/rows/row_groups.cuh"

namespace swin_moe {
namespace {

constexpr int kWarps = kRowThreads / 32;
constexpr int kBlocksAtOnce = 2;  // of a multiprocessor: float64 has the registers it needs

// The tokens of a block, which belong to one group.
struct Chunk {
  int64_t group, begin, count, size;
  __device__ __forceinline__ explicit Chunk(const BalanceLaunch& p) : group(blockIdx.x / p.chunks) {
    const int64_t first = group * p.group_size, skipped = blockIdx.x % p.chunks * kBalanceRows;
    size = size_of(p, group);
    begin = first + skipped;
    count = size - skipped < kBalanceRows ? size - skipped : kBalanceRows;  // negative in a smaller last group
  }
  static __device__ __forceinline__ int64_t size_of(const BalanceLaunch& p, int64_t group) {
    const int64_t left = p.tokens - group * p.group_size;
    return left < p.group_size ? left : p.group_size;
  }
};

// One lane's experts of one token; zeros beyond the last token, where nothing is read.
template <class T>
struct Row {
  const T* values;
  int64_t experts;
  int lane, lanes;
  __device__ __forceinline__ Row(const void* rows, int64_t row, bool there, const BalanceLaunch& p, int lane_,
                                 int lanes_)
      : values(static_cast<const T*>(rows) + row * p.experts), experts(there ? p.experts : 0), lane(lane_),
        lanes(lanes_) {}
  template <class Term>
  __device__ __forceinline__ T sum(Term term) const {
    T total = 0;
    for (int64_t e = lane; e < experts; e += lanes) total += term(e, values[e]);
    return lane_sum(total, lanes);
  }
  __device__ __forceinline__ T log_sum() const {
    T largest = Limits<T>::kLowest;
    for (int64_t e = lane; e < experts; e += lanes) largest = is_larger(values[e], largest) ? values[e] : largest;
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
      const T other = __shfl_xor_sync(kAllLanes, largest, distance);
      largest = is_larger(other, largest) ? other : largest;
    }
    const T base = largest - largest == T(0) ? largest : T(0);  // not an infinite one
    return base + T(log(sum([&](int64_t, T x) { return T(exp(x - base)); })));
  }
  __device__ __forceinline__ T clamped_sum() const {
    return at_least(sum([](int64_t, T x) { return x; }), Limits<T>::kTiny);
  }
};

// How likely a token's score stays above its threshold in other noise.
template <class T>
__device__ __forceinline__ T load_share(const BalanceLaunch& p, T above) {
  if (!(p.noise_std > 0)) return above > T(0) ? T(1) : T(0);
  return T(erfc(above * T(-1.0 / (p.noise_std * 1.4142135623730951)))) * T(0.5);
}

template <class T>
__global__ void __launch_bounds__(kRowThreads, kBlocksAtOnce) sums_kernel(const BalanceLaunch p, int lanes) {
  T* totals = reinterpret_cast<T*>(shared_memory());  // of the scores of each token
  T* folded = totals + kBalanceRows;                  // two for each thread
  const Chunk chunk(p);
  const int lane = threadIdx.x % lanes, slot = threadIdx.x / lanes, slots = kRowThreads / lanes;
  T squares = 0;
  for (int64_t i = slot; i - slot < chunk.count; i += slots) {
    const bool there = i < chunk.count, writes = there && lane == 0;
    if (p.logits) {
      const T value = Row<T>(p.logits, chunk.begin + i, there, p, lane, lanes).log_sum();
      if (writes) {
        static_cast<T*>(p.log_sum)[chunk.begin + i] = value;
        squares += value * value;
      }
    }
    if (p.kind == kGshardOfShares) {
      const T total = Row<T>(p.scores, chunk.begin + i, there, p, lane, lanes).clamped_sum();
      if (writes) totals[i] = total;
    }
  }
  folded[threadIdx.x] = squares;
  __syncthreads();
  if (threadIdx.x == 0) {
    T sum = 0;
    for (int other = 0; other < slots; ++other) sum += folded[other * lanes];
    static_cast<T*>(p.squares)[blockIdx.x] = sum;
  }
  for (int64_t first = 0; first < (p.kind == kNone ? 0 : p.experts); first += lanes) {
    const int64_t e = first + lane;
    T score = 0, load = 0;
    for (int64_t i = slot; e < p.experts && i < chunk.count; i += slots) {
      const int64_t row = chunk.begin + i;
      const T own = static_cast<const T*>(p.scores)[row * p.experts + e];
      score += p.kind == kGshardOfShares ? own / totals[i] : own;
      if (p.kind == kLoadImportance)
        load += load_share(p, own - static_cast<const T*>(p.threshold)[row]);
      else
        load += p.expert[row * p.top_k] == e ? T(1) : T(0);
    }
    __syncthreads();  // the last round's sums are read
    folded[threadIdx.x] = score;
    folded[kRowThreads + threadIdx.x] = load;
    __syncthreads();
    if (slot >= 2 || e >= p.experts) continue;
    T sum = 0;
    for (int other = 0; other < slots; ++other) sum += folded[slot * kRowThreads + other * lanes + lane];
    static_cast<T*>(p.partials)[(int64_t(blockIdx.x) * 2 + slot) * p.experts + e] = sum;
  }
}

// A thread per group, sum and expert.
template <class T>
__global__ void __launch_bounds__(kRowThreads) fold_kernel(const BalanceLaunch p) {
  const int64_t cell = int64_t(blockIdx.x) * kRowThreads + threadIdx.x, width = 2 * p.experts;
  if (cell >= p.groups * width) return;
  const int64_t group = cell / width, own = cell % width;
  T sum = 0;
  for (int64_t chunk = 0; chunk < p.chunks; ++chunk)
    sum += static_cast<const T*>(p.partials)[(group * p.chunks + chunk) * width + own];
  T* to = static_cast<T*>(own < p.experts ? p.sums : p.load);
  to[group * p.experts + own % p.experts] = sum;
}

// Of a group's amounts by expert: unbiased variance / (mean^2 + 1e-10).
template <class T>
struct Variation {
  T mean, others, variance, divisor;
  Row<T> amounts;
  __device__ __forceinline__ Variation(const void* all, int64_t group, const BalanceLaunch& p)
      : others(T(p.experts > 1 ? p.experts - 1 : 1)), amounts(all, group, true, p, threadIdx.x % 32, 32) {
    mean = amounts.sum([](int64_t, T x) { return x; }) / T(p.experts);
    variance = amounts.sum([&](int64_t, T x) { return (x - mean) * (x - mean); }) / others;
    divisor = mean * mean + T(1e-10);
  }
  __device__ __forceinline__ T value() const { return variance / divisor; }
  __device__ __forceinline__ void put_gradient(T grad, T* to) const {
    const auto of_off = [&](int64_t, T x) { return T(2) * (x - mean) * (grad / divisor / others); };
    const T of_divisor = -(variance / divisor / divisor * grad);
    const T of_mean = (T(2) * mean * of_divisor - amounts.sum(of_off)) / T(amounts.experts);
    for (int64_t e = amounts.lane; e < amounts.experts; e += 32) to[e] = of_off(e, amounts.values[e]) + of_mean;
  }
};

template <class T>
__device__ __forceinline__ T loss_of(const BalanceLaunch& p, int64_t group) {
  if (p.kind == kLoadImportance)
    return (Variation<T>(p.sums, group, p).value() + Variation<T>(p.load, group, p).value()) * T(0.5);
  const T size = T(Chunk::size_of(p, group));
  const T* load = static_cast<const T*>(p.load) + group * p.experts;
  const Row<T> sums(p.sums, group, true, p, threadIdx.x % 32, 32);
  return sums.sum([&](int64_t e, T x) { return x * load[e]; }) / (size * size) * T(p.experts);
}

// One block: a warp for each group, then the mean over tokens.
template <class T>
__global__ void __launch_bounds__(kRowThreads, kBlocksAtOnce) losses_kernel(const BalanceLaunch p) {
  T* balances = reinterpret_cast<T*>(shared_memory());
  T* squares = balances + kRowThreads;
  T balance = 0, square = 0;
  for (int64_t group = threadIdx.x / 32; group < (p.kind == kNone ? 0 : p.groups); group += kWarps)
    balance += loss_of<T>(p, group) * (T(Chunk::size_of(p, group)) / T(p.tokens));
  for (int64_t chunk = threadIdx.x; chunk < p.groups * p.chunks; chunk += kRowThreads)
    square += static_cast<const T*>(p.squares)[chunk];
  balances[threadIdx.x] = balance;
  squares[threadIdx.x] = square;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kWarps; ++warp) balance += balances[warp * 32];
  for (int other = 1; other < kRowThreads; ++other) square += squares[other];
  *static_cast<T*>(p.balance) = balance;
  const T z = p.logits ? square / T(p.tokens) * T(p.z_weight) : T(0);
  *static_cast<T*>(p.aux) = balance * T(p.weight) + z;
}

// What a token's score and its load add to the loss, times grad; for all experts, in shared memory.
template <class T>
__device__ __forceinline__ void put_gradient_of_sums(const BalanceLaunch& p, const Chunk& chunk, T* of_sums,
                                                     T* of_load) {
  const T grad = *static_cast<const T*>(p.grad) * T(p.weight) * (T(chunk.size) / T(p.tokens));
  const int warp = threadIdx.x / 32;
  if (p.kind == kLoadImportance) {
    if (warp < 2)
      Variation<T>(warp ? p.load : p.sums, chunk.group, p).put_gradient(grad * T(0.5), warp ? of_load : of_sums);
  } else if (p.kind != kNone) {
    const T each = grad * T(p.experts) / (T(chunk.size) * T(chunk.size));
    const T* load = static_cast<const T*>(p.load) + chunk.group * p.experts;
    for (int64_t e = threadIdx.x; e < p.experts; e += kRowThreads) of_sums[e] = load[e] * each;
  }
  __syncthreads();
}

// The gradient of one token's scores, and of its threshold.
template <class T>
__device__ __forceinline__ void put_gradient_of_token(const BalanceLaunch& p, const Row<T>& scores, int64_t token,
                                                      const T* of_sums, const T* of_load) {
  T* to = static_cast<T*>(p.grad_scores) + token * p.experts;
  if (p.kind == kGshardOfShares) {
    const T total = scores.clamped_sum();
    const T common = scores.sum([&](int64_t e, T x) { return of_sums[e] * x; }) / total;
    for (int64_t e = scores.lane; e < scores.experts; e += scores.lanes) to[e] = (of_sums[e] - common) / total;
    return;
  }
  if (p.kind == kGshard || !(p.noise_std > 0)) {
    for (int64_t e = scores.lane; e < scores.experts; e += scores.lanes) to[e] = of_sums[e];
    if (p.kind == kLoadImportance && scores.experts && scores.lane == 0)
      static_cast<T*>(p.grad_threshold)[token] = T(0);
    return;
  }
  const T threshold = scores.experts ? static_cast<const T*>(p.threshold)[token] : T(0);
  // The normal density: exp(-x^2 / 2) / (std sqrt(2 pi)).
  const T narrow = T(1.0 / (p.noise_std * 1.4142135623730951)), high = T(1.0 / (p.noise_std * 2.5066282746310002));
  const T along = scores.sum([&](int64_t e, T x) {
    const T above = (x - threshold) * narrow, density = T(exp(-(above * above))) * high * of_load[e];
    to[e] = of_sums[e] + density;
    return density;
  });
  if (scores.experts && scores.lane == 0) static_cast<T*>(p.grad_threshold)[token] = -along;
}

template <class T>
__global__ void __launch_bounds__(kRowThreads, kBlocksAtOnce) backward_kernel(const BalanceLaunch p, int lanes) {
  T* of_sums = reinterpret_cast<T*>(shared_memory());
  T* of_load = of_sums + p.experts;
  const Chunk chunk(p);
  const int lane = threadIdx.x % lanes, slot = threadIdx.x / lanes, slots = kRowThreads / lanes;
  put_gradient_of_sums(p, chunk, of_sums, of_load);
  const T z = *static_cast<const T*>(p.grad) * T(p.z_weight) * T(2.0 / double(p.tokens));
  for (int64_t i = slot; i - slot < chunk.count; i += slots) {
    const int64_t token = chunk.begin + i;
    const bool there = i < chunk.count;
    if (p.kind != kNone)
      put_gradient_of_token(p, Row<T>(p.scores, token, there, p, lane, lanes), token, of_sums, of_load);
    if (!p.logits || !there) continue;
    const T log_sum = static_cast<const T*>(p.log_sum)[token];
    const T* logits = static_cast<const T*>(p.logits) + token * p.experts;
    T* to = static_cast<T*>(p.grad_logits) + token * p.experts;
    for (int64_t e = lane; e < p.experts; e += lanes) to[e] = T(exp(logits[e] - log_sum)) * (log_sum * z);
  }
}

template <class T>
cudaError_t run(const BalanceLaunch& p, cudaStream_t stream) {
  const size_t pairs = 2 * kRowThreads * sizeof(T);
  cudaError_t error = launch(sums_kernel<T>, p.groups * p.chunks, kRowThreads, kBalanceRows * sizeof(T) + pairs, stream,
                             p, lanes_for(p.experts));
  if (error != cudaSuccess) return error;
  if (p.kind != kNone) {
    const int64_t cells = p.groups * 2 * p.experts;
    error = launch(fold_kernel<T>, (cells + kRowThreads - 1) / kRowThreads, kRowThreads, 0, stream, p);
    if (error != cudaSuccess) return error;
  }
  return launch(losses_kernel<T>, 1, kRowThreads, pairs, stream, p);
}

template <class T>
cudaError_t run_backward(const BalanceLaunch& p, cudaStream_t stream) {
  if (p.experts > kMaxRoutedExperts) return cudaErrorInvalidValue;  // 32 KiB of float64, which any device gives
  return launch(backward_kernel<T>, p.groups * p.chunks, kRowThreads, 2 * p.experts * sizeof(T), stream, p,
                lanes_for(p.experts));
}

}  // namespace
}  // namespace swin_moe

cudaError_t swin_moe_balance(const swin_moe::BalanceLaunch* p, cudaStream_t stream) {
  return p->wide ? swin_moe::run<double>(*p, stream) : swin_moe::run<float>(*p, stream);
}

cudaError_t swin_moe_balance_backward(const swin_moe::BalanceLaunch* p, cudaStream_t stream) {
  return p->wide ? swin_moe::run_backward<double>(*p, stream) : swin_moe::run_backward<float>(*p, stream);
}
