// Token-choice routing on the CPU. Exponentials and sums are PyTorch's, so every number is that of the Python form on one
// thread, bit for bit; no value depends on the number of threads (steady.h).
#include "moe/moe_route.h"

#include "moe/moe_kernels.h"
#include "steady.h"
#include "token_choice.h"

#include <ATen/Parallel.h>
#include <ATen/ops/_softmax.h>
#include <ATen/ops/_softmax_backward_data.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/clamp_min.h>
#include <ATen/ops/div.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/gather.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/sigmoid_backward.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <limits>
#include <tuple>
#include <vector>

namespace swin_moe {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kBlockElements = 1 << 16;  // as moe/routing.py:row_blocks, or sums would round differently
constexpr int64_t kLeastElements = 1 << 14;  // of a task

// (2 E + 1): demand and kept summed over groups, and the pairs without a slot.
Tensor totals_of(const Tensor& demand, const Tensor& kept) {
  const int64_t experts = demand.size(1);
  Tensor totals = at::zeros({2 * experts + 1}, demand.options());
  int64_t* sums = totals.mutable_data_ptr<int64_t>();
  const int64_t *wanted = demand.const_data_ptr<int64_t>(), *got = kept.const_data_ptr<int64_t>();
  for (int64_t cell = 0; cell < demand.numel(); ++cell) {
    sums[cell % experts] += wanted[cell];
    sums[experts + cell % experts] += got[cell];
    sums[2 * experts] += wanted[cell] - got[cell];
  }
  return totals;
}

double least_normal(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? std::numeric_limits<double>::min() : double(std::numeric_limits<float>::min());
}

double machine_epsilon(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? std::numeric_limits<double>::epsilon()
                                        : double(std::numeric_limits<float>::epsilon());
}

// As moe/losses.py:mean_entropy, block by block. `values`: probabilities, or logits whose sigmoids are shares.
Tensor mean_entropy(const Tensor& values, bool logits) {
  const double tiny = least_normal(values);
  const int64_t rows = std::max<int64_t>(kBlockElements / values.size(1), 1), tokens = values.size(0);
  std::vector<Tensor> sums((tokens + rows - 1) / rows);
  for_steady_blocks(tokens, rows, [&](int64_t begin, int64_t end) {
    Tensor part = values.slice(0, begin, end);
    if (logits) {
      part = at::sigmoid(part);
      part.div_(part.sum(1, true).clamp_min_(tiny));
    }
    sums[begin / rows] = at::clamp_min(part, tiny).log_().mul_(part).sum();
  });
  Tensor total = at::zeros({}, values.options());
  for (const Tensor& sum : sums) total.sub_(sum);
  return total.div_(double(std::max<int64_t>(tokens, 1)));
}

Tensor sigmoids(const Tensor& logits) {
  Tensor scores = at::empty_like(logits);
  for_steady_blocks(logits.size(0), steady_rows(logits.size(1)), [&](int64_t begin, int64_t end) {
    Tensor to = scores.slice(0, begin, end);
    at::sigmoid_out(to, logits.slice(0, begin, end));
  });
  return scores;
}

template <class T>
void route_tokens(const Tensor& scores, const Tensor& noisy, const OptionalTensor& bias, const RoutingGroups& groups,
                  bool prioritized, const Tensor& expert, const Tensor& gate, const Tensor& threshold,
                  const Slots& slots) {
  const Choices<T> choices{scores.const_data_ptr<T>(),
                           noisy.const_data_ptr<T>(),
                           bias ? bias->const_data_ptr<T>() : nullptr,
                           scores.size(1),
                           expert.size(1),
                           expert.mutable_data_ptr<int64_t>(),
                           gate.mutable_data_ptr<T>(),
                           threshold.mutable_data_ptr<T>()};
  at::parallel_for(0, groups.tokens, std::max<int64_t>(kLeastElements / scores.size(1), 1),
                   [&](int64_t begin, int64_t end) { choose(choices, begin, end); });
  at::parallel_for(0, groups.count(), std::max<int64_t>(kLeastElements / groups.size, 1),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t group = begin; group < end; ++group)
                       take_slots(choices, groups, group, prioritized, slots);
                   });
}

}  // namespace

