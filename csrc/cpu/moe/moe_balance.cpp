// Balance losses and the z-loss on the CPU, with the roundings of moe/losses.py and of its gradients by autograd: what
// is as large as the scores goes through PyTorch in the same pieces, what has a number per group and expert in loops.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <optional>
#include <tuple>
#include <vector>

#include "moe/moe_balance_checks.h"
#include "moe/moe_kernels.h"
#include "steady.h"

namespace swin_moe {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

using Kind = BalanceKind;

constexpr int64_t kBlockElements = 1 << 16;  // as moe/routing.py:row_blocks, or sums would round differently

// Groups of equal size among the tokens: all of them, or the full ones, or the smaller last one.
struct Part {
  int64_t first_row, first_group, groups, size;
  int64_t rows() const { return groups * size; }
};

std::vector<Part> parts_of(int64_t tokens, int64_t group_size) {
  const int64_t size = std::max<int64_t>(std::min(group_size, tokens), 1), full = tokens / size, rest = tokens % size;
  std::vector<Part> parts{{0, 0, full, size}};
  if (rest) parts.push_back({full * size, full, 1, rest});
  return parts;
}

int64_t rows_of_block(const Tensor& x) { return std::max<int64_t>(kBlockElements / std::max<int64_t>(x.size(1), 1), 1); }

// Calls visit(groups of the part, rows of the part) for some whole groups at once, or for a piece of one.
template <class Visit>
void for_blocks(const Part& part, int64_t limit, Visit visit) {
  limit = std::min(limit, part.rows());
  if (part.size <= limit) {
    for (int64_t group = 0, step = limit / part.size; group < part.groups; group += step) {
      const int64_t end = std::min(group + step, part.groups);
      visit(group, end, group * part.size, end * part.size);
    }
    return;
  }
  for (int64_t group = 0; group < part.groups; ++group)
    for (int64_t start = 0; start < part.size; start += limit)
      visit(group, group + 1, group * part.size + start, group * part.size + std::min(start + limit, part.size));
}

Tensor row_sums(const Tensor& scores) {
  const bool wide = scores.scalar_type() == at::kDouble;
  return scores.sum(1, true).clamp_min_(wide ? std::numeric_limits<double>::min()
                                             : double(std::numeric_limits<float>::min()));
}

// (groups, experts): sums over the tokens of each group of a part, of what `values` makes of a block of rows.
template <class Values>
void add_sums(const Part& part, int64_t limit, const Tensor& sums, Values values) {
  for_blocks(part, limit, [&](int64_t group, int64_t group_end, int64_t row, int64_t row_end) {
    const Tensor block = values(part.first_row + row, part.first_row + row_end);
    sums.slice(0, part.first_group + group, part.first_group + group_end)
        .add_(block.view({group_end - group, -1, block.size(1)}).sum(1));
  });
}

// What one loss is made of, a number per group and expert.
struct Sums {
  Tensor scores, load;  // load: how many tokens chose the expert first; or load_of. (groups, experts)
};

void count_first(const Tensor& expert, const std::vector<Part>& parts, const Tensor& load) {
  auto count = [&]<class T>(T* sums) {
    const int64_t *chosen = expert.const_data_ptr<int64_t>(), top_k = expert.size(1), experts = load.size(1);
    for (const Part& part : parts)
      for (int64_t i = 0; i < part.rows(); ++i)
        sums[(part.first_group + i / part.size) * experts + chosen[(part.first_row + i) * top_k]] += T(1);
  };
  load.scalar_type() == at::kDouble ? count(load.mutable_data_ptr<double>()) : count(load.mutable_data_ptr<float>());
}

Sums sums_of(const Tensor& scores, const OptionalTensor& threshold, const Tensor& expert, Kind kind, double std,
             const std::vector<Part>& parts) {
  const int64_t groups = parts.back().first_group + parts.back().groups, limit = rows_of_block(scores);
  Sums sums{at::zeros({groups, scores.size(1)}, scores.options()), {}};
  sums.load = at::zeros_like(sums.scores);
  for (const Part& part : parts) {
    if (kind == kGshardOfShares) {
      add_sums(part, limit, sums.scores, [&](int64_t begin, int64_t end) {
        const Tensor rows = scores.slice(0, begin, end);
        return rows.div(row_sums(rows));
      });
    } else {
      sums.scores.slice(0, part.first_group, part.first_group + part.groups)
          .copy_(scores.slice(0, part.first_row, part.first_row + part.rows())
                     .view({part.groups, part.size, scores.size(1)})
                     .sum(1));
    }
    if (kind != kLoadImportance) continue;
    add_sums(part, limit, sums.load, [&](int64_t begin, int64_t end) {
      Tensor above = scores.slice(0, begin, end).sub(threshold->slice(0, begin, end).unsqueeze(1));
      if (std > 0) return above.mul_(-1.0 / (std * std::numbers::sqrt2)).erfc_().mul_(0.5);
      return above.gt(0).to(scores.scalar_type());
    });
  }
  if (kind != kLoadImportance) count_first(expert, parts, sums.load);
  return sums;
}

// As moe/losses.py:_squared_variation; (groups,).
Tensor squared_variation(const Tensor& amount) {
  const Tensor mean = amount.mean(1, true);
  const Tensor variance = amount.sub(mean).square_().sum(1).div_(double(std::max<int64_t>(amount.size(1) - 1, 1)));
  return variance.div(mean.squeeze(1).square().add_(1e-10));
}

// Its gradient, times grad.
Tensor squared_variation_gradient(const Tensor& amount, double grad) {
  const double others = double(std::max<int64_t>(amount.size(1) - 1, 1));
  const Tensor mean = amount.mean(1, true), off = amount.sub(mean), plain = mean.squeeze(1);
  const Tensor variance = off.square().sum(1).div_(others), divisor = plain.square().add_(1e-10);
  const Tensor upstream = at::empty_like(variance).fill_(grad);
  const Tensor of_divisor = variance.div(divisor).div_(divisor).mul_(upstream).neg_();
  const Tensor of_off = off.mul(2.0).mul_(upstream.div(divisor).div_(others).unsqueeze(1));
  const Tensor of_mean = of_off.sum(1, true).neg_().add_(plain.mul(2.0).mul_(of_divisor).unsqueeze(1));
  return of_off.add(of_mean.div(double(amount.size(1))));
}

double rounded(const Tensor& like, double value) { return like.scalar_type() == at::kDouble ? value : float(value); }

// The number of tokens of a group, squared in the dtype of the scores.
double squared_size(const Tensor& scores, const Part& part) {
  return rounded(scores, rounded(scores, double(part.size)) * rounded(scores, double(part.size)));
}

// (): the mean over the groups of a part.
Tensor loss_of(const Part& part, const Sums& all, Kind kind) {
  const Tensor scores = all.scores.slice(0, part.first_group, part.first_group + part.groups);
  const Tensor load = all.load.slice(0, part.first_group, part.first_group + part.groups);
  if (kind == kLoadImportance) return squared_variation(scores).add_(squared_variation(load)).mean().mul_(0.5);
  return scores.mul(load).sum(1).div_(squared_size(scores, part)).mean().mul_(double(scores.size(1)));
}

}  // namespace

