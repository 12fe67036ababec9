// The order of rows for experts from a routing: schema and CPU kernel. The CUDA kernels are in cuda/moe/moe_plan.cu;
// swin_moe/ops/moe/moe_plan.py says what each argument means, swin_moe/moe/dispatch.py has the reference.
#include "moe_plan.h"

#include "moe_kernels.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <atomic>
#include <tuple>
#include <vector>

namespace swin_moe {

using at::Tensor;

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_plan_cpu(const Tensor& expert_, const Tensor& slot_, const Tensor& keep_,
                                                        const Tensor& kept_, int64_t group_size, int64_t num_rows,
                                                        int64_t padded_rows) {
  check_plan(expert_, slot_, keep_, kept_, group_size);
  const Tensor expert = expert_.contiguous(), slot = slot_.contiguous(), keep = keep_.contiguous();
  const Tensor kept = kept_.contiguous();
  const int64_t groups = kept.size(0), experts = kept.size(1), top_k = expert.size(1);
  const int64_t* taken = kept.const_data_ptr<int64_t>();
  Tensor counts = at::zeros({experts}, kept.options());
  int64_t* count = counts.mutable_data_ptr<int64_t>();
  std::vector<int64_t> first(groups * experts);  // row of the first pair of every group and expert
  int64_t next = 0;
  for (int64_t e = 0; e < experts; ++e) {
    if (padded_rows >= 0) next = e * padded_rows;
    for (int64_t g = 0; g < groups; ++g) {
      first[g * experts + e] = next;
      next += taken[g * experts + e];
      count[e] += taken[g * experts + e];
    }
  }
  const int64_t rows = padded_rows >= 0 ? experts * padded_rows : num_rows >= 0 ? num_rows : next;
  Tensor position = at::empty_like(expert), pair = at::zeros({rows}, expert.options());
  Tensor vacant = at::empty({padded_rows >= 0 ? rows : 0}, keep.options());
  int64_t *to = position.mutable_data_ptr<int64_t>(), *pairs = pair.mutable_data_ptr<int64_t>();
  const int64_t *chosen = expert.const_data_ptr<int64_t>(), *place = slot.const_data_ptr<int64_t>();
  const bool* stays = keep.const_data_ptr<bool>();
  std::atomic<bool> fits{true};
  at::parallel_for(0, expert.size(0), 1 << 12, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t* start = first.data() + (groups == 1 ? 0 : t / group_size * experts);
      for (int64_t n = t * top_k; n < (t + 1) * top_k; ++n) {
        to[n] = stays[n] ? start[chosen[n]] + place[n] : 0;
        if (!stays[n]) continue;
        if (to[n] < rows)
          pairs[to[n]] = n;
        else
          fits = false;
      }
    }
  });
  TORCH_CHECK_INDEX(fits, "moe_plan: more pairs are kept than the ", rows, " rows hold");
  bool* free = vacant.mutable_data_ptr<bool>();
  for (int64_t row = 0; row < vacant.numel(); ++row) free[row] = row % padded_rows >= count[row / padded_rows];
  return {position, pair, vacant, counts};
}

}  // namespace swin_moe

TORCH_LIBRARY_FRAGMENT(swin_moe, m) {
  m.def(
      "moe_plan(Tensor expert, Tensor slot, Tensor keep, Tensor kept, SymInt group_size, SymInt num_rows, SymInt "
      "padded_rows) -> (Tensor position, Tensor pair, Tensor vacant, Tensor counts)");
}

TORCH_LIBRARY_IMPL(swin_moe, CPU, m) { m.impl("moe_plan", &swin_moe::moe_plan_cpu); }
