// A layer of experts that tokens choose, all of it on this processor, as one operator each way: logits, noise, scores,
// choices, slots, losses and statistics, then expert_layer. It calls what those operators call, in the order of
// swin_moe/moe/layer.py, so every number is that of the steps, bit for bit; what is saved is what calling them from
// Python costs. swin_moe/ops/moe/moe_layer.py says what each argument means.
#include "moe_kernels.h"
#include "moe_balance.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <utility>
#include <vector>

#include "products/expert_layer.h"
#include "products/row_linear.h"

namespace swin_moe {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// What the forward keeps, in this order; empty tensors stand for what there is not.
enum Kept : size_t {
  kScores, kProbabilities, kGate, kThreshold, kClean, kExpert, kPosition, kKeep, kPair, kCounts, kNumbers, kRows,
  kProduct, kHidden, kOut, kSums, kLoad, kLogSum, kKeptTensors
};

// The options of a layer, as both operators take them.
struct LayerOptions {
  int64_t layer, noise_purpose, drop_purpose;
  double noise, drop;
  bool sigmoid, normalize;
  int64_t kind, balance_group;
  double weight, z_weight;

  // The load is balanced by probabilities without noise; else scores are what is balanced.
  bool with_probabilities(bool noisy) const { return kind == kLoadImportance && noisy; }
  double scale() const { return 1.0 / (1.0 - drop); }
};

OptionalTensor some(const Tensor& tensor) { return tensor.numel() ? OptionalTensor(tensor) : std::nullopt; }

Tensor with_noise(const Tensor& clean, const Tensor& words, const Tensor& token, const LayerOptions& options) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("swin_moe::random_normal", "")
                             .typed<Tensor(const Tensor&, int64_t, int64_t, const Tensor&, int64_t)>();
  return op.call(words, options.layer, options.noise_purpose, token, clean.size(1)).mul_(options.noise).add_(clean);
}

// The number of each row's pair: of its token, times the choices, and its choice.
Tensor numbers_of(const Tensor& pair, const Tensor& token, int64_t top_k) {
  Tensor numbers = at::empty_like(pair);
  const Tensor tokens = token.contiguous();
  const int64_t *from = tokens.const_data_ptr<int64_t>(), *cell = pair.const_data_ptr<int64_t>();
  int64_t* to = numbers.mutable_data_ptr<int64_t>();
  for (int64_t n = 0; n < pair.numel(); ++n) to[n] = from[cell[n] / top_k] * top_k + cell[n] % top_k;
  return numbers;
}

void check_layer(const Tensor& x, const Tensor& router, const OptionalTensor& words, const OptionalTensor& token,
                 const LayerOptions& options) {
  TORCH_CHECK_VALUE(x.dim() == 2 && router.dim() == 2 && x.size(1) == router.size(1),
                    "moe_layer: x must be (tokens, channels) and the router (experts, channels), got ", x.sizes(),
                    " and ", router.sizes());
  TORCH_CHECK_VALUE((options.noise <= 0 && options.drop <= 0) || (words && token && token->size(0) == x.size(0)),
                    "moe_layer: noise and dropout need words and the number of each of ", x.size(0), " tokens");
}

using Layer = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>>;

