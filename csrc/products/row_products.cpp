// Products of few rows: schemas, what is refused, and how a product is divided among threads. The kernels are in
// cpu/products/row_products.h; swin_moe/ops/row_products.py says what each argument means and when they serve.
#include "row_products.h"

#include "capability.h"
#include "grouped_rows.h"
#include "row_linear.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <vector>

namespace swin_moe {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kPartRows = 192;        // of one task; its columns are packed for it
constexpr int64_t kPartColumns = 4 * kRowProductColumns;
constexpr int64_t kLargeParts = 2;        // times as many of both where there are tasks enough: less is packed
constexpr size_t kEnoughParts = 8;        // no matter how many threads there are
constexpr int64_t kLeastTask = 1 << 18;   // multiplications that are worth a thread
constexpr int64_t kLeastRun = 1024, kMostRuns = 16;  // rows, and runs of rows, of a weight's gradient in float32
constexpr int64_t kMostRunElements = 1 << 21;        // of the gradients of all runs, which wait in memory

RowElement element_of(const Tensor& tensor) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kBFloat16,
                   "row products take float32 and bfloat16, got ", tensor.scalar_type());
  return tensor.scalar_type() == at::kFloat ? RowElement::kFloat32 : RowElement::kBFloat16;
}

int64_t bytes_of(RowElement element) { return element == RowElement::kFloat32 ? 4 : 2; }

const char* at_row(const void* data, RowElement element, int64_t offset) {
  return static_cast<const char*>(data) + offset * bytes_of(element);
}

// The kernels of this processor.
struct RowKernels {
  void (*product)(const RowProduct&, const RowProductPart&);
  void (*sum)(const RowSum&);
};

RowKernels row_kernels() {
#if defined(SWIN_MOE_ROW_PRODUCTS)
  if (cpu_capability() == Capability::kAvx512Bf16) return {&row_product_avx512_bf16, &row_sum_avx512_bf16};
  if (cpu_capability() == Capability::kAvx2) return {&row_product_avx2, &row_sum_avx2};
#endif
  TORCH_CHECK(false, "row products have no kernels for this processor");
}

// Products that are computed together.
class Work {
 public:
  void add(const RowProduct& product) {
    products_.push_back(product);
    multiplications_ += product.rows * product.columns * product.steps;
  }

  void run() const {
    const RowKernels kernels = row_kernels();
    std::vector<Part> parts = divided(kLargeParts);
    if (parts.size() < kEnoughParts) parts = divided(1);
    const int64_t count = int64_t(parts.size());
    const int64_t grain = std::max<int64_t>(1, count * kLeastTask / std::max<int64_t>(multiplications_, 1));
    at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) kernels.product(products_[parts[i].product], parts[i].part);
    });
  }

 private:
  struct Part {
    int64_t product;
    RowProductPart part;
  };

  std::vector<Part> divided(int64_t times) const {
    const int64_t rows = kPartRows * times, columns = kPartColumns * times;
    std::vector<Part> parts;
    for (size_t n = 0; n < products_.size(); ++n) {
      const RowProduct& of = products_[n];
      for (int64_t row = 0; row < of.rows; row += rows)
        for (int64_t column = 0; column < of.columns; column += columns)
          parts.push_back(
              {int64_t(n), {row, std::min(row + rows, of.rows), column, std::min(column + columns, of.columns)}});
    }
    return parts;
  }

  std::vector<RowProduct> products_;
  int64_t multiplications_ = 0;
};

// A matrix of the left or the right factor, or of the result.
struct Matrix {
  const void* data;
  RowElement element;
  int64_t row, column;  // strides; one is 1

  // Of contiguous rows, or of a dense matrix in either order. A dimension of one element may have any stride.
  static Matrix rows_of(const Tensor& x) { return {x.const_data_ptr(), element_of(x), x.size(-1), 1}; }
  static Matrix of(const Tensor& x) {
    return {x.const_data_ptr(), element_of(x), x.size(-2) == 1 ? 1 : x.stride(-2), x.size(-1) == 1 ? 1 : x.stride(-1)};
  }
  Matrix transposed() const { return {data, element, column, row}; }
  Matrix from_row(int64_t number) const { return {at_row(data, element, number * row), element, row, column}; }
};

RowProduct product_of(int64_t rows, int64_t columns, int64_t steps, const Matrix& a, const Matrix& b, const Matrix& out,
                      const void* bias = nullptr) {
  return {rows,     columns, steps,                       a.data,  a.row,     a.column,  b.data,     b.row,
          b.column, bias,    const_cast<void*>(out.data), out.row, a.element, b.element, out.element};
}

// out = a.T b for a (steps x rows) and b (steps x columns), in the order in which out lies in memory.
RowProduct outer_product(int64_t rows, int64_t columns, int64_t steps, const Matrix& a, const Matrix& b,
                         const Matrix& out) {
  if (out.column == 1) return product_of(rows, columns, steps, a.transposed(), b, out);
  return product_of(columns, rows, steps, b.transposed(), a, out.transposed());
}

