// Experts over few rows, as operators call each other: row_products.cpp computes them, expert_layer.cpp brings rows to
// them and back. swin_moe/ops/row_products.py says what each argument means.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace swin_moe {

// Which hidden units are dropped, see swin_moe/ops/random_draws.py; without words none.
struct UnitDraw {
  const std::optional<at::Tensor>&words, &rows;
  int64_t layer, purpose, site;
  double drop, scale;

  // Of some rows, by the numbers of these.
  at::Tensor apply(const at::Tensor& x, const std::optional<at::Tensor>& of_rows) const;
};

struct ExpertWeights {
  const at::Tensor& fc1;
  const std::optional<at::Tensor>& bias1;
  const at::Tensor& fc2;
  const std::optional<at::Tensor>& bias2;
};

// Where gradients go; those that are not asked for are null.
struct ExpertGradients {
  const std::optional<at::Tensor>&x, &fc1, &bias1, &fc2, &bias2;
};

// Returns (the experts' results, the first product, the hidden layer), which the gradients ask for.
std::tuple<at::Tensor, at::Tensor, at::Tensor> expert_rows(const at::Tensor& x, const ExpertWeights& weights,
                                                           const at::Tensor& counts, const UnitDraw& draw);

void expert_rows_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& product,
                          const at::Tensor& hidden, const at::Tensor& fc1, const at::Tensor& fc2,
                          const at::Tensor& counts, const UnitDraw& draw, const ExpertGradients& to);

}  // namespace swin_moe
