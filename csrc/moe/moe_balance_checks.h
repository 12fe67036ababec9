// What the operators of balance losses ask of their arguments on every device.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "moe_balance.h"

namespace swin_moe {

inline void check_balance(const at::Tensor& scores, const std::optional<at::Tensor>& threshold,
                          const at::Tensor& expert, int64_t kind) {
  TORCH_CHECK_VALUE(scores.dim() == 2 && expert.dim() == 2 && expert.size(0) == scores.size(0) && expert.size(1) > 0,
                    "moe_balance: scores and experts must be (tokens, ...), got ", scores.sizes(), " and ",
                    expert.sizes());
  TORCH_CHECK_VALUE(kind != kLoadImportance || (threshold && threshold->size(0) == scores.size(0)),
                    "moe_balance: the load needs a threshold for each of ", scores.size(0), " tokens");
}

}  // namespace swin_moe
