// What the operators of an MoE layer compute on the CPU, as the operator of a whole layer (moe_layer.cpp) calls it too.
// The files of swin_moe/ops/moe/ say what each argument means.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace swin_moe {

// scores, probabilities, gate, threshold, expert, slot, keep, demand, kept, totals, entropy
using RoutedTokens = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                                at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

RoutedTokens moe_route_cpu(const at::Tensor& clean, const std::optional<at::Tensor>& noisy,
                           const std::optional<at::Tensor>& bias, int64_t top_k, int64_t group_size, int64_t capacity,
                           int64_t last_capacity, bool sigmoid, bool normalize, bool prioritized, bool probabilities);

// The gradients of the logits without and with noise; the first is empty where there are no probabilities.
std::tuple<at::Tensor, at::Tensor> moe_route_backward_cpu(
    const std::optional<at::Tensor>& grad_scores, const std::optional<at::Tensor>& grad_probabilities,
    const std::optional<at::Tensor>& grad_gate, const std::optional<at::Tensor>& grad_threshold,
    const at::Tensor& scores, const std::optional<at::Tensor>& probabilities, const at::Tensor& expert, bool sigmoid,
    bool normalize);

// aux, balance, sums, load, log_sum
using BalanceLoss = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

BalanceLoss moe_balance_cpu(const at::Tensor& scores, const std::optional<at::Tensor>& threshold,
                            const at::Tensor& expert, const std::optional<at::Tensor>& logits, int64_t kind,
                            double noise_std, int64_t group_size, double weight, double z_weight);

// The gradients of scores, threshold and logits; empty where there is none.
std::tuple<at::Tensor, at::Tensor, at::Tensor> moe_balance_backward_cpu(
    const at::Tensor& grad, const at::Tensor& scores, const std::optional<at::Tensor>& threshold,
    const std::optional<at::Tensor>& logits, const at::Tensor& sums, const at::Tensor& load, const at::Tensor& log_sum,
    int64_t kind, double noise_std, int64_t group_size, double weight, double z_weight);

// position, pair, vacant, counts
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> moe_plan_cpu(const at::Tensor& expert,
                                                                        const at::Tensor& slot, const at::Tensor& keep,
                                                                        const at::Tensor& kept, int64_t group_size,
                                                                        int64_t num_rows, int64_t padded_rows);

}  // namespace swin_moe
