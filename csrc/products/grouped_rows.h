// The products of all experts over their rows, as operators call each other: row_products.cpp computes them.
// swin_moe/ops/row_products.py says what each argument means.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

namespace swin_moe {

// The first row of each expert, and the row after the last one's.
std::vector<int64_t> first_rows(const at::Tensor& counts, int64_t rows);

void check_grouped(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& counts);

// Writes the results of all experts into y, zeros where a row has none.
void put_grouped_rows(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                      const at::Tensor& counts, const at::Tensor& y);

// Writes the gradients that are asked for.
void grouped_rows_backward_cpu(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight,
                               const at::Tensor& counts, const std::optional<at::Tensor>& grad_x,
                               const std::optional<at::Tensor>& grad_weight,
                               const std::optional<at::Tensor>& grad_bias);

}  // namespace swin_moe