void add_row_sums(const std::vector<RowSum>& sums) {
  const RowKernels kernels = row_kernels();
  for (const RowSum& sum : sums) kernels.sum(sum);
}

// Whether the last two dimensions lie in memory in either order, without gaps between experts.
bool is_dense(const Tensor& weight) { return weight.is_contiguous() || weight.transpose(-2, -1).is_contiguous(); }

// The matrices of one expert of a weight or of its gradient.
Matrix matrix_of(const Tensor& weight, int64_t expert) {
  Matrix found = Matrix::of(weight);
  found.data = at_row(found.data, found.element, expert * weight.stride(0));
  return found;
}

// Rows that are added up for themselves: a long sum in float32 loses digits, and threads share what is in several runs.
// How many they are does not depend on the threads. A large weight has tasks enough, and few runs.
int64_t rows_of_run(int64_t rows, const Tensor& x, const Tensor& weight) {
  if (x.scalar_type() != at::kFloat || weight.scalar_type() != at::kFloat) return std::max<int64_t>(rows, 1);
  const int64_t room = kMostRunElements / std::max<int64_t>(weight.numel(), 1);
  const int64_t runs = std::min(std::max<int64_t>(room, 1), kMostRuns);
  return std::max(kLeastRun, (rows + runs - 1) / runs);
}

// to = the sum of the matrices, in their order.
void add_runs(const Tensor& runs, const Tensor& to) {
  const int64_t size = to.numel();
  const float* from = runs.const_data_ptr<float>();
  float* sum = to.mutable_data_ptr<float>();
  std::copy(from, from + size, sum);
  for (int64_t n = 1; n < runs.size(0); ++n)
    for (int64_t i = 0; i < size; ++i) sum[i] += from[n * size + i];
}

}  // namespace

std::vector<int64_t> first_rows(const Tensor& counts, int64_t rows) {
  const Tensor host = counts.contiguous();
  const int64_t* count = host.const_data_ptr<int64_t>();
  std::vector<int64_t> first{0};
  for (int64_t e = 0; e < host.numel(); ++e) {
    TORCH_CHECK_VALUE(count[e] >= 0, "grouped_rows: expert ", e, " has ", count[e], " rows");
    first.push_back(first.back() + count[e]);
  }
  TORCH_CHECK_VALUE(first.back() <= rows, "grouped_rows: experts have ", first.back(), " rows, there are ", rows);
  return first;
}

void check_grouped(const Tensor& x, const Tensor& weight, const Tensor& counts) {
  TORCH_CHECK_VALUE(x.dim() == 2 && weight.dim() == 3 && x.size(1) == weight.size(1),
                    "grouped_rows: x must be (rows, inputs) and weight (experts, inputs, outputs), got ", x.sizes(),
                    " and ", weight.sizes());
  TORCH_CHECK_VALUE(counts.dim() == 1 && counts.size(0) == weight.size(0) && counts.scalar_type() == at::kLong,
                    "grouped_rows: counts must be one int64 for each of ", weight.size(0), " experts, got ",
                    counts.sizes());
}

// Writes the results of all experts into y, zeros where a row has none.
void put_grouped_rows(const Tensor& x_, const Tensor& weight_, const OptionalTensor& bias_, const Tensor& counts,
                      const Tensor& y) {
  check_grouped(x_, weight_, counts);
  const Tensor x = x_.contiguous(), weight = is_dense(weight_) ? weight_ : weight_.contiguous();
  const int64_t inputs = weight.size(1), outputs = weight.size(2);
  const OptionalTensor bias = bias_ ? OptionalTensor(bias_->to(x.scalar_type()).contiguous()) : std::nullopt;
  const Matrix from = Matrix::rows_of(x), to = Matrix::rows_of(y);
  const std::vector<int64_t> first = first_rows(counts, x.size(0));
  Work work;
  for (int64_t e = 0; e < weight.size(0); ++e)
    work.add(product_of(first[e + 1] - first[e], outputs, inputs, from.from_row(first[e]), matrix_of(weight, e),
                        to.from_row(first[e]),
                        bias ? at_row(bias->const_data_ptr(), to.element, e * outputs) : nullptr));
  work.run();
  if (first.back() < x.size(0)) y.slice(0, first.back()).zero_();
}

Tensor grouped_rows_cpu(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& counts) {
  check_grouped(x, weight, counts);
  Tensor y = at::empty({x.size(0), weight.size(2)}, x.options());
  put_grouped_rows(x, weight, bias, counts, y);
  return y;
}

