// moe_balance and its gradient on CUDA tensors. Compiled only where torch is a CUDA build.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "moe/moe_balance_checks.h"
#include "balance_launch.h"
#include "cuda/devices.h"
#include "route_launch.h"

namespace swin_moe {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Tensor plain(const OptionalTensor& x) { return x ? x->contiguous() : Tensor(); }
const void* address(const Tensor& x) { return x.defined() && x.numel() ? x.const_data_ptr() : nullptr; }

BalanceLaunch describe(const Tensor& scores, int64_t kind, double noise_std, int64_t group_size, double weight,
                       double z_weight) {
  TORCH_CHECK_TYPE(scores.scalar_type() == at::kFloat || scores.scalar_type() == at::kDouble,
                   "moe_balance: scores must be float32 or float64, got ", scores.scalar_type());
  TORCH_CHECK_VALUE(scores.size(1) <= kMaxRoutedExperts, "moe_balance: at most ", kMaxRoutedExperts,
                    " experts on a CUDA device, got ", scores.size(1));
  BalanceLaunch p{};
  p.tokens = scores.size(0);
  p.experts = scores.size(1);
  // Without a balance loss groups are pieces of the z-loss alone.
  p.group_size = std::max<int64_t>(kind == kNone ? p.tokens : std::min(group_size, p.tokens), 1);
  p.groups = (p.tokens + p.group_size - 1) / p.group_size;
  p.chunks = (p.group_size + kBalanceRows - 1) / kBalanceRows;
  p.noise_std = noise_std;
  p.weight = weight;
  p.z_weight = z_weight;
  p.kind = kind;
  p.wide = scores.scalar_type() == at::kDouble;
  return p;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> moe_balance_cuda(
    const Tensor& scores_, const OptionalTensor& threshold_, const Tensor& expert_, const OptionalTensor& logits_,
    int64_t kind, double noise_std, int64_t group_size, double weight, double z_weight) {
  check_balance(scores_, threshold_, expert_, kind);
  check_one_device("moe_balance", "the tensors", scores_,
                   {expert_, threshold_.value_or(Tensor()), logits_.value_or(Tensor())});
  const c10::cuda::CUDAGuard guard(scores_.device());
  const Tensor scores = scores_.contiguous(), expert = expert_.contiguous();
  const Tensor threshold = plain(threshold_), logits = plain(logits_);
  const auto options = scores.options();
  BalanceLaunch p = describe(scores, kind, noise_std, group_size, weight, z_weight);
  Tensor log_sum = at::empty({logits.defined() ? p.tokens : 0}, options);
  if (p.tokens == 0)
    return {at::zeros({}, options), at::zeros({}, options), at::empty({0}, options), at::empty({0}, options), log_sum};
  const bool balances = kind != kNone;
  Tensor aux = at::empty({}, options), balance = at::empty({}, options);
  Tensor sums = balances ? at::empty({p.groups, p.experts}, options) : at::empty({0}, options);
  Tensor load = at::empty_like(sums), squares = at::empty({p.groups * p.chunks}, options);
  Tensor partials = at::empty({balances ? p.groups * p.chunks : 0, 2, p.experts}, options);
  p.scores = address(scores);
  p.threshold = address(threshold);
  p.logits = address(logits);
  p.expert = expert.const_data_ptr<int64_t>();
  p.sums = sums.mutable_data_ptr();
  p.load = load.mutable_data_ptr();
  p.log_sum = log_sum.mutable_data_ptr();
  p.partials = partials.mutable_data_ptr();
  p.squares = squares.mutable_data_ptr();
  p.balance = balance.mutable_data_ptr();
  p.aux = aux.mutable_data_ptr();
  C10_CUDA_CHECK(swin_moe_balance(&p, c10::cuda::getCurrentCUDAStream()));
  return {aux, balance, sums, load, log_sum};
}

std::tuple<Tensor, Tensor, Tensor> moe_balance_backward_cuda(
    const Tensor& grad_, const Tensor& scores_, const OptionalTensor& threshold_, const OptionalTensor& logits_,
    const Tensor& sums_, const Tensor& load_, const Tensor& log_sum_, int64_t kind, double noise_std,
    int64_t group_size, double weight, double z_weight) {
  const c10::cuda::CUDAGuard guard(scores_.device());
  BalanceLaunch p = describe(scores_, kind, noise_std, group_size, weight, z_weight);
  // Of sums of scores themselves only their shape is asked for, and a view of one number may stand for them.
  const Tensor scores = kind == kGshard || kind == kNone ? Tensor() : scores_.contiguous();
  const Tensor grad = grad_.to(scores_.scalar_type()), threshold = plain(threshold_), logits = plain(logits_);
  const Tensor sums = sums_.contiguous(), load = load_.contiguous(), log_sum = log_sum_.contiguous();
  check_one_device("moe_balance_backward", "the tensors", scores_, {grad, threshold, logits, sums, load, log_sum});
  const auto options = scores_.options();
  const auto none = [&] { return at::empty({0}, options); };  // results must not share memory
  Tensor of_scores = kind == kNone ? none() : at::empty(scores_.sizes(), options);
  Tensor of_threshold = kind == kLoadImportance ? at::empty({p.tokens}, options) : none();
  Tensor of_logits = logits.defined() ? at::empty(logits.sizes(), options) : none();
  if (p.tokens == 0) return {of_scores, of_threshold, of_logits};
  p.scores = address(scores);
  p.threshold = address(threshold);
  p.logits = address(logits);
  // The kernel only reads these; the forward's launch writes the same fields.
  p.sums = const_cast<void*>(address(sums));
  p.load = const_cast<void*>(address(load));
  p.log_sum = const_cast<void*>(address(log_sum));
  p.grad = grad.const_data_ptr();
  p.grad_scores = of_scores.mutable_data_ptr();
  p.grad_threshold = of_threshold.mutable_data_ptr();
  p.grad_logits = of_logits.mutable_data_ptr();
  C10_CUDA_CHECK(swin_moe_balance_backward(&p, c10::cuda::getCurrentCUDAStream()));
  return {of_scores, of_threshold, of_logits};
}

}  // namespace
}  // namespace swin_moe

TORCH_LIBRARY_IMPL(swin_moe, CUDA, m) {
  m.impl("moe_balance", &swin_moe::moe_balance_cuda);
  m.impl("moe_balance_backward", &swin_moe::moe_balance_backward_cuda);
}
