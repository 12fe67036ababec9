// What a backward pass of window attention keeps in its workspace.
#pragma once

#include "window_launch.h"

namespace swin_moe {

// Partial sums of a backward pass, one row per block and head; partial_sums.cuh adds them up in order.
struct Partials {
  float* bias;          // (partials, heads, table_rows)
  float* logit_scale;   // (partials, heads)
  float* pad;           // (partials, 2C): keys and values; queries of padding have no gradient
};

// What keys need of the rows of scores, one number per query each; in the workspace (windows, heads, tokens). The
// largest score and the sum apart, not as one logarithm: its rounding would be an error of a whole row of weights.
struct RowStatistics {
  float* largest;       // score; infinity leaves a query out
  float* inverse_sum;   // of the exponentials of score - largest
  float* delta;         // sum of weights times their gradients

  SWIN_MOE_BOTH RowStatistics from(int64_t row) const { return {largest + row, inverse_sum + row, delta + row}; }
};

// Numbers of partial sums, and the workspace that holds them.
struct BackwardPlan {
  int64_t bias = 0, logit_scale = 0, pad = 0;
  bool statistics = false;
};

struct Workspace {
  Partials partials{};
  RowStatistics statistics{};
  size_t bytes = 0;

  Workspace(const WindowLaunch& p, const BackwardPlan& plan) {
    auto take = [&](int64_t count) {
      const size_t at = bytes;
      bytes += (size_t(count) * sizeof(float) + 15) / 16 * 16;
      return p.workspace ? reinterpret_cast<float*>(static_cast<unsigned char*>(p.workspace) + at) : nullptr;
    };
    partials.bias = take(plan.bias * p.num_heads * p.geometry.table_rows());
    if (p.logit_scale) partials.logit_scale = take(plan.logit_scale * p.num_heads);
    if (p.grad_pad_qkv) partials.pad = take(plan.pad * 2 * p.channels());
    if (plan.statistics) {
      const int64_t rows = p.windows() * p.num_heads * p.geometry.tokens();
      statistics.largest = take(rows);
      statistics.inverse_sum = take(rows);
      statistics.delta = take(rows);
    }
  }
};

}  // namespace swin_moe