BalanceLoss moe_balance_cpu(const Tensor& scores_, const OptionalTensor& threshold, const Tensor& expert,
                     const OptionalTensor& logits, int64_t kind, double noise_std, int64_t group_size, double weight,
                     double z_weight) {
  check_balance(scores_, threshold, expert, kind);
  const Tensor scores = scores_.contiguous();
  const int64_t tokens = scores.size(0);
  Tensor balance = at::zeros({}, scores.options()), log_sum = at::empty({0}, scores.options());
  Sums sums{at::empty({0}, scores.options()), at::empty({0}, scores.options())};
  if (kind != kNone && tokens) {
    const std::vector<Part> parts = parts_of(tokens, group_size);
    sums = sums_of(scores, threshold, expert.contiguous(), Kind(kind), noise_std, parts);
    for (const Part& part : parts)
      balance.add_(loss_of(part, sums, Kind(kind)).mul_(double(part.rows()) / double(tokens)));
  }
  Tensor aux = balance.mul(weight);
  if (logits) {
    log_sum = at::empty({tokens}, scores.options());
    const int64_t step = rows_of_block(*logits);
    for (int64_t row = 0; row < tokens; row += step)
      log_sum.slice(0, row, row + step).copy_(at::logsumexp(logits->slice(0, row, row + step), {1}));
    if (tokens) on_one_thread([&] { aux.add_(log_sum.square().mean().mul_(z_weight)); });
  }
  return {aux, balance, sums.scores, sums.load, log_sum};
}

