// Random draws: every thread hashes what it needs, so a draw costs the bytes of its result.
#include "random_draws.h"
#include "cuda/rows/row_groups.cuh"

namespace swin_moe {
namespace {

template <class T>
__global__ void __launch_bounds__(kRowThreads) drop_path_kernel(const DropPathLaunch p) {
  const int64_t index = int64_t(blockIdx.x) * kRowThreads + threadIdx.x;
  if (index >= p.purposes * p.launch_blocks * p.batch) return;
  const int64_t image = index % p.batch, rest = index / p.batch;
  const int own = int(rest % p.launch_blocks), which = int(rest / p.launch_blocks);
  const int64_t block = p.first_block + own;
  const RandomKey key = split_key(derive_key(p.words, {block, p.purpose[which], -1}));
  const uint32_t bits = random_bits(hash_row(key, p.sample[image]), hash_unit(key, 0));
  static_cast<T*>(p.out)[(which * p.blocks + block) * p.batch + image] =
      is_kept(bits, p.threshold[own]) ? T(p.factor[own]) : T(0);
}

template <class T>
__global__ void __launch_bounds__(kRowThreads) dropout_kernel(const DropoutLaunch p, int lanes) {
  using Product = typename SumOf<T>::Type;
  const RowGroup group(lanes);
  if (group.row >= p.count) return;
  const RandomKey key = split_key(derive_key(p.words, p.draw));
  const uint32_t row = hash_row(key, p.rows[group.row]);
  const T* x = static_cast<const T*>(p.x) + group.row * p.units;
  T* y = static_cast<T*>(p.out) + group.row * p.units;
  for (int64_t u = group.lane; u < p.units; u += lanes) {
    const bool kept = is_kept(random_bits(row, hash_unit(key, uint32_t(u))), p.threshold);
    from_float(y[u], Product(to_float(x[u])) * (kept ? Product(p.factor) : Product(0)));
  }
}

__global__ void __launch_bounds__(kRowThreads) normal_kernel(const NormalLaunch p) {
  const int64_t index = int64_t(blockIdx.x) * kRowThreads + threadIdx.x;
  if (index >= p.count * p.units) return;
  const int64_t row = p.rows[index / p.units];
  const uint32_t unit = uint32_t(index % p.units);
  const RandomKey first = split_key(derive_key(p.words, p.draw)), second = second_key(first);
  const double radius = to_uniform(random_bits(hash_row(first, row), hash_unit(first, unit)));
  const double angle = to_uniform(random_bits(hash_row(second, row), hash_unit(second, unit)));
  p.out[index] = float(sqrt(log(radius) * -2.0) * cos(angle * (2.0 * 3.141592653589793)));
}

int64_t thread_blocks(int64_t threads) { return (threads + kRowThreads - 1) / kRowThreads; }

template <class T>
cudaError_t launch_dropout(const DropoutLaunch& p, cudaStream_t stream) {
  const int lanes = lanes_for(p.units);
  return launch(dropout_kernel<T>, row_blocks(p.count, lanes), kRowThreads, 0, stream, p, lanes);
}

}  // namespace
}  // namespace swin_moe

cudaError_t swin_moe_drop_path(const swin_moe::DropPathLaunch* p, cudaStream_t stream) {
  using namespace swin_moe;
  const int64_t blocks = thread_blocks(p->purposes * p->launch_blocks * p->batch);
  const bool wide = p->element == int(RowElement::kFloat64);
  return launch(wide ? drop_path_kernel<double> : drop_path_kernel<float>, blocks, kRowThreads, 0, stream, *p);
}

cudaError_t swin_moe_random_dropout(const swin_moe::DropoutLaunch* p, cudaStream_t stream) {
  using namespace swin_moe;
  switch (RowElement(p->element)) {
    case RowElement::kFloat64: return launch_dropout<double>(*p, stream);
    case RowElement::kFloat32: return launch_dropout<float>(*p, stream);
    case RowElement::kBFloat16: return launch_dropout<BFloat16>(*p, stream);
    case RowElement::kFloat16: return launch_dropout<Float16>(*p, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t swin_moe_random_normal(const swin_moe::NormalLaunch* p, cudaStream_t stream) {
  using namespace swin_moe;
  return launch(normal_kernel, thread_blocks(p->count * p->units), kRowThreads, 0, stream, *p);
}
