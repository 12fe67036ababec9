// Tokens to the rows of experts, through them and back, as one operator each way. Rounds as moe/dispatch.py and
// moe/experts.py do one step after the other; swin_moe/ops/row_products.py says what each argument means.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <tuple>
#include <vector>

#include "expert_layer.h"
#include "expert_rows.h"
#include "memory/kept_memory.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
// Where PyTorch multiplies and adds in one rounding, so do these. By features: "arch=" asks for a maker's processor too,
// and every other maker's would run the default, which calls fmaf for each number.
#define SWIN_MOE_FMA_CLONES __attribute__((target_clones("avx512f", "fma", "default")))
#else
#define SWIN_MOE_FMA_CLONES
#endif
#define SWIN_MOE_INLINED inline __attribute__((always_inline))

namespace swin_moe {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kLeastElements = 1 << 14;  // of a task

SWIN_MOE_INLINED float wide(float x) { return x; }
SWIN_MOE_INLINED float wide(uint16_t bits) { return std::bit_cast<float>(uint32_t(bits) << 16); }
SWIN_MOE_INLINED void put(float* to, float x) { *to = x; }
SWIN_MOE_INLINED void put(uint16_t* to, float x) {  // to nearest, ties to even
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  *to = uint16_t(x == x ? rounded : bits >> 16 | 0x40);
}

// A matrix of float32 or bfloat16.
struct Rows {
  char* data;
  bool narrow;
  int64_t width;

  static Rows of(const Tensor& x) {
    return {static_cast<char*>(const_cast<void*>(x.const_data_ptr())), x.scalar_type() == at::kBFloat16, x.size(1)};
  }
  Rows at(int64_t row) const { return {data + row * width * (narrow ? 2 : 4), narrow, width}; }
};

// Calls use(pointers to the elements of both rows), by their types.
template <class Use>
SWIN_MOE_INLINED void with_types(const Rows& a, const Rows& b, Use use) {
  auto then = [&](auto* first) __attribute__((always_inline)) {
    b.narrow ? use(first, reinterpret_cast<uint16_t*>(b.data)) : use(first, reinterpret_cast<float*>(b.data));
  };
  a.narrow ? then(reinterpret_cast<uint16_t*>(a.data)) : then(reinterpret_cast<float*>(a.data));
}

SWIN_MOE_FMA_CLONES void copy_row(Rows from, Rows to) {
  if (from.narrow == to.narrow) {
    std::memcpy(to.data, from.data, size_t(to.width) * (to.narrow ? 2 : 4));
    return;
  }
  with_types(from, to, [&](auto* x, auto* y) __attribute__((always_inline)) {
    for (int64_t i = 0; i < to.width; ++i) put(y + i, wide(x[i]));
  });
}

SWIN_MOE_FMA_CLONES void scale_row(Rows from, float factor, Rows to) {
  with_types(from, to, [&](auto* x, auto* y) __attribute__((always_inline)) {
    for (int64_t i = 0; i < to.width; ++i) put(y + i, wide(x[i]) * factor);
  });
}

// sums += factor * from.
SWIN_MOE_FMA_CLONES void add_scaled_row(Rows from, float factor, float* sums) {
  Rows to{reinterpret_cast<char*>(sums), false, from.width};
  with_types(from, to, [&](auto* x, auto* y) __attribute__((always_inline)) {
    for (int64_t i = 0; i < from.width; ++i) put(y + i, __builtin_fmaf(wide(x[i]), factor, wide(y[i])));
  });
}

// sums += from, rounded to the elements of `from`.
SWIN_MOE_FMA_CLONES void add_row(Rows from, float* sums) {
  if (!from.narrow) {
    const float* x = reinterpret_cast<const float*>(from.data);
    for (int64_t i = 0; i < from.width; ++i) sums[i] += x[i];
    return;
  }
  const uint16_t* x = reinterpret_cast<const uint16_t*>(from.data);
  for (int64_t i = 0; i < from.width; ++i) {
    uint16_t sum;
    put(&sum, sums[i] + wide(x[i]));
    sums[i] = wide(sum);
  }
}

SWIN_MOE_FMA_CLONES void multiply_rows(Rows a, Rows b, float* to) {
  with_types(a, b, [&](auto* x, auto* y) __attribute__((always_inline)) {
    for (int64_t i = 0; i < a.width; ++i) to[i] = wide(x[i]) * wide(y[i]);
  });
}

// Which row every pair of a token and a choice is, and the other way round.
struct Order {
  const int64_t *position, *pair;
  const bool* keep;  // null = all
  int64_t tokens, top_k, rows;

