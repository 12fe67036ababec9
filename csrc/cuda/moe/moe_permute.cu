// Rows of tokens for experts and back, in one pass each: gather, gate, sum over choices. Every result has one owner
// that adds in the order of the choices, so the bits do not depend on the order of threads.
#include "cuda/rows/row_groups.cuh"
#include "cuda/rows/row_launch.h"

#include <type_traits>

namespace swin_moe {
namespace {

template <class T, class Out, int Width>
__global__ void __launch_bounds__(kRowThreads) permute_kernel(const MoeLaunch p, int lanes) {
  using Sum = typename SumOf<T>::Type;
  const RowGroup group(lanes);
  if (group.row >= p.outputs) return;
  const int64_t pair = p.index[group.row];
  const int vectors = int(p.channels / Width);
  // Without a gate a vacant row may hold anything finite; with one it must add nothing to gradients.
  const bool vacant = p.gate && p.flags && p.flags[group.row];
  const Sum gate = vacant ? Sum(0) : p.gate ? static_cast<const Sum*>(p.gate)[pair] : Sum(1);
  const auto* from = static_cast<const Elements<T, Width>*>(p.rows) + quotient(pair, p.top_k) * vectors;
  auto* to = static_cast<Elements<Out, Width>*>(p.out) + group.row * vectors;
  if constexpr (std::is_same_v<T, Out>)
    if (!p.gate) {
      for (int i = group.lane; i < vectors; i += lanes) to[i] = from[i];
      return;
    }
  for (int i = group.lane; i < vectors; i += lanes) {
    Elements<T, Width> x{};
    if (!vacant) x = from[i];
    Sum sums[Width];
#pragma unroll
    for (int c = 0; c < Width; ++c) sums[c] = to_float(x.values[c]) * gate;
    Elements<Out, Width> y;
    round_to(y, sums);
    to[i] = y;
  }
}

template <class T, class Out, int Width>
__global__ void __launch_bounds__(kRowThreads) unpermute_kernel(const MoeLaunch p, int lanes) {
  using Sum = typename SumOf<Out>::Type;
  const RowGroup group(lanes);
  if (group.row >= p.outputs) return;
  const int64_t first = group.row * p.top_k;
  const int vectors = int(p.channels / Width);
  auto* to = static_cast<Elements<Out, Width>*>(p.out) + group.row * vectors;
  for (int i = group.lane; i < vectors; i += lanes) {
    Sum sums[Width] = {};
    for (int choice = 0; choice < p.top_k; ++choice) {
      if (p.flags && !p.flags[first + choice]) continue;  // its row 0 may hold inf or nan
      const Sum gate = p.gate ? Sum(static_cast<const Sum*>(p.gate)[first + choice]) : Sum(1);
      const auto x = static_cast<const Elements<T, Width>*>(p.rows)[p.index[first + choice] * vectors + i];
#pragma unroll
      for (int c = 0; c < Width; ++c) sums[c] += gate * Sum(to_float(x.values[c]));
    }
    Elements<Out, Width> y;
    round_to(y, sums);
    to[i] = y;
  }
}

template <class T, class Grad, int Width>
__global__ void __launch_bounds__(kRowThreads) gate_gradient_kernel(const MoeLaunch p, int lanes) {
  using Sum = typename SumOf<T>::Type;
  const RowGroup group(lanes);
  const int vectors = int(p.channels / Width);
  // Every lane stays until the sum over lanes, also those beyond the last pair.
  const bool kept = group.row < p.outputs && (!p.flags || p.flags[group.row]);
  Sum sum = 0;
  if (kept) {
    const auto* rows = static_cast<const Elements<T, Width>*>(p.rows) + p.index[group.row] * vectors;
    const auto* grads = static_cast<const Elements<Grad, Width>*>(p.grad_out) + quotient(group.row, p.top_k) * vectors;
    for (int i = group.lane; i < vectors; i += lanes) {
      const auto x = rows[i];
      const auto g = grads[i];
#pragma unroll
      for (int c = 0; c < Width; ++c) sum += Sum(to_float(x.values[c])) * Sum(to_float(g.values[c]));
    }
  }
  sum = lane_sum(sum, lanes);
  if (group.lane == 0 && group.row < p.outputs) static_cast<Sum*>(p.out)[group.row] = sum;
}

enum class Verb { kPermute, kUnpermute, kGateGradient };

template <Verb kVerb, class T, class Other, int Width>
cudaError_t run_width(const MoeLaunch& p, cudaStream_t stream) {
  const int lanes = lanes_for(p.channels / Width);
  const int64_t blocks = row_blocks(p.outputs, lanes);
  if constexpr (kVerb == Verb::kPermute)
    return launch(permute_kernel<T, Other, Width>, blocks, kRowThreads, 0, stream, p, lanes);
  else if constexpr (kVerb == Verb::kUnpermute)
    return launch(unpermute_kernel<T, Other, Width>, blocks, kRowThreads, 0, stream, p, lanes);
  else
    return launch(gate_gradient_kernel<T, Other, Width>, blocks, kRowThreads, 0, stream, p, lanes);
}

template <Verb kVerb, class T, class Other>
cudaError_t run_pair(const MoeLaunch& p, cudaStream_t stream) {
  constexpr int kWidth = 16 / int(sizeof(T));
  // A result per pair is written by one lane: only what is read in vectors has to be aligned then.
  const void* written = kVerb == Verb::kGateGradient ? nullptr : p.out;
  const auto addresses = reinterpret_cast<uintptr_t>(p.rows) | reinterpret_cast<uintptr_t>(p.grad_out) |
                         reinterpret_cast<uintptr_t>(written);
  if (p.channels > 0x7fffffff) return cudaErrorInvalidValue;  // counted in 32 bits
  const bool whole = p.channels % kWidth == 0 && addresses % 16 == 0;
  return whole ? run_width<kVerb, T, Other, kWidth>(p, stream) : run_width<kVerb, T, Other, 1>(p, stream);
}

template <Verb kVerb, class T>
cudaError_t run_element(const MoeLaunch& p, cudaStream_t stream) {
  switch (RowElement(p.other_element)) {
    case RowElement::kFloat32: return run_pair<kVerb, T, float>(p, stream);
    case RowElement::kBFloat16: return run_pair<kVerb, T, BFloat16>(p, stream);
    case RowElement::kFloat16: return run_pair<kVerb, T, Float16>(p, stream);
    case RowElement::kFloat64: return cudaErrorInvalidValue;  // only with itself
  }
  return cudaErrorInvalidValue;
}

template <Verb kVerb>
cudaError_t run(const MoeLaunch& p, cudaStream_t stream) {
  switch (RowElement(p.element)) {
    case RowElement::kFloat64:
      return RowElement(p.other_element) == RowElement::kFloat64 ? run_pair<kVerb, double, double>(p, stream)
                                                                 : cudaErrorInvalidValue;
    case RowElement::kFloat32: return run_element<kVerb, float>(p, stream);
    case RowElement::kBFloat16: return run_element<kVerb, BFloat16>(p, stream);
    case RowElement::kFloat16: return run_element<kVerb, Float16>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace swin_moe

cudaError_t swin_moe_permute(const swin_moe::MoeLaunch* p, cudaStream_t stream) {
  return swin_moe::run<swin_moe::Verb::kPermute>(*p, stream);
}

cudaError_t swin_moe_unpermute(const swin_moe::MoeLaunch* p, cudaStream_t stream) {
  return swin_moe::run<swin_moe::Verb::kUnpermute>(*p, stream);
}

cudaError_t swin_moe_gate_gradient(const swin_moe::MoeLaunch* p, cudaStream_t stream) {
  return swin_moe::run<swin_moe::Verb::kGateGradient>(*p, stream);
}