RoutedTokens moe_route_cpu(const Tensor& clean_, const OptionalTensor& noise, const OptionalTensor& bias_, int64_t top_k,
                     int64_t group_size, int64_t capacity, int64_t last_capacity, bool sigmoid, bool normalize,
                     bool prioritized, bool with_probabilities) {
  const Tensor& noisy_ = noise ? *noise : clean_;
  const RoutingGroups groups = check_route(clean_, noisy_, bias_, top_k, group_size, capacity, last_capacity);
  const Tensor clean = clean_.contiguous(), noisy = noisy_.contiguous();
  OptionalTensor bias;
  if (bias_) bias = bias_->to(clean.scalar_type()).contiguous();
  const Tensor scores = sigmoid ? sigmoids(noisy) : at::_softmax(noisy, 1, false);
  Tensor probabilities = at::empty({0}, clean.options());
  if (!sigmoid && (with_probabilities || noise)) probabilities = at::_softmax(clean, 1, false);
  const auto whole = clean.options().dtype(at::kLong);
  const Tensor expert = at::empty({groups.tokens, top_k}, whole), slot = at::empty_like(expert);
  const Tensor keep = at::empty(expert.sizes(), whole.dtype(at::kBool));
  const Tensor demand = at::empty({groups.count(), clean.size(1)}, whole), kept = at::empty_like(demand);
  Tensor gate = at::empty(expert.sizes(), clean.options()), threshold = at::empty({groups.tokens}, clean.options());
  const Slots slots{slot.mutable_data_ptr<int64_t>(), demand.mutable_data_ptr<int64_t>(),
                    kept.mutable_data_ptr<int64_t>(), keep.mutable_data_ptr<bool>()};
  if (clean.scalar_type() == at::kDouble)
    route_tokens<double>(scores, noisy, bias, groups, prioritized, expert, gate, threshold, slots);
  else
    route_tokens<float>(scores, noisy, bias, groups, prioritized, expert, gate, threshold, slots);
  if (normalize && top_k > 1) gate.div_(gate.sum(1, true).clamp_min_(machine_epsilon(gate)));
  const Tensor& known = sigmoid ? clean : probabilities.dim() == 2 ? probabilities : scores;
  Tensor entropy = mean_entropy(known, sigmoid);
  if (!with_probabilities) probabilities = at::empty({0}, clean.options());
  return {scores, probabilities, gate, threshold, expert, slot, keep, demand, kept, totals_of(demand, kept), entropy};
}

namespace {

// The gradient of the chosen scores before they were made to sum to 1.
Tensor unnormalized(const Tensor& grad, const Tensor& scores, const Tensor& expert) {
  const double eps = machine_epsilon(scores);
  const Tensor chosen = scores.gather(1, expert), sum = chosen.sum(1, true), divisor = at::clamp_min(sum, eps);
  const Tensor of_sum = chosen.div(divisor).div_(divisor).mul_(grad).neg_().sum(1, true).mul_(sum.ge(eps));
  return grad.div(divisor).add_(of_sum);
}

// The gradient of logits by that of their softmax.
Tensor softmax_gradient(const Tensor& grad_, const Tensor& scores_) {
  const Tensor grad = grad_.contiguous(), scores = scores_.contiguous();
  Tensor found = at::empty_like(scores);
  for_steady_blocks(scores.size(0), steady_rows(scores.size(1)), [&](int64_t begin, int64_t end) {
    Tensor to = found.slice(0, begin, end);
    at::_softmax_backward_data_out(to, grad.slice(0, begin, end), scores.slice(0, begin, end), 1,
                                   scores.scalar_type());
  });
  return found;
}

template <class T>
void add_at(const Tensor& to, const Tensor& index, const Tensor& values, int64_t column) {
  const int64_t experts = to.size(1), top_k = index.size(1), width = values.numel() / std::max<int64_t>(to.size(0), 1);
  T* sums = to.mutable_data_ptr<T>();
  const T* value = values.const_data_ptr<T>();
  const int64_t* expert = index.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < to.size(0); ++t)
    for (int64_t k = 0; k < width; ++k) sums[t * experts + expert[t * top_k + column + k]] += value[t * width + k];
}

void add_at(const Tensor& to, const Tensor& index, const Tensor& values, int64_t column) {
  const Tensor plain = values.contiguous();
  if (to.scalar_type() == at::kDouble)
    add_at<double>(to, index, plain, column);
  else
    add_at<float>(to, index, plain, column);
}

}  // namespace

std::tuple<Tensor, Tensor> moe_route_backward_cpu(const OptionalTensor& grad_scores,
                                                  const OptionalTensor& grad_probabilities,
                                                  const OptionalTensor& grad_gate, const OptionalTensor& grad_threshold,
                                                  const Tensor& scores, const OptionalTensor& probabilities,
                                                  const Tensor& expert, bool sigmoid, bool normalize) {
  Tensor clean = at::empty({0}, scores.options());
  if (grad_probabilities && probabilities)
    clean = softmax_gradient(*grad_probabilities, *probabilities);
  Tensor grad = grad_scores ? grad_scores->clone(at::MemoryFormat::Contiguous) : at::zeros_like(scores);
  if (grad_gate)
    add_at(grad, expert, normalize && expert.size(1) > 1 ? unnormalized(*grad_gate, scores, expert) : *grad_gate, 0);
  Tensor noisy = sigmoid ? at::sigmoid_backward(grad, scores) : softmax_gradient(grad, scores);
  if (grad_threshold) add_at(noisy, expert, *grad_threshold, expert.size(1) - 1);
  return {clean, noisy};
}

}  // namespace swin_moe

TORCH_LIBRARY_IMPL(swin_moe, CPU, m) {
  m.impl("moe_route", &swin_moe::moe_route_cpu);
  m.impl("moe_route_backward", &swin_moe::moe_route_backward_cpu);
}
