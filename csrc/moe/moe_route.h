// What the routing operators of every device ask of their arguments.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>

namespace swin_moe {

// Tokens in consecutive routing groups of `size`; the last one may be smaller and has a capacity of its own.
struct RoutingGroups {
  int64_t tokens, size, capacity, last_capacity;  // capacities < 0: by need

  int64_t count() const { return (tokens + size - 1) / size; }
  int64_t begin(int64_t group) const { return group * size; }
  int64_t end(int64_t group) const { return std::min(tokens, (group + 1) * size); }
  int64_t limit(int64_t group) const { return end(group) - begin(group) < size ? last_capacity : capacity; }
};

// Returns the groups of the tokens of `clean`; refuses what routing cannot take, in one sentence.
inline RoutingGroups check_route(const at::Tensor& clean, const at::Tensor& noisy,
                                 const std::optional<at::Tensor>& bias, int64_t top_k, int64_t group_size,
                                 int64_t capacity, int64_t last_capacity) {
  TORCH_CHECK_VALUE(clean.dim() == 2 && clean.sizes() == noisy.sizes(),
                    "moe_route: logits must be (tokens, experts) with and without noise, got ", noisy.sizes(), " and ",
                    clean.sizes());
  TORCH_CHECK_TYPE((clean.scalar_type() == at::kFloat || clean.scalar_type() == at::kDouble) &&
                       noisy.scalar_type() == clean.scalar_type(),
                   "moe_route: logits must be float32 or float64, both the same, got ", noisy.scalar_type(), " and ",
                   clean.scalar_type());
  TORCH_CHECK_VALUE(top_k >= 1 && top_k <= clean.size(1), "moe_route: top_k must be in [1, ", clean.size(1), "], got ",
                    top_k);
  TORCH_CHECK_VALUE(group_size >= 1, "moe_route: a routing group must hold tokens, got ", group_size);
  TORCH_CHECK_VALUE(!bias || (bias->dim() == 1 && bias->size(0) == clean.size(1)),
                    "moe_route: bias must be one number per expert, got ", bias ? bias->numel() : 0);
  return {clean.size(0), group_size, capacity, last_capacity};
}

}  // namespace swin_moe
