// The operators of window attention: schemas, what is refused, and the CPU kernels behind them.
#include "window_attention.h"

#include <ATen/Parallel.h>
#include <ATen/core/DimVector.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "capability.h"
#include "memory/kept_memory.h"
#include "window_checks.h"

namespace swin_moe {
namespace {

using at::Tensor;

const WindowKernels& kernels() {
#if defined(SWIN_MOE_X86_KERNELS)
  static const WindowKernels& chosen =
      of_capability(window_kernels_default, window_kernels_avx2, window_kernels_avx512_bf16);
  return chosen;
#else
  return window_kernels_default();
#endif
}

Element element_of(at::ScalarType type) {
  switch (type) {
    case at::kDouble: return Element::kFloat64;
    case at::kFloat: return Element::kFloat32;
    case at::kBFloat16: return Element::kBFloat16;
    case at::kHalf: return Element::kFloat16;
    default: TORCH_CHECK_TYPE(false, "window_attention: qkv must be float64, float32, bfloat16 or float16 on the CPU, got ", type);
  }
}

// How the windows and heads are divided among tasks. Never by the number of threads: sums over shares would change.
struct Division {
  int64_t shares, head_groups;

  Division(const WindowAttention& p) {
    constexpr int64_t kTasks = 64;         // enough for as many threads, few enough that starting one is cheap
    constexpr int64_t kLeastWindows = 8;   // of a task: its table is spread out once
    constexpr int64_t kBiasBytes = 384 << 10;  // of the heads of a task, in the second-level cache
    int64_t windows = p.batch * p.geometry.windows();
    shares = std::clamp<int64_t>(windows / kLeastWindows, 1, kTasks);
    int64_t head_bytes = int64_t(p.geometry.tokens()) * p.geometry.tokens() * 4;
    int64_t heads_that_fit = std::max<int64_t>(1, kBiasBytes / head_bytes);
    int64_t for_cache = (p.num_heads + heads_that_fit - 1) / heads_that_fit;
    head_groups = std::min<int64_t>(p.num_heads, std::max(for_cache, kTasks / shares));
  }

  WindowTask task(const WindowAttention& p, int64_t number) const {
    int64_t share = number / head_groups, group = number % head_groups;
    int64_t windows = p.batch * p.geometry.windows();
    return {int(p.num_heads * group / head_groups), int(p.num_heads * (group + 1) / head_groups),
            windows * share / shares, windows * (share + 1) / shares, share};
  }
};

void run(WindowKernel kernel, const WindowAttention& p, const Division& division) {
  if (p.batch == 0) return;
  at::parallel_for(0, division.shares * division.head_groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t number = begin; number < end; ++number) kernel(p, division.task(p, number));
  });
}

// Tensors in the form the kernels want, and the pointers to them.
struct Inputs {
  Tensor qkv, table, logit_scale, pad;
  WindowAttention p{};
  at::ScalarType accumulated;

  Inputs(const WindowArguments& a) {
    check_window_attention(a);
    qkv = a.qkv.contiguous();
    accumulated = qkv.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    table = a.bias_table.to(accumulated).t().contiguous();
    p.geometry = make_geometry(qkv.size(1), qkv.size(2), a.window_h, a.window_w, a.shift_h, a.shift_w);
    p.batch = qkv.size(0);
    p.channels = qkv.size(3) / 3;
    p.num_heads = a.num_heads;
    p.head_dim = p.channels / a.num_heads;
    p.scale = a.scale;
    p.mask_value = a.mask_value;
    p.qkv = qkv.const_data_ptr();
    p.bias_table = table.const_data_ptr();
    if (a.logit_scale) {
      logit_scale = a.logit_scale->to(accumulated).contiguous();
      p.logit_scale = logit_scale.const_data_ptr();
    }
    if (padded()) {
      pad = a.pad_qkv ? a.pad_qkv->contiguous() : at::zeros({qkv.size(3)}, qkv.options());
      p.pad_qkv = pad.const_data_ptr();
    }
  }

  bool padded() const {
    return p.geometry.rows * p.geometry.window_h != p.geometry.height ||
           p.geometry.columns * p.geometry.window_w != p.geometry.width;
  }
  at::TensorOptions sums() const { return qkv.options().dtype(at::kDouble); }
};

// The sum over shares (dim 0) in their order, whatever the number of threads.
Tensor sum_of_shares(const Tensor& parts, at::ScalarType type) {
  if (parts.size(0) == 0) return at::zeros(parts.sizes().slice(1), parts.options().dtype(type));
  const int64_t shares = parts.size(0), size = parts.numel() / shares;
  Tensor sum = parts[0].clone();
  double* to = sum.mutable_data_ptr<double>();
  const double* from = parts.const_data_ptr<double>();
  for (int64_t share = 1; share < shares; ++share)  // small: operators took 0.4 % of a step
    for (int64_t i = 0; i < size; ++i) to[i] += from[share * size + i];
  return sum.to(type);
}

