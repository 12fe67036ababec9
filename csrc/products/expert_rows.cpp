// Experts over few rows: two products, GELU and dropout as one operator each way, some experts at a time.
// swin_moe/ops/row_products.py says what each argument means.
#include "expert_rows.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "grouped_rows.h"
#include "memory/kept_memory.h"

namespace swin_moe {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Tensor UnitDraw::apply(const Tensor& x, const OptionalTensor& of_rows) const {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("swin_moe::random_dropout", "")
          .typed<Tensor(const Tensor&, const Tensor&, int64_t, int64_t, int64_t, const Tensor&, double, double)>();
  return op.call(x, *words, layer, purpose, site, *of_rows, drop, scale);
}

namespace {

// Elements of the hidden layer of experts that are computed at once, for each thread.
constexpr int64_t kShareElements = 1 << 20;

// Some experts and their rows, which pass through the whole layer before the next ones do: what is between its two
// products stays in the cache.
struct Share {
  int64_t expert, experts, row, rows;

  Tensor of_experts(const Tensor& x) const { return x.slice(0, expert, expert + experts); }
  Tensor of_rows(const Tensor& x) const { return x.slice(0, row, row + rows); }
  OptionalTensor of_experts(const OptionalTensor& x) const { return x ? OptionalTensor(of_experts(*x)) : x; }
  OptionalTensor of_rows(const OptionalTensor& x) const { return x ? OptionalTensor(of_rows(*x)) : x; }
};

// No sum depends on how experts are shared out, so that threads may get more of them at once, and enough to do.
std::vector<Share> shares_of(const Tensor& counts, int64_t rows, int64_t hidden) {
  const std::vector<int64_t> first = first_rows(counts, rows);
  const int64_t experts = int64_t(first.size()) - 1;
  const int64_t most = kShareElements * at::get_num_threads() / std::max<int64_t>(hidden, 1);
  std::vector<Share> shares;
  for (int64_t begin = 0, end; begin < experts; begin = end) {
    for (end = begin + 1; end < experts && first[end + 1] - first[begin] <= most;) ++end;
    shares.push_back({begin, end - begin, first[begin], first[end] - first[begin]});
  }
  return shares;
}

// Zeros to what lies behind the rows of all experts.
void clear_rest(const std::vector<Share>& shares, const Tensor& x) {
  const int64_t used = shares.empty() ? 0 : shares.back().row + shares.back().rows;
  if (used < x.size(0)) x.slice(0, used).zero_();
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> expert_rows(const Tensor& x, const ExpertWeights& weights, const Tensor& counts,
                                               const UnitDraw& draw) {
  const Tensor fc1 = weights.fc1.transpose(1, 2);
  check_grouped(x, fc1, counts);
  const Tensor product = empty_kept({x.size(0), fc1.size(2)}, x.scalar_type());
  const Tensor hidden = empty_kept(product.sizes(), x.scalar_type());
  const Tensor out = empty_kept({x.size(0), weights.fc2.size(2)}, x.scalar_type());
  const std::vector<Share> shares = shares_of(counts, x.size(0), fc1.size(2));
  for (const Share& share : shares) {
    const Tensor part = share.of_rows(product), own = share.of_experts(counts);
    Tensor units = share.of_rows(hidden);
    put_grouped_rows(share.of_rows(x), share.of_experts(fc1), share.of_experts(weights.bias1), own, part);
    at::gelu_out(units, part);
    if (draw.words) units.copy_(draw.apply(units, share.of_rows(draw.rows)));
    put_grouped_rows(units, share.of_experts(weights.fc2), share.of_experts(weights.bias2), own, share.of_rows(out));
  }
  for (const Tensor& whole : {product, hidden, out}) clear_rest(shares, whole);
  return {out, product, hidden};
}

void expert_rows_backward(const Tensor& grad, const Tensor& x, const Tensor& product, const Tensor& hidden,
                          const Tensor& fc1, const Tensor& fc2, const Tensor& counts, const UnitDraw& draw,
                          const ExpertGradients& to) {
  const std::vector<Share> shares = shares_of(counts, x.size(0), hidden.size(1));
  const OptionalTensor turned = to.fc1 ? OptionalTensor(to.fc1->transpose(1, 2)) : std::nullopt;
  int64_t most = 0;
  for (const Share& share : shares) most = std::max(most, share.rows);
  const Tensor space = empty_kept({most, hidden.size(1)}, hidden.scalar_type());  // of all shares, one after the other
  for (const Share& share : shares) {
    const Tensor own = share.of_experts(counts), units = share.of_rows(hidden);
    Tensor grad_hidden = space.slice(0, 0, share.rows);
    grouped_rows_backward_cpu(share.of_rows(grad), units, share.of_experts(fc2), own, grad_hidden,
                              share.of_experts(to.fc2), share.of_experts(to.bias2));
    if (draw.words) grad_hidden = draw.apply(grad_hidden, share.of_rows(draw.rows));
    at::gelu_backward_out(grad_hidden, grad_hidden, share.of_rows(product));
    grouped_rows_backward_cpu(grad_hidden, share.of_rows(x), share.of_experts(fc1.transpose(1, 2)), own,
                              share.of_rows(to.x), share.of_experts(turned), share.of_experts(to.bias1));
  }
  if (to.x) clear_rest(shares, *to.x);
}

namespace {

std::tuple<Tensor, Tensor, Tensor> expert_rows_cpu(const Tensor& x, const Tensor& fc1, const OptionalTensor& bias1,
                                                   const Tensor& fc2, const OptionalTensor& bias2, const Tensor& counts,
                                                   const OptionalTensor& words, const OptionalTensor& rows,
                                                   int64_t layer, int64_t purpose, int64_t site, double drop,
                                                   double scale) {
  return expert_rows(x, {fc1, bias1, fc2, bias2}, counts, {words, rows, layer, purpose, site, drop, scale});
}

void expert_rows_backward_cpu(const Tensor& grad, const Tensor& x, const Tensor& product, const Tensor& hidden,
                              const Tensor& fc1, const Tensor& fc2, const Tensor& counts, const OptionalTensor& words,
                              const OptionalTensor& rows, int64_t layer, int64_t purpose, int64_t site, double drop,
                              double scale, const OptionalTensor& grad_x, const OptionalTensor& grad_fc1,
                              const OptionalTensor& grad_bias1, const OptionalTensor& grad_fc2,
                              const OptionalTensor& grad_bias2) {
  expert_rows_backward(grad, x, product, hidden, fc1, fc2, counts, {words, rows, layer, purpose, site, drop, scale},
                       {grad_x, grad_fc1, grad_bias1, grad_fc2, grad_bias2});
}

}  // namespace
}  // namespace swin_moe

TORCH_LIBRARY_FRAGMENT(swin_moe, m) {
  m.def(
      "expert_rows(Tensor x, Tensor fc1, Tensor? bias1, Tensor fc2, Tensor? bias2, Tensor counts, Tensor? words, "
      "Tensor? rows, int layer, int purpose, int site, float drop, float scale) -> (Tensor, Tensor, Tensor)");
  m.def(
      "expert_rows_backward(Tensor grad, Tensor x, Tensor product, Tensor hidden, Tensor fc1, Tensor fc2, Tensor "
      "counts, Tensor? words, Tensor? rows, int layer, int purpose, int site, float drop, float scale, Tensor(a!)? "
      "grad_x, Tensor(b!)? grad_fc1, Tensor(c!)? grad_bias1, Tensor(d!)? grad_fc2, Tensor(e!)? grad_bias2) -> ()");
}

TORCH_LIBRARY_IMPL(swin_moe, CPU, m) {
  m.impl("expert_rows", &swin_moe::expert_rows_cpu);
  m.impl("expert_rows_backward", &swin_moe::expert_rows_backward_cpu);
}