Layer moe_layer_cpu(const Tensor& x, const Tensor& router, const OptionalTensor& bias, const Tensor& fc1,
                    const OptionalTensor& bias1, const Tensor& fc2, const OptionalTensor& bias2,
                    const OptionalTensor& words, const OptionalTensor& token, int64_t top_k, int64_t group_size,
                    int64_t capacity, int64_t last_capacity, bool prioritized, at::ScalarType dtype, int64_t layer,
                    int64_t noise_purpose, int64_t drop_purpose, double noise, double drop, bool sigmoid,
                    bool normalize, int64_t kind, double noise_std, int64_t balance_group, double weight,
                    double z_weight) {
  const at::AutoDispatchBelowADInplaceOrView below;  // nothing in here is differentiated by PyTorch
  const LayerOptions options{layer, noise_purpose, drop_purpose, noise, drop, sigmoid, normalize, kind, balance_group,
                             weight, z_weight};
  check_layer(x, router, words, token, options);
  std::vector<Tensor> kept(kKeptTensors);
  const Tensor clean = row_linear_cpu(x.to(at::kFloat), router.to(at::kFloat), std::nullopt);
  const OptionalTensor noisy = noise > 0 ? OptionalTensor(with_noise(clean, *words, *token, options)) : std::nullopt;
  const bool own = options.with_probabilities(noisy.has_value());
  auto [scores, probabilities, gate, threshold, expert, slot, keep, demand, kept_GE, totals, entropy] = moe_route_cpu(
      clean, noisy, bias, top_k, group_size, capacity, last_capacity, sigmoid, normalize, prioritized, own);
  const bool load = kind == kLoadImportance;
  const OptionalTensor limit = load ? OptionalTensor(threshold) : std::nullopt;
  const OptionalTensor logits = z_weight != 0 ? OptionalTensor(clean) : std::nullopt;
  auto [aux, balance, sums, loads, log_sum] = moe_balance_cpu(own ? probabilities : scores, limit, expert, logits, kind,
                                                              noise_std, balance_group, weight, z_weight);
  auto [position, pair, vacant, counts] = moe_plan_cpu(expert, slot, keep, kept_GE, group_size, -1, -1);
  const auto none = [&] { return at::empty({0}, clean.options()); };  // results must not share memory
  const bool all = capacity < 0 && last_capacity < 0;
  const Tensor numbers = drop > 0 ? numbers_of(pair, *token, top_k) : at::empty({0}, pair.options());
  auto [y, rows, product, hidden, out] = expert_layer_cpu(
      x, gate, fc1, bias1, fc2, bias2, position, all ? std::nullopt : OptionalTensor(keep), pair, counts, dtype,
      drop > 0 ? words : std::nullopt, some(numbers), layer, drop_purpose, -1, drop, options.scale());
  kept = {scores, probabilities, gate, load ? threshold : none(), logits ? clean : none(), expert, position,
          all ? none() : keep, pair, counts, numbers, rows, product, hidden, out, sums, loads, log_sum};
  return {y, aux, balance, entropy, totals, std::move(kept)};
}

// (tokens, experts): the gradient of the logits, of the gates' and the losses'.
Tensor gradient_of_logits(const std::vector<Tensor>& kept, const Tensor& grad_gate, const OptionalTensor& grad_aux,
                          const LayerOptions& options, double noise_std) {
  const bool noisy = options.noise > 0, own = options.with_probabilities(noisy);
  const OptionalTensor logits = options.z_weight != 0 ? OptionalTensor(kept[kClean]) : std::nullopt;
  const bool load = options.kind == kLoadImportance;
  const OptionalTensor probabilities = own ? OptionalTensor(kept[kProbabilities]) : std::nullopt;
  OptionalTensor of_scores, of_threshold, of_logits;
  if (grad_aux) {
    auto [scores, threshold, z] = moe_balance_backward_cpu(
        *grad_aux, own ? *probabilities : kept[kScores], load ? OptionalTensor(kept[kThreshold]) : std::nullopt, logits,
        kept[kSums], kept[kLoad], kept[kLogSum], options.kind, noise_std, options.balance_group, options.weight,
        options.z_weight);
    if (options.kind != kNone) of_scores = scores;
    if (load) of_threshold = threshold;
    if (logits) of_logits = z;
  }
  auto [of_clean, of_noisy] =
      moe_route_backward_cpu(own ? std::nullopt : of_scores, own ? of_scores : std::nullopt, grad_gate, of_threshold,
                             kept[kScores], probabilities, kept[kExpert], options.sigmoid, options.normalize);
  // In the order in which autograd adds them up.
  const bool both = of_clean.dim() == 2;
  if (!noisy) {
    if (both) of_noisy = of_clean.add_(of_noisy);
    return of_logits ? of_logits->add_(of_noisy) : of_noisy;
  }
  if (of_logits && both) return of_logits->add_(of_clean).add_(of_noisy);
  if (of_logits) return of_logits->add_(of_noisy);
  return both ? of_clean.add_(of_noisy) : of_noisy;
}

