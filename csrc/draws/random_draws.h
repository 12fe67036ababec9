// What the draws of random_draws.cpp take, checked alike on every device.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <torch/library.h>

#include "random.h"

namespace swin_moe {

// Seed and step lie where the draws are made: a captured graph reads the step of the day.
inline void check_words(const char* name, const at::Tensor& words, const at::Tensor& rows) {
  TORCH_CHECK_VALUE(words.dim() == 1 && words.size(0) == 2 && words.scalar_type() == at::kLong &&
                        words.device() == rows.device() && words.is_contiguous(),
                    name, ": words must be (seed, step), int64 on ", rows.device(), ", got ", words.sizes(), " ",
                    words.scalar_type(), " on ", words.device());
  TORCH_CHECK_VALUE(rows.dim() == 1 && rows.scalar_type() == at::kLong, name, ": rows must be (N,) int64, got ",
                    rows.sizes(), " ", rows.scalar_type());
}

inline void check_dropped(const char* name, const at::Tensor& x, const at::Tensor& rows, double drop) {
  TORCH_CHECK_VALUE(x.dim() == 2 && x.size(0) == rows.size(0) && x.device() == rows.device(), name,
                    ": x must be (", rows.size(0), ", units) on ", rows.device(), ", got ", x.sizes(), " on ",
                    x.device());
  TORCH_CHECK_TYPE(at::isFloatingType(x.scalar_type()), name, ": x must be floating point, got ", x.scalar_type());
  TORCH_CHECK_VALUE(drop >= 0.0 && drop < 1.0, name, ": drop must be in [0, 1), got ", drop);
}

inline void check_rates(const char* name, at::ArrayRef<double> rates, at::ScalarType dtype) {
  for (const double rate : rates)
    TORCH_CHECK_VALUE(rate >= 0.0 && rate < 1.0, name, ": a rate must be in [0, 1), got ", rate);
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble, name, ": factors are float32 or float64, got ", dtype);
}

}  // namespace swin_moe
