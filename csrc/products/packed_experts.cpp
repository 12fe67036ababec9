// A layer of experts that tokens choose, for inference on the CPU, as one operator: norm, router, scores, choices, slots,
// rows to the experts, both products, and the sum with what stands around it. swin_moe/ops/packed_experts.py says what
// each argument means; swin_moe/models/optimized.py has the steps one after the other, for choices that this does not take.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "cpu/moe/token_choice.h"
#include "packed_arguments.h"

namespace swin_moe {
namespace {

using at::Tensor;

constexpr int64_t kTokensOfTask = 48;

struct ChoiceOptions {
  int64_t top_k;
  RoutingGroups groups;
  bool prioritized, normalize;
};

// Pieces of one tensor; without one it adds up what is needed.
class Pieces {
 public:
  explicit Pieces(const Tensor* memory) : base_(memory ? static_cast<char*>(memory->mutable_data_ptr()) : nullptr) {}
  template <class T>
  T* take(int64_t count) {
    char* piece = base_ ? base_ + used_ : nullptr;
    used_ += (count * int64_t(sizeof(T)) + 127) / 64 * 64;
    return reinterpret_cast<T*>(piece);
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// What is between the steps. A: what sums are kept in.
template <class A>
struct Between {
  A *scores, *gate, *row_gate, *y;
  char* rows;
  int64_t *expert, *slot, *demand, *kept, *first, *position, *from;
  bool* keep;

  Between(Pieces& pieces, int64_t channels, int64_t experts, int64_t element_size, const ChoiceOptions& options) {
    const int64_t tokens = options.groups.tokens, pairs = tokens * options.top_k, cells = options.groups.count() * experts;
    scores = pieces.take<A>(tokens * experts);
    gate = pieces.take<A>(pairs);
    row_gate = pieces.take<A>(pairs);
    y = pieces.take<A>(options.top_k > 1 ? pairs * channels : 0);
    rows = pieces.take<char>(tokens * channels * element_size);
    for (int64_t** numbers : {&expert, &slot, &position, &from}) *numbers = pieces.take<int64_t>(pairs);
    for (int64_t** numbers : {&demand, &kept, &first}) *numbers = pieces.take<int64_t>(cells);
    keep = pieces.take<bool>(pairs);
  }
};

template <class A>
void normalize_gates(A* gate, int64_t tokens, int64_t top_k) {
  for (int64_t t = 0; t < tokens; ++t, gate += top_k) {
    A sum = 0;
    for (int64_t k = 0; k < top_k; ++k) sum += gate[k];
    for (int64_t k = 0; k < top_k; ++k) gate[k] /= std::max(sum, std::numeric_limits<A>::epsilon());
  }
}

// Writes positions, rows' tokens and gates, in the order of moe_plan; returns the rows of every expert.
template <class A>
std::vector<int64_t> order_rows(const Between<A>& b, int64_t experts, const ChoiceOptions& options) {
  const RoutingGroups& groups = options.groups;
  std::vector<int64_t> counts(experts);
  int64_t next = 0;
  for (int64_t e = 0; e < experts; ++e)
    for (int64_t g = 0; g < groups.count(); ++g) {
      b.first[g * experts + e] = next;
      next += b.kept[g * experts + e];
      counts[e] += b.kept[g * experts + e];
    }
  for (int64_t g = 0; g < groups.count(); ++g)
    for (int64_t t = groups.begin(g); t < groups.end(g); ++t)
      for (int64_t n = t * options.top_k; n < (t + 1) * options.top_k; ++n) {
        if (!b.keep[n]) continue;
        const int64_t row = b.first[g * experts + b.expert[n]] + b.slot[n];
        b.position[n] = row;
        b.from[row] = t;
        b.row_gate[row] = b.gate[n];
      }
  return counts;
}

// Writes scores, choices and slots of all tokens, and their rows.
template <class A>
void route(const PackedRouter& router, const Between<A>& b, const void* bias, const ChoiceOptions& options,
           at::ScalarType type) {
  const RoutingGroups& groups = options.groups;
  const Choices<A> choices{b.scores, nullptr,  static_cast<const A*>(bias), router.router.outputs, options.top_k,
                           b.expert, b.gate, nullptr};
  const auto kernel = kernels_of(type).route;
  at::parallel_for(0, groups.tokens, kTokensOfTask, [&](int64_t begin, int64_t end) {
    kernel(router, begin, end);
    choose(choices, begin, end);
  });
  const Slots slots{b.slot, b.demand, b.kept, b.keep};
  at::parallel_for(0, groups.count(), std::max<int64_t>((1 << 14) / groups.size, 1), [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) take_slots(choices, groups, group, options.prioritized, slots);
  });
  // After the slots, which priority gives by scores.
  if (options.normalize && options.top_k > 1) normalize_gates(b.gate, groups.tokens, options.top_k);
}

// layers and router are whole but for what lies between the steps.
template <class A>
void run_layer(PackedLayers layers, PackedRouter router, const void* bias, const ChoiceOptions& options,
               at::ScalarType type) {
  const int64_t channels = layers.second.outputs, experts = router.router.outputs;
  const int64_t element_size = int64_t(c10::elementSize(type));
  Pieces counter(nullptr);
  Between<A>(counter, channels, experts, element_size, options);
  const Tensor memory = at::empty({counter.used()}, at::TensorOptions().dtype(at::kByte));
  Pieces pieces(&memory);
  const Between<A> between(pieces, channels, experts, element_size, options);
  router.rows = between.rows;
  router.scores = between.scores;
  route(router, between, bias, options, type);
  const std::vector<int64_t> counts = order_rows(between, experts, options);

  const bool one = options.top_k == 1;  // then an expert's rows are written where they belong
  PackedCombine combine{between.y,    between.position, between.keep,  between.gate,    options.top_k, channels,
                        one,          layers.after,     layers.inner,  layers.residual, layers.out};
  layers.x = between.rows;
  layers.from = between.from;
  if (one) {
    layers.gate = between.row_gate;
    layers.to = between.from;
  } else {
    layers.out = between.y;
    layers.inner = layers.residual = nullptr;
    layers.after = {};
  }
  run_rows(layers, counts, type);
  const auto kernel = kernels_of(type).combine;
  at::parallel_for(0, options.groups.tokens, kTokensOfTask,
                   [&](int64_t begin, int64_t end) { kernel(combine, begin, end); });
}

// sizes: channels, hidden channels of an expert, experts, channels of the projector (0: none).
PackedRouter router_of(const Tensor& router, const OptionalTensor& projector, const OptionalTensor& projector_bias,
                       at::IntArrayRef sizes, at::ScalarType sums) {
  PackedRouter found{};
  if (projector) found.projector = matrix_of(*projector, projector_bias, sizes[0], sizes[3], sums);
  found.router = matrix_of(router, std::nullopt, projector ? sizes[3] : sizes[0], sizes[2], sums);
  return found;
}

Tensor packed_experts_cpu(const Tensor& x_, const Tensor& weight, const OptionalTensor& bias, const Tensor& weight2,
                          const OptionalTensor& bias2, const Tensor& router_, const OptionalTensor& projector,
                          const OptionalTensor& projector_bias, const OptionalTensor& balance,
                          const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                          const OptionalTensor& after_weight, const OptionalTensor& after_bias,
                          const OptionalTensor& inner, at::IntArrayRef sizes, double eps, int64_t top_k,
                          int64_t group_size, int64_t capacity, int64_t last_capacity, bool prioritized, bool sigmoid,
                          bool normalize, at::ScalarType dtype) {
  const auto sums = accumulated(dtype);
  TORCH_CHECK_VALUE(sizes.size() == 4 && *std::min_element(sizes.begin(), sizes.end() - 1) > 0,
                    "packed_experts: sizes must be channels, hidden channels, experts and projector, got ", sizes);
  const int64_t channels = sizes[0], experts = sizes[2];
  TORCH_CHECK_VALUE(x_.dim() >= 1 && x_.size(-1) == channels && x_.scalar_type() == sums, "packed_experts: x must be "
                    "(..., ", channels, ") in ", sums, ", got ", x_.sizes(), " in ", x_.scalar_type());
  TORCH_CHECK_VALUE(top_k >= 1 && top_k <= experts && group_size >= 1, "packed_experts: top_k must be in [1, ", experts,
                    "] and a group of 1 token or more, got ", top_k, " and ", group_size);
  TORCH_CHECK_VALUE(weight.size(0) == experts && weight2.size(0) == experts, "packed_experts: weights must be of ",
                    experts, " experts, got ", weight.size(0), " and ", weight2.size(0));
  TORCH_CHECK_VALUE(!balance || (balance->scalar_type() == sums && balance->numel() == experts &&
                                 balance->is_contiguous()),
                    "packed_experts: the bias of balance must be one number of ", sums, " per expert");
  const Tensor x = x_.contiguous(), out = at::empty(x.sizes(), x.options());
  Tensor added;
  PackedLayers layers{};
  if (inner) {
    TORCH_CHECK_VALUE(inner->sizes() == x.sizes() && inner->scalar_type() == sums,
                      "packed_experts: what is added must be ", x.sizes(), " in ", sums, ", got ", inner->sizes(), " in ",
                      inner->scalar_type());
    added = inner->contiguous();
    layers.inner = added.const_data_ptr();
  }
  layers.accumulated_out = true;
  layers.first = matrix_of(weight, bias, channels, sizes[1], dtype);
  layers.second = matrix_of(weight2, bias2, sizes[1], channels, dtype);
  TORCH_CHECK_VALUE(layers.first.int8 == layers.second.int8, "packed_experts: both weights are int8, or none");
  layers.after = norm_of(after_weight, after_bias, channels, eps, dtype, "a norm");
  layers.residual = x.const_data_ptr();
  layers.out = out.mutable_data_ptr();
  // Norms and biases are padded alike for sums and for factors: to vectors of sums.
  PackedRouter router = router_of(router_, projector, projector_bias, sizes, sums);
  TORCH_CHECK_VALUE(!router.router.int8 && !router.projector.int8, "packed_experts: a router's weights are not int8");
  router.x = x.const_data_ptr();
  router.norm = norm_of(norm_weight, norm_bias, channels, eps, dtype, "a norm");
  router.sigmoid = sigmoid;
  if (out.numel() == 0) return out;
  const ChoiceOptions options{top_k, {out.numel() / channels, group_size, capacity, last_capacity}, prioritized,
                              normalize};
  const void* of_balance = balance ? balance->const_data_ptr() : nullptr;
  (sums == at::kDouble ? run_layer<double> : run_layer<float>)(layers, router, of_balance, options, dtype);
  return out;
}

}  // namespace
}  // namespace swin_moe

TORCH_LIBRARY_FRAGMENT(swin_moe, m) {
  m.def(
      "packed_experts(Tensor x, Tensor weight, Tensor? bias, Tensor weight2, Tensor? bias2, Tensor router, Tensor? "
      "projector, Tensor? projector_bias, Tensor? balance, Tensor? norm_weight, Tensor? norm_bias, Tensor? "
      "after_weight, Tensor? after_bias, Tensor? inner, int[] sizes, float eps, int top_k, int group_size, int "
      "capacity, int last_capacity, bool prioritized, bool sigmoid, bool normalize, ScalarType dtype) -> Tensor");
}

TORCH_LIBRARY_IMPL(swin_moe, CPU, m) { m.impl("packed_experts", &swin_moe::packed_experts_cpu); }
