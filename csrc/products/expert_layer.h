// Tokens through their experts and back, as operators call it: expert_layer.cpp computes it.
// swin_moe/ops/row_products.py says what each argument means.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace swin_moe {

// y, and what the gradients ask for: rows, product, hidden, out
using ExpertLayer = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

ExpertLayer expert_layer_cpu(const at::Tensor& x, const at::Tensor& gate, const at::Tensor& fc1,
                             const std::optional<at::Tensor>& bias1, const at::Tensor& fc2,
                             const std::optional<at::Tensor>& bias2, const at::Tensor& position,
                             const std::optional<at::Tensor>& keep, const at::Tensor& pair, const at::Tensor& counts,
                             at::ScalarType dtype, const std::optional<at::Tensor>& words,
                             const std::optional<at::Tensor>& numbers, int64_t layer, int64_t purpose, int64_t site,
                             double drop, double scale);

// The gradients of x and gate; the others are written where they are asked for.
std::tuple<at::Tensor, at::Tensor> expert_layer_backward_cpu(
    const at::Tensor& grad, const at::Tensor& gate, const at::Tensor& rows, const at::Tensor& product,
    const at::Tensor& hidden, const at::Tensor& out, const at::Tensor& fc1, const at::Tensor& fc2,
    const at::Tensor& position, const std::optional<at::Tensor>& keep, const at::Tensor& pair,
    const at::Tensor& counts, const std::optional<at::Tensor>& words, const std::optional<at::Tensor>& numbers,
    int64_t layer, int64_t purpose, int64_t site, double drop, double scale, bool needs_x, bool needs_gate,
    const std::optional<at::Tensor>& grad_fc1, const std::optional<at::Tensor>& grad_bias1,
    const std::optional<at::Tensor>& grad_fc2, const std::optional<at::Tensor>& grad_bias2);

}  // namespace swin_moe