Tensor window_attention_cpu(const Tensor& qkv, const Tensor& bias_table, const std::optional<Tensor>& logit_scale,
                            const std::optional<Tensor>& pad_qkv, int64_t num_heads, int64_t window_h,
                            int64_t window_w, int64_t shift_h, int64_t shift_w, double scale, double mask_value) {
  Inputs in({qkv, bias_table, logit_scale, pad_qkv, num_heads, window_h, window_w, shift_h, shift_w, scale, mask_value});
  auto element = element_of(qkv.scalar_type());
  const bool keeps = qkv.scalar_type() == at::kBFloat16;
  const at::DimVector sizes{qkv.size(0), qkv.size(1), qkv.size(2), in.p.channels};
  Tensor out = keeps ? empty_kept(sizes, at::kBFloat16) : at::empty(sizes, qkv.options());
  in.p.out = out.mutable_data_ptr();
  run(kernels().forward[int(element)], in.p, Division(in.p));
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> window_attention_backward_cpu(
    const Tensor& grad_out, const Tensor& qkv, const Tensor& bias_table, const std::optional<Tensor>& logit_scale,
    const std::optional<Tensor>& pad_qkv, int64_t num_heads, int64_t window_h, int64_t window_w, int64_t shift_h,
    int64_t shift_w, double scale, double mask_value, const std::optional<Tensor>&, const std::optional<Tensor>&) {
  Inputs in({qkv, bias_table, logit_scale, pad_qkv, num_heads, window_h, window_w, shift_h, shift_w, scale, mask_value});
  check_gradient(grad_out, qkv);
  auto element = element_of(qkv.scalar_type());
  Tensor grad = grad_out.contiguous();
  const bool keeps = in.qkv.scalar_type() == at::kBFloat16;
  Tensor grad_qkv = keeps ? empty_kept(in.qkv.sizes(), at::kBFloat16) : at::empty_like(in.qkv);
  Division division(in.p);
  Tensor grad_table = at::zeros({division.shares, num_heads, bias_table.size(0)}, in.sums());
  Tensor grad_scale = at::zeros({division.shares, logit_scale ? num_heads : 0}, in.sums());
  Tensor grad_pad = at::zeros({division.shares, in.padded() ? qkv.size(3) : 0}, in.sums());
  in.p.grad_out = grad.const_data_ptr();
  in.p.grad_qkv = grad_qkv.mutable_data_ptr();
  in.p.grad_bias_table = grad_table.mutable_data_ptr<double>();
  if (logit_scale) in.p.grad_logit_scale = grad_scale.mutable_data_ptr<double>();
  if (in.padded()) in.p.grad_pad_qkv = grad_pad.mutable_data_ptr<double>();
  run(kernels().backward[int(element)], in.p, division);
  Tensor grad_of_pad = at::zeros({pad_qkv ? qkv.size(3) : 0}, qkv.options());
  if (pad_qkv && in.padded()) grad_of_pad = sum_of_shares(grad_pad, qkv.scalar_type());
  return {grad_qkv, sum_of_shares(grad_table, bias_table.scalar_type()).t().contiguous(),
          sum_of_shares(grad_scale, logit_scale ? logit_scale->scalar_type() : qkv.scalar_type()), grad_of_pad};
}

}  // namespace
}  // namespace swin_moe

TORCH_LIBRARY_FRAGMENT(swin_moe, m) {
  m.def(
      "window_attention(Tensor qkv, Tensor bias_table, Tensor? logit_scale, Tensor? pad_qkv, int num_heads, "
      "int window_h, int window_w, int shift_h, int shift_w, float scale, float mask_value) -> Tensor");
  m.def(
      "window_attention_and_sums(Tensor qkv, Tensor bias_table, Tensor? logit_scale, Tensor? pad_qkv, int num_heads, "
      "int window_h, int window_w, int shift_h, int shift_w, float scale, float mask_value) -> (Tensor, Tensor)");
  m.def(
      "window_attention_backward(Tensor grad_out, Tensor qkv, Tensor bias_table, Tensor? logit_scale, "
      "Tensor? pad_qkv, int num_heads, int window_h, int window_w, int shift_h, int shift_w, float scale, "
      "float mask_value, Tensor? out=None, Tensor? log_sums=None) -> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(swin_moe, CPU, m) {
  m.impl("window_attention", &swin_moe::window_attention_cpu);
  m.impl("window_attention_backward", &swin_moe::window_attention_backward_cpu);
}