std::tuple<Tensor, Tensor> moe_layer_backward_cpu(
    const Tensor& grad, const OptionalTensor& grad_aux, const Tensor& x, const Tensor& router, const Tensor& fc1,
    const Tensor& fc2, const OptionalTensor& words, at::TensorList saved, int64_t layer, int64_t noise_purpose,
    int64_t drop_purpose, double noise, double drop, bool sigmoid, bool normalize, int64_t kind, double noise_std,
    int64_t balance_group, double weight, double z_weight, bool needs_x, bool needs_router,
    const OptionalTensor& grad_fc1, const OptionalTensor& grad_bias1, const OptionalTensor& grad_fc2,
    const OptionalTensor& grad_bias2) {
  const at::AutoDispatchBelowADInplaceOrView below;
  TORCH_CHECK_VALUE(saved.size() == kKeptTensors, "moe_layer_backward: the forward keeps ", int64_t(kKeptTensors),
                    " tensors, got ", saved.size());
  const LayerOptions options{layer, noise_purpose, drop_purpose, noise, drop, sigmoid, normalize, kind, balance_group,
                             weight, z_weight};
  const std::vector<Tensor> kept = saved.vec();
  const bool routed = needs_x || needs_router;
  auto [grad_x, grad_gate] = expert_layer_backward_cpu(
      grad, kept[kGate], kept[kRows], kept[kProduct], kept[kHidden], kept[kOut], fc1, fc2, kept[kPosition],
      some(kept[kKeep]), kept[kPair], kept[kCounts], drop > 0 ? words : std::nullopt, some(kept[kNumbers]), layer,
      drop_purpose, -1, drop, options.scale(), needs_x, routed, grad_fc1, grad_bias1, grad_fc2, grad_bias2);
  Tensor grad_router = at::empty({0}, router.options());
  if (!routed) return {grad_x, grad_router};
  const Tensor of_logits = gradient_of_logits(kept, grad_gate, grad_aux, options, noise_std);
  const auto [of_x, of_router, _] = row_linear_backward_cpu(of_logits, x.to(at::kFloat), router.to(at::kFloat),
                                                            {needs_x, needs_router, false});
  if (needs_router) grad_router = of_router.to(router.scalar_type());
  if (needs_x) grad_x.add_(of_x.to(x.scalar_type()));
  return {grad_x, grad_router};
}

}  // namespace
}  // namespace swin_moe

TORCH_LIBRARY_FRAGMENT(swin_moe, m) {
  m.def(
      "moe_layer(Tensor x, Tensor router, Tensor? bias, Tensor fc1, Tensor? bias1, Tensor fc2, Tensor? bias2, Tensor? "
      "words, Tensor? token, int top_k, SymInt group_size, SymInt capacity, SymInt last_capacity, bool prioritized, "
      "ScalarType dtype, int layer, int noise_purpose, int drop_purpose, float noise, float drop, bool sigmoid, bool "
      "normalize, int kind, float noise_std, SymInt balance_group, float weight, float z_weight) -> (Tensor y, Tensor "
      "aux, Tensor balance, Tensor entropy, Tensor totals, Tensor[] kept)");
  m.def(
      "moe_layer_backward(Tensor grad, Tensor? grad_aux, Tensor x, Tensor router, Tensor fc1, Tensor fc2, Tensor? "
      "words, Tensor[] kept, int layer, int noise_purpose, int drop_purpose, float noise, float drop, bool sigmoid, "
      "bool normalize, int kind, float noise_std, SymInt balance_group, float weight, float z_weight, bool needs_x, "
      "bool needs_router, Tensor(a!)? grad_fc1, Tensor(b!)? grad_bias1, Tensor(c!)? grad_fc2, Tensor(d!)? grad_bias2) "
      "-> (Tensor grad_x, Tensor grad_router)");
}

TORCH_LIBRARY_IMPL(swin_moe, CPU, m) {
  m.impl("moe_layer", &swin_moe::moe_layer_cpu);
  m.impl("moe_layer_backward", &swin_moe::moe_layer_backward_cpu);
}