  bool has(int64_t cell) const { return !keep || keep[cell]; }
};

template <class Visit>
void for_rows(int64_t rows, int64_t width, Visit visit) {
  at::parallel_for(0, rows, std::max<int64_t>(1, kLeastElements / std::max<int64_t>(width, 1)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t row = begin; row < end; ++row) visit(row);
                   });
}

Order order_of(const Tensor& position, const OptionalTensor& keep, const Tensor& pair) {
  TORCH_CHECK_VALUE(position.dim() == 2 && pair.dim() == 1 && (!keep || keep->sizes() == position.sizes()) &&
                        position.is_contiguous() && pair.is_contiguous() && (!keep || keep->is_contiguous()),
                    "expert_layer: position and keep must be (tokens, choices) and pair (rows,), all contiguous, got ",
                    position.sizes(), " and ", pair.sizes());
  return {position.const_data_ptr<int64_t>(),
          pair.const_data_ptr<int64_t>(),
          keep ? keep->const_data_ptr<bool>() : nullptr,
          position.size(0),
          position.size(1),
          pair.size(0)};
}

void check_elements(const Tensor& tensor) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kBFloat16,
                   "expert_layer takes float32 and bfloat16, got ", tensor.scalar_type());
}

const float* gates_of(const Tensor& gate, const Tensor& position) {
  TORCH_CHECK_VALUE(gate.sizes() == position.sizes() && gate.is_contiguous(),
                    "expert_layer: gate must be ", position.sizes(), " and contiguous, got ", gate.sizes());
  return gate.const_data_ptr<float>();  // refuses another dtype
}

}  // namespace

ExpertLayer expert_layer_cpu(
    const Tensor& x_, const Tensor& gate, const Tensor& fc1, const OptionalTensor& bias1, const Tensor& fc2,
    const OptionalTensor& bias2, const Tensor& position, const OptionalTensor& keep, const Tensor& pair,
    const Tensor& counts, at::ScalarType dtype, const OptionalTensor& words, const OptionalTensor& numbers,
    int64_t layer, int64_t purpose, int64_t site, double drop, double scale) {
  const Tensor x = x_.contiguous();
  check_elements(x);
  TORCH_CHECK_VALUE(x.dim() == 2 && x.size(0) == position.size(0), "expert_layer: x must be (", position.size(0),
                    ", channels), got ", x.sizes());
  const Order order = order_of(position, keep, pair);
  const float* gates = gates_of(gate, position);
  const int64_t width = x.size(1);
  Tensor rows = empty_kept({order.rows, width}, dtype), y = at::empty_like(x);
  check_elements(rows);
  const Rows from = Rows::of(x), taken = Rows::of(rows);
  for_rows(order.rows, width, [&](int64_t n) { copy_row(from.at(order.pair[n] / order.top_k), taken.at(n)); });
  auto [out, product, hidden] =
      expert_rows(rows, {fc1, bias1, fc2, bias2}, counts, {words, numbers, layer, purpose, site, drop, scale});
  const Rows made = Rows::of(out), to = Rows::of(y);
  at::parallel_for(0, order.tokens, std::max<int64_t>(1, kLeastElements / std::max<int64_t>(width, 1)),
                   [&](int64_t begin, int64_t end) {
                     std::vector<float> sums(width);
                     const Rows sum{reinterpret_cast<char*>(sums.data()), false, width};
                     for (int64_t t = begin; t < end; ++t) {
                       bool any = false;
                       for (int64_t cell = t * order.top_k; cell < (t + 1) * order.top_k; ++cell) {
                         if (!order.has(cell)) continue;
                         const Rows row = made.at(order.position[cell]);
                         any ? add_scaled_row(row, gates[cell], sums.data()) : scale_row(row, gates[cell], sum);
                         any = true;
                       }
                       if (!any) std::fill(sums.begin(), sums.end(), 0.0f);
                       copy_row(sum, to.at(t));
                     }
                   });
  return {y, rows, product, hidden, out};
}

namespace {

// (tokens, choices): the products of each pair's row and its token's gradient, summed as PyTorch sums.
Tensor gate_gradient(const Tensor& out, const Tensor& grad, const Order& order) {
  const int64_t width = out.size(1);
  Tensor products = empty_kept({order.rows, width}, at::kFloat);
  float* to = products.mutable_data_ptr<float>();
  const Rows made = Rows::of(out), given = Rows::of(grad);
  for_rows(order.rows, width,
           [&](int64_t n) { multiply_rows(made.at(n), given.at(order.pair[n] / order.top_k), to + n * width); });
  const Tensor sums = products.sum(1);
  const float* sum = sums.const_data_ptr<float>();
  Tensor found = at::empty({order.tokens, order.top_k}, products.options());
  float* cells = found.mutable_data_ptr<float>();
  for (int64_t cell = 0; cell < order.tokens * order.top_k; ++cell)
    cells[cell] = order.has(cell) ? sum[order.position[cell]] : 0.0f;
  return found;
}

}  // namespace

