// moe_plan on CUDA tensors. Compiled only where torch is a CUDA build.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

#include "moe/moe_plan.h"
#include "cuda/devices.h"
#include "plan_launch.h"

namespace swin_moe {
namespace {

using at::Tensor;

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_plan_cuda(const Tensor& expert_, const Tensor& slot_,
                                                         const Tensor& keep_, const Tensor& kept_, int64_t group_size,
                                                         int64_t num_rows, int64_t padded_rows) {
  check_plan(expert_, slot_, keep_, kept_, group_size);
  check_one_device("moe_plan", "a routing", expert_, {slot_, keep_, kept_});
  const c10::cuda::CUDAGuard guard(expert_.device());
  const Tensor expert = expert_.contiguous(), slot = slot_.contiguous(), keep = keep_.contiguous();
  const Tensor kept = kept_.contiguous();
  const int64_t experts = kept.size(1);
  int64_t rows = padded_rows >= 0 ? experts * padded_rows : num_rows;
  if (rows < 0) rows = kept.sum().item<int64_t>();  // the caller asked to wait
  Tensor position = at::empty_like(expert), pair = at::zeros({rows}, expert.options());
  Tensor vacant = at::empty({padded_rows >= 0 ? rows : 0}, keep.options());
  Tensor counts = at::empty({experts}, kept.options()), first = at::empty_like(kept);
  PlanLaunch p{};
  p.expert = expert.const_data_ptr<int64_t>();
  p.slot = slot.const_data_ptr<int64_t>();
  p.keep = keep.const_data_ptr<bool>();
  p.kept = kept.const_data_ptr<int64_t>();
  p.position = position.mutable_data_ptr<int64_t>();
  p.pair = pair.mutable_data_ptr<int64_t>();
  p.vacant = padded_rows >= 0 ? vacant.mutable_data_ptr<bool>() : nullptr;
  p.counts = counts.mutable_data_ptr<int64_t>();
  p.first = first.mutable_data_ptr<int64_t>();
  p.pairs = expert.numel();
  p.top_k = expert.size(1);
  p.groups = kept.size(0);
  p.experts = experts;
  p.group_size = group_size;
  p.rows = rows;
  p.padded_rows = padded_rows;
  C10_CUDA_CHECK(swin_moe_plan(&p, c10::cuda::getCurrentCUDAStream()));
  return {position, pair, vacant, counts};
}

}  // namespace
}  // namespace swin_moe

TORCH_LIBRARY_IMPL(swin_moe, CUDA, m) { m.impl("moe_plan", &swin_moe::moe_plan_cuda); }
