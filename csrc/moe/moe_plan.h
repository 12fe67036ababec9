// What moe_plan asks of its arguments on every device.
#pragma once

#include <ATen/core/Tensor.h>

namespace swin_moe {

inline void check_plan(const at::Tensor& expert, const at::Tensor& slot, const at::Tensor& keep, const at::Tensor& kept,
                       int64_t group_size) {
  TORCH_CHECK_VALUE(expert.dim() == 2 && slot.sizes() == expert.sizes() && keep.sizes() == expert.sizes(),
                    "moe_plan: expert, slot and keep must be (tokens, choices), got ", expert.sizes(), ", ",
                    slot.sizes(), " and ", keep.sizes());
  TORCH_CHECK_TYPE(expert.scalar_type() == at::kLong && slot.scalar_type() == at::kLong &&
                       kept.scalar_type() == at::kLong && keep.scalar_type() == at::kBool,
                   "moe_plan: expert, slot and kept must be int64 and keep bool, got ", expert.scalar_type(), ", ",
                   slot.scalar_type(), ", ", kept.scalar_type(), " and ", keep.scalar_type());
  TORCH_CHECK_VALUE(kept.dim() == 2 && group_size >= 1 &&
                        (kept.size(0) == 1 || kept.size(0) * group_size >= expert.size(0)),
                    "moe_plan: kept must be (groups, experts) of groups of ", group_size, " tokens for ",
                    expert.size(0), ", got ", kept.sizes());
}

}  // namespace swin_moe
