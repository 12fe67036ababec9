// moe_route and its gradient on CUDA tensors. Compiled only where torch is a CUDA build.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "moe/moe_route.h"
#include "cuda/devices.h"
#include "route_launch.h"

namespace swin_moe {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Routed = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// (tokens,): the most confident tokens of each group first, ties in token order.
Tensor order_of(const Tensor& confidence, const RoutingGroups& groups) {
  Tensor order = at::empty(confidence.sizes(), confidence.options().dtype(at::kLong));
  const int64_t full = groups.tokens / groups.size, rows = full * groups.size;
  if (full)
    order.slice(0, 0, rows).view({full, -1}).copy_(
        std::get<1>(at::sort(confidence.slice(0, 0, rows).view({full, -1}), true, 1, true)));
  if (rows < groups.tokens)
    order.slice(0, rows).copy_(std::get<1>(at::sort(confidence.slice(0, rows), true, 0, true)));
  return order;
}

// What a launch says of sizes. A group is no larger than the tokens are, whatever its size is called.
RouteLaunch launch_of(const RoutingGroups& groups, int64_t experts, int64_t top_k, int64_t group_size,
                      int64_t capacity, int64_t last_capacity) {
  RouteLaunch p{};
  p.tokens = groups.tokens;
  p.experts = experts;
  p.top_k = top_k;
  p.group_size = std::max<int64_t>(std::min(group_size, groups.tokens), 1);
  p.groups = groups.count();
  // A group smaller than its size by name has the capacity of the last one.
  p.capacity = group_size > p.group_size ? last_capacity : capacity;
  p.last_capacity = last_capacity;
  p.chunks = (p.group_size * top_k + kSlotPairs - 1) / kSlotPairs;
  return p;
}

Routed moe_route_cuda(const Tensor& clean_, const OptionalTensor& noise, const OptionalTensor& bias_, int64_t top_k,
                      int64_t group_size, int64_t capacity, int64_t last_capacity, bool sigmoid, bool normalize,
                      bool prioritized, bool with_probabilities) {
  const Tensor& noisy_ = noise ? *noise : clean_;
  const RoutingGroups groups = check_route(clean_, noisy_, bias_, top_k, group_size, capacity, last_capacity);
  check_one_device("moe_route", "the logits", clean_, {noisy_, bias_.value_or(Tensor())});
  TORCH_CHECK_VALUE(clean_.size(1) <= kMaxRoutedExperts, "moe_route: at most ", kMaxRoutedExperts,
                    " experts on a CUDA device, got ", clean_.size(1));
  const c10::cuda::CUDAGuard guard(clean_.device());
  const Tensor clean = clean_.contiguous(), noisy = noise ? noisy_.contiguous() : clean;
  const Tensor bias = bias_ ? bias_->to(clean.scalar_type()).contiguous() : Tensor();
  const auto real = clean.options(), whole = real.dtype(at::kLong);
  const int64_t tokens = groups.tokens, experts = clean.size(1), count = groups.count();
  Tensor scores = at::empty_like(clean), gate = at::empty({tokens, top_k}, real), threshold = at::empty({tokens}, real);
  Tensor probabilities = with_probabilities && !sigmoid ? at::empty_like(clean) : at::empty({0}, real);
  Tensor entropy = at::empty({}, real), entropies = at::empty({tokens}, real);
  Tensor confidence = prioritized ? at::empty({tokens}, real) : Tensor(), order;
  Tensor expert = at::empty({tokens, top_k}, whole), slot = at::empty_like(expert);
  Tensor keep = at::empty({tokens, top_k}, whole.dtype(at::kBool));
  Tensor demand = at::empty({count, experts}, whole), kept = at::empty_like(demand);
  Tensor totals = at::empty({2 * experts + 1}, whole);
  RouteLaunch p = launch_of(groups, experts, top_k, group_size, capacity, last_capacity);
  Tensor before = at::zeros({count * p.chunks, experts}, whole);
  p.clean = clean.const_data_ptr();
  p.noisy = noisy.const_data_ptr();
  p.bias = bias_ ? bias.const_data_ptr() : nullptr;
  p.scores = scores.mutable_data_ptr();
  p.probabilities = probabilities.dim() == 2 ? probabilities.mutable_data_ptr() : nullptr;
  p.gate = gate.mutable_data_ptr();
  p.threshold = threshold.mutable_data_ptr();
  p.entropy = entropy.mutable_data_ptr();
  p.entropies = entropies.mutable_data_ptr();
  p.confidence = prioritized ? confidence.mutable_data_ptr() : nullptr;
  p.expert = expert.mutable_data_ptr<int64_t>();
  p.slot = slot.mutable_data_ptr<int64_t>();
  p.demand = demand.mutable_data_ptr<int64_t>();
  p.kept = kept.mutable_data_ptr<int64_t>();
  p.totals = totals.mutable_data_ptr<int64_t>();
  p.before = before.mutable_data_ptr<int64_t>();
  p.keep = keep.mutable_data_ptr<bool>();
  p.sigmoid = sigmoid;
  p.normalize = normalize;
  p.wide = clean.scalar_type() == at::kDouble;
  const auto stream = c10::cuda::getCurrentCUDAStream();
  C10_CUDA_CHECK(swin_moe_route_choose(&p, stream));
  if (prioritized) {
    order = order_of(confidence, groups);
    p.order = order.const_data_ptr<int64_t>();
  }
  C10_CUDA_CHECK(swin_moe_route_slots(&p, stream));
  return {scores, probabilities, gate, threshold, expert, slot, keep, demand, kept, totals, entropy};
}

std::tuple<Tensor, Tensor> moe_route_backward_cuda(const OptionalTensor& grad_scores,
                                                   const OptionalTensor& grad_probabilities,
                                                   const OptionalTensor& grad_gate,
                                                   const OptionalTensor& grad_threshold, const Tensor& scores_,
                                                   const OptionalTensor& probabilities, const Tensor& expert_,
                                                   bool sigmoid, bool normalize) {
  const c10::cuda::CUDAGuard guard(scores_.device());
  const auto plain = [](const OptionalTensor& x) { return x ? x->contiguous() : Tensor(); };
  const auto address = [](const Tensor& x) { return x.defined() ? x.const_data_ptr() : nullptr; };
  const Tensor scores = scores_.contiguous(), expert = expert_.contiguous();
  const Tensor of_scores = plain(grad_scores), of_probabilities = plain(grad_probabilities), of_gate = plain(grad_gate);
  const Tensor of_threshold = plain(grad_threshold), own = plain(probabilities);
  const bool with_clean = of_probabilities.defined() && own.defined();
  Tensor noisy = at::empty_like(scores), clean = with_clean ? at::empty_like(scores) : at::empty({0}, scores.options());
  RouteBackwardLaunch p{};
  p.grad_scores = address(of_scores);
  p.grad_probabilities = address(of_probabilities);
  p.grad_gate = address(of_gate);
  p.grad_threshold = address(of_threshold);
  p.scores = address(scores);
  p.probabilities = address(own);
  p.expert = expert.const_data_ptr<int64_t>();
  p.clean = with_clean ? clean.mutable_data_ptr() : nullptr;
  p.noisy = noisy.mutable_data_ptr();
  p.tokens = scores.size(0);
  p.experts = scores.size(1);
  p.top_k = expert.size(1);
  p.sigmoid = sigmoid;
  p.normalize = normalize;
  p.wide = scores.scalar_type() == at::kDouble;
  C10_CUDA_CHECK(swin_moe_route_backward(&p, c10::cuda::getCurrentCUDAStream()));
  return {clean, noisy};
}

}  // namespace
}  // namespace swin_moe

TORCH_LIBRARY_IMPL(swin_moe, CUDA, m) {
  m.impl("moe_route", &swin_moe::moe_route_cuda);
  m.impl("moe_route_backward", &swin_moe::moe_route_backward_cuda);
}