std::tuple<Tensor, Tensor> expert_layer_backward_cpu(
    const Tensor& grad_, const Tensor& gate, const Tensor& rows, const Tensor& product, const Tensor& hidden,
    const Tensor& out, const Tensor& fc1, const Tensor& fc2, const Tensor& position, const OptionalTensor& keep,
    const Tensor& pair, const Tensor& counts, const OptionalTensor& words, const OptionalTensor& numbers, int64_t layer,
    int64_t purpose, int64_t site, double drop, double scale, bool needs_x, bool needs_gate,
    const OptionalTensor& grad_fc1, const OptionalTensor& grad_bias1, const OptionalTensor& grad_fc2,
    const OptionalTensor& grad_bias2) {
  const Tensor grad = grad_.contiguous();
  check_elements(grad);
  const Order order = order_of(position, keep, pair);
  const float* gates = gates_of(gate, position);
  const int64_t width = out.size(1);
  Tensor grad_gate = needs_gate ? gate_gradient(out, grad, order) : at::empty({0}, gate.options());
  const Tensor grad_out = empty_kept(out.sizes(), out.scalar_type());
  const Rows given = Rows::of(grad), scaled = Rows::of(grad_out);
  for_rows(order.rows, width, [&](int64_t n) {
    scale_row(given.at(order.pair[n] / order.top_k), gates[order.pair[n]], scaled.at(n));
  });
  const OptionalTensor grad_rows = needs_x ? OptionalTensor(empty_kept(rows.sizes(), rows.scalar_type())) : std::nullopt;
  expert_rows_backward(grad_out, rows, product, hidden, fc1, fc2, counts,
                       {words, numbers, layer, purpose, site, drop, scale},
                       {grad_rows, grad_fc1, grad_bias1, grad_fc2, grad_bias2});
  if (!needs_x) return {at::empty({0}, grad.options()), grad_gate};
  Tensor grad_x = at::empty({order.tokens, width}, grad.options());
  const Rows of_rows = Rows::of(*grad_rows), to = Rows::of(grad_x);
  at::parallel_for(0, order.tokens, std::max<int64_t>(1, kLeastElements / std::max<int64_t>(width, 1)),
                   [&](int64_t begin, int64_t end) {
                     std::vector<float> sums(width);
                     const Rows sum{reinterpret_cast<char*>(sums.data()), false, width};
                     for (int64_t t = begin; t < end; ++t) {
                       std::fill(sums.begin(), sums.end(), 0.0f);
                       for (int64_t cell = t * order.top_k; cell < (t + 1) * order.top_k; ++cell)
                         if (order.has(cell)) add_row(of_rows.at(order.position[cell]), sums.data());
                       copy_row(sum, to.at(t));
                     }
                   });
  return {grad_x, grad_gate};
}

}  // namespace swin_moe

TORCH_LIBRARY_FRAGMENT(swin_moe, m) {
  m.def(
      "expert_layer(Tensor x, Tensor gate, Tensor fc1, Tensor? bias1, Tensor fc2, Tensor? bias2, Tensor position, "
      "Tensor? keep, Tensor pair, Tensor counts, ScalarType dtype, Tensor? words, Tensor? rows, int layer, int "
      "purpose, int site, float drop, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "expert_layer_backward(Tensor grad, Tensor gate, Tensor taken, Tensor product, Tensor hidden, Tensor out, Tensor "
      "fc1, Tensor fc2, Tensor position, Tensor? keep, Tensor pair, Tensor counts, Tensor? words, Tensor? rows, int "
      "layer, int purpose, int site, float drop, float scale, bool needs_x, bool needs_gate, Tensor(a!)? grad_fc1, "
      "Tensor(b!)? grad_bias1, Tensor(c!)? grad_fc2, Tensor(d!)? grad_bias2) -> (Tensor grad_x, Tensor grad_gate)");
}

TORCH_LIBRARY_IMPL(swin_moe, CPU, m) {
  m.impl("expert_layer", &swin_moe::expert_layer_cpu);
  m.impl("expert_layer_backward", &swin_moe::expert_layer_backward_cpu);
}