namespace {

// (groups, experts) of a part: what a token's score and its load add to the loss, times grad.
std::tuple<Tensor, Tensor> gradient_of_sums(const Part& part, const Tensor& sums, const Tensor& load, Kind kind,
                                            double grad) {
  const Tensor scores = sums.slice(0, part.first_group, part.first_group + part.groups);
  const Tensor own = load.slice(0, part.first_group, part.first_group + part.groups);
  if (kind == kLoadImportance) {
    const double each = rounded(sums, rounded(sums, grad * 0.5) / double(part.groups));
    return {squared_variation_gradient(scores, each), squared_variation_gradient(own, each)};
  }
  const double each = rounded(sums, rounded(sums, grad * double(scores.size(1))) / double(part.groups));
  return {own.mul(rounded(sums, each / squared_size(sums, part))), Tensor()};
}

// The gradients of the rows of a part.
void spread(const Part& part, const Tensor& scores, const OptionalTensor& threshold, const Tensor& of_sums,
            const Tensor& of_load, Kind kind, double std, const Tensor& grad, const Tensor& grad_threshold) {
  for_blocks(part, rows_of_block(scores), [&](int64_t group, int64_t group_end, int64_t row, int64_t row_end) {
    const int64_t begin = part.first_row + row, end = part.first_row + row_end;
    const Tensor rows = scores.slice(0, begin, end), to = grad.slice(0, begin, end);
    const Tensor grouped = to.view({group_end - group, -1, scores.size(1)});
    grouped.copy_(of_sums.slice(0, group, group_end).unsqueeze(1).expand_as(grouped));
    if (kind == kGshardOfShares) {
      const Tensor total = row_sums(rows);
      to.sub_(to.mul(rows).sum(1, true).div_(total)).div_(total);
    } else if (kind == kLoadImportance && std > 0) {
      // The normal density: exp(-x^2 / 2) / (std sqrt(2 pi)).
      const Tensor density = rows.sub(threshold->slice(0, begin, end).unsqueeze(1));
      density.mul_(1.0 / (std * std::numbers::sqrt2)).square_().neg_().exp_();
      density.mul_(1.0 / (std * std::sqrt(2.0 * std::numbers::pi)));
      density.view(grouped.sizes()).mul_(of_load.slice(0, group, group_end).unsqueeze(1));
      to.add_(density);
      grad_threshold.slice(0, begin, end).copy_(density.sum(1).neg_());
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> moe_balance_backward_cpu(const Tensor& grad_, const Tensor& scores_,
                                                            const OptionalTensor& threshold,
                                                            const OptionalTensor& logits, const Tensor& sums,
                                                            const Tensor& load, const Tensor& log_sum, int64_t kind,
                                                            double noise_std, int64_t group_size, double weight,
                                                            double z_weight) {
  // Of sums of scores themselves only their shape is asked for, and a view of one number may stand for them.
  const Tensor scores = kind == kGshard ? scores_ : scores_.contiguous();
  const int64_t tokens = scores.size(0);
  const double grad = grad_.item<double>();
  const auto none = [&] { return at::empty({0}, scores.options()); };  // results must not share memory
  Tensor of_scores = none(), of_threshold = none(), of_logits = none();
  if (kind != kNone) {
    of_scores = at::zeros(scores.sizes(), scores.options());
    if (kind == kLoadImportance) of_threshold = at::zeros({tokens}, scores.options());
    const double balance = rounded(scores, grad * rounded(scores, weight));
    for (const Part& part : parts_of(tokens, group_size)) {
      if (!tokens) break;
      const double share = rounded(scores, double(part.rows()) / double(tokens));
      const auto [of_sums, of_load] = gradient_of_sums(part, sums, load, Kind(kind), rounded(scores, balance * share));
      spread(part, scores, threshold, of_sums, of_load, Kind(kind), noise_std, of_scores, of_threshold);
    }
  }
  if (logits) {
    of_logits = at::empty_like(*logits);
    const double z = rounded(scores, grad * rounded(scores, z_weight));
    const Tensor scale = log_sum.mul(rounded(scores, z * rounded(scores, 2.0 / double(std::max<int64_t>(tokens, 1)))));
    const int64_t step = rows_of_block(*logits);
    for (int64_t row = 0; row < tokens; row += step) {
      const Tensor total = log_sum.slice(0, row, row + step).unsqueeze(1);
      of_logits.slice(0, row, row + step)
          .copy_(logits->slice(0, row, row + step).sub(total).exp_().mul_(scale.slice(0, row, row + step).unsqueeze(1)));
    }
  }
  return {of_scores, of_threshold, of_logits};
}

}  // namespace swin_moe

TORCH_LIBRARY_IMPL(swin_moe, CPU, m) {
  m.impl("moe_balance", &swin_moe::moe_balance_cpu);
  m.impl("moe_balance_backward", &swin_moe::moe_balance_backward_cpu);
}