void grouped_rows_backward_cpu(const Tensor& grad_, const Tensor& x_, const Tensor& weight_, const Tensor& counts,
                               const OptionalTensor& grad_x, const OptionalTensor& grad_weight,
                               const OptionalTensor& grad_bias) {
  check_grouped(x_, weight_, counts);
  const Tensor x = x_.contiguous(), grad = grad_.contiguous();
  const Tensor weight = is_dense(weight_) ? weight_ : weight_.contiguous();
  TORCH_CHECK_VALUE(!grad_weight || is_dense(*grad_weight), "grouped_rows_backward: grad_weight must be dense");
  const int64_t inputs = weight.size(1), outputs = weight.size(2);
  const Matrix g = Matrix::rows_of(grad), from = Matrix::rows_of(x);
  const std::vector<int64_t> first = first_rows(counts, x.size(0));
  Work work;
  std::vector<RowSum> sums;
  for (int64_t e = 0; e < weight.size(0); ++e) {
    const int64_t begin = first[e], rows = first[e + 1] - begin;
    const Matrix g_e = g.from_row(begin), x_e = from.from_row(begin);
    if (grad_x)
      work.add(product_of(rows, inputs, outputs, g_e, matrix_of(weight, e).transposed(),
                          Matrix::rows_of(*grad_x).from_row(begin)));
    if (grad_weight) work.add(outer_product(inputs, outputs, rows, x_e, g_e, matrix_of(*grad_weight, e)));
    if (grad_bias)
      sums.push_back({rows, outputs, g_e.data, g_e.row,
                      const_cast<char*>(at_row(grad_bias->const_data_ptr(), g.element, e * outputs)), g.element});
  }
  work.run();
  add_row_sums(sums);
  if (grad_x && first.back() < x.size(0)) grad_x->slice(0, first.back()).zero_();
}

Tensor row_linear_cpu(const Tensor& x_, const Tensor& weight_, const OptionalTensor& bias_) {
  TORCH_CHECK_VALUE(x_.dim() >= 1 && weight_.dim() == 2 && x_.size(-1) == weight_.size(1),
                    "row_linear: x must be (..., inputs) and weight (outputs, inputs), got ", x_.sizes(), " and ",
                    weight_.sizes());
  const Tensor x = x_.contiguous(), weight = is_dense(weight_) ? weight_ : weight_.contiguous();
  const OptionalTensor bias = bias_ ? OptionalTensor(bias_->to(x.scalar_type()).contiguous()) : std::nullopt;
  const int64_t inputs = weight.size(1), outputs = weight.size(0);
  auto shape = x.sizes().vec();
  shape.back() = outputs;
  Tensor y = at::empty(shape, x.options());
  Work work;
  work.add(product_of(x.numel() / std::max<int64_t>(inputs, 1), outputs, inputs, Matrix::rows_of(x),
                      Matrix::of(weight).transposed(), Matrix::rows_of(y), bias ? bias->const_data_ptr() : nullptr));
  work.run();
  return y;
}

std::tuple<Tensor, Tensor, Tensor> row_linear_backward_cpu(const Tensor& grad_, const Tensor& x_, const Tensor& weight_,
                                                           std::array<bool, 3> needs) {
  const Tensor x = x_.contiguous(), grad = grad_.contiguous();
  const Tensor weight = is_dense(weight_) ? weight_ : weight_.contiguous();
  const int64_t inputs = weight.size(1), outputs = weight.size(0), rows = x.numel() / std::max<int64_t>(inputs, 1);
  const Matrix g = Matrix::rows_of(grad), from = Matrix::rows_of(x);
  Tensor grad_x, grad_weight, grad_bias;
  Work work;
  if (needs[0]) {
    grad_x = at::empty_like(x);
    work.add(product_of(rows, inputs, outputs, g, Matrix::of(weight), Matrix::rows_of(grad_x)));
  }
  const int64_t run = rows_of_run(rows, x, weight);
  Tensor runs;
  if (needs[1]) {
    grad_weight = at::empty({outputs, inputs}, weight.options());
    runs = run < rows ? at::empty({(rows + run - 1) / run, outputs, inputs}, weight.options()) : grad_weight.unsqueeze(0);
    for (int64_t begin = 0, n = 0; n < runs.size(0); ++n, begin += run)
      work.add(outer_product(outputs, inputs, std::min(run, rows - begin), g.from_row(begin), from.from_row(begin),
                             matrix_of(runs, n)));
  }
  if (needs[2]) grad_bias = at::empty({outputs}, x.options());
  work.run();
  if (needs[1] && run < rows) add_runs(runs, grad_weight);
  if (needs[2]) add_row_sums({{rows, outputs, g.data, g.row, grad_bias.mutable_data_ptr(), g.element}});
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace swin_moe

TORCH_LIBRARY_FRAGMENT(swin_moe, m) {
  m.def("grouped_rows(Tensor x, Tensor weight, Tensor? bias, Tensor counts) -> Tensor");
  m.def(
      "grouped_rows_backward(Tensor grad, Tensor x, Tensor weight, Tensor counts, Tensor(a!)? grad_x, Tensor(b!)? "
      "grad_weight, Tensor(c!)? grad_bias) -> ()");
  m.def("row_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("row_linear_backward(Tensor grad, Tensor x, Tensor weight, bool[3] needs) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(swin_moe, CPU, m) {
  m.impl("grouped_rows", &swin_moe::grouped_rows_cpu);
  m.impl("grouped_rows_backward", &swin_moe::grouped_rows_backward_cpu);
  m.impl("row_linear", &swin_moe::row_linear_cpu);
  m.impl("row_linear_backward", &swin_moe::row_linear_backward_cpu);
}
