// One linear layer by the kernels for few rows, as operators call it: row_products.cpp computes it, with the same bits
// for every number of threads. swin_moe/ops/row_products.py says what each argument means.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

namespace swin_moe {

at::Tensor row_linear_cpu(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias);

// The gradients of x, weight and bias; undefined tensors for those that are not needed.
std::tuple<at::Tensor, at::Tensor, at::Tensor> row_linear_backward_cpu(const at::Tensor& grad, const at::Tensor& x,
                                                                       const at::Tensor& weight,
                                                                       std::array<bool, 3> needs);

}  // namespace swin_moe
