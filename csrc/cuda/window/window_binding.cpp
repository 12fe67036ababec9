// The operators on CUDA tensors: what is refused, memory, device and stream; the kernels are in .cu files without
// torch. Compiled only where torch is a CUDA build.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <limits>
#include <optional>
#include <tuple>

#include "window/window_checks.h"
#include "window/window_shift.h"
#include "cuda/rows/row_launch.h"
#include "window_launch.h"

namespace swin_moe {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

int element_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return int(CudaElement::kFloat32);
    case at::kBFloat16: return int(CudaElement::kBFloat16);
    case at::kHalf: return int(CudaElement::kFloat16);
    default:
      TORCH_CHECK_TYPE(false, "window_attention: qkv must be float32, bfloat16 or float16 on CUDA, got ", type);
  }
}

// Tensors in the form the kernels want, and the pointers to them.
struct WindowInputs {
  Tensor qkv, table, logit_scale, pad;
  WindowLaunch p{};

  explicit WindowInputs(const WindowArguments& a) {
    check_window_attention(a);
    p.element = element_of(a.qkv.scalar_type());
    TORCH_CHECK_VALUE(a.qkv.size(1) * a.qkv.size(2) <= std::numeric_limits<int>::max(),
                      "window_attention: an image must have fewer than 2 ** 31 tokens on CUDA, got ", a.qkv.size(1),
                      " x ", a.qkv.size(2));
    qkv = a.qkv.contiguous();
    table = a.bias_table.to(at::kFloat).contiguous();
    p.geometry = make_geometry(qkv.size(1), qkv.size(2), a.window_h, a.window_w, a.shift_h, a.shift_w);
    p.batch = qkv.size(0);
    p.num_heads = int(a.num_heads);
    p.head_dim = int(qkv.size(3) / 3 / a.num_heads);
    p.scale = float(a.scale);
    p.mask_value = float(a.mask_value);
    TORCH_CHECK_VALUE(p.windows() <= std::numeric_limits<int>::max(),
                      "window_attention: the images of a batch must have fewer than 2 ** 31 windows on CUDA, got ",
                      p.windows());
    p.qkv = qkv.const_data_ptr();
    p.bias_table = table.const_data_ptr<float>();
    if (a.logit_scale) {
      logit_scale = a.logit_scale->to(at::kFloat).contiguous();
      p.logit_scale = logit_scale.const_data_ptr<float>();
    }
    if (a.pad_qkv) {
      pad = a.pad_qkv->contiguous();
      p.pad_qkv = pad.const_data_ptr();
    }
  }
};

// Refuses what no kernel computes with the shared memory of the current device: none that setup.py builds for has so
// little (tests/csrc/window/test_window_shared.py), but PTX runs on any.
void check_shared_memory(const WindowInputs& in, bool backward) {
  const size_t most = swin_moe_window_most_shared();
  TORCH_CHECK_VALUE(swin_moe_window_shared(&in.p, backward, most) > 0, "window_attention: a window of ",
                    in.p.geometry.window_h, " x ", in.p.geometry.window_w, " tokens with ", in.p.head_dim,
                    " channels a head in ", in.qkv.scalar_type(), " needs more shared memory ",
                    backward ? "in backward " : "", "than the ", most, " bytes that a block of this device can have");
}

// Runs the forward; `log_sums` undefined = not wanted.
Tensor run_forward(WindowInputs& in, const Tensor& log_sums) {
  check_shared_memory(in, false);
  const Tensor& qkv = in.qkv;
  Tensor out = at::empty({qkv.size(0), qkv.size(1), qkv.size(2), qkv.size(3) / 3}, qkv.options());
  in.p.out = out.mutable_data_ptr();
  in.p.log_sums = log_sums.defined() ? log_sums.mutable_data_ptr<float>() : nullptr;
  C10_CUDA_CHECK(swin_moe_window_forward(&in.p, c10::cuda::getCurrentCUDAStream()));
  return out;
}

// (windows, heads, tokens); kernels of float32 leave the zeros.
Tensor empty_log_sums(const WindowInputs& in) {
  const at::IntArrayRef shape = {in.p.windows(), in.p.num_heads, in.p.geometry.tokens()};
  const auto options = in.qkv.options().dtype(at::kFloat);
  return in.qkv.scalar_type() == at::kFloat ? at::zeros(shape, options) : at::empty(shape, options);
}

Tensor window_attention_cuda(const Tensor& qkv, const Tensor& bias_table, const OptionalTensor& logit_scale,
                             const OptionalTensor& pad_qkv, int64_t num_heads, int64_t window_h, int64_t window_w,
                             int64_t shift_h, int64_t shift_w, double scale, double mask_value) {
  const c10::cuda::CUDAGuard guard(qkv.device());
  WindowInputs in({qkv, bias_table, logit_scale, pad_qkv, num_heads, window_h, window_w, shift_h, shift_w, scale,
                   mask_value});
  return run_forward(in, {});
}

std::tuple<Tensor, Tensor> window_attention_and_sums_cuda(
    const Tensor& qkv, const Tensor& bias_table, const OptionalTensor& logit_scale, const OptionalTensor& pad_qkv,
    int64_t num_heads, int64_t window_h, int64_t window_w, int64_t shift_h, int64_t shift_w, double scale,
    double mask_value) {
  const c10::cuda::CUDAGuard guard(qkv.device());
  WindowInputs in({qkv, bias_table, logit_scale, pad_qkv, num_heads, window_h, window_w, shift_h, shift_w, scale,
                   mask_value});
  Tensor log_sums = empty_log_sums(in), out = run_forward(in, log_sums);
  return {out, log_sums};
}

// What the forward left, for backward kernels that read it, and the pointers to it; computed again if it is not given.
struct ForwardResults {
  Tensor out, log_sums;

  ForwardResults(WindowInputs& in, const OptionalTensor& given_out, const OptionalTensor& given_sums) {
    if (!swin_moe_window_needs_log_sums(&in.p)) return;
    if (given_out && given_sums) {
      TORCH_CHECK_VALUE(given_out->numel() * 3 == in.qkv.numel() && given_out->scalar_type() == in.qkv.scalar_type(),
                        "window_attention_backward: out must be the forward's (B, H, W, C), got ", given_out->sizes());
      TORCH_CHECK_VALUE(given_sums->numel() == in.p.windows() * in.p.num_heads * in.p.geometry.tokens() &&
                            given_sums->scalar_type() == at::kFloat,
                        "window_attention_backward: log_sums must be the forward's, (windows, heads, tokens) of "
                        "float32, got ", given_sums->sizes());
      out = given_out->contiguous();
      log_sums = given_sums->contiguous();
    } else {
      log_sums = empty_log_sums(in);
      out = run_forward(in, log_sums);
    }
    in.p.out = out.mutable_data_ptr();
    in.p.log_sums = log_sums.mutable_data_ptr<float>();
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> window_attention_backward_cuda(
    const Tensor& grad_out, const Tensor& qkv, const Tensor& bias_table, const OptionalTensor& logit_scale,
    const OptionalTensor& pad_qkv, int64_t num_heads, int64_t window_h, int64_t window_w, int64_t shift_h,
    int64_t shift_w, double scale, double mask_value, const OptionalTensor& out, const OptionalTensor& log_sums) {
  const c10::cuda::CUDAGuard guard(qkv.device());
  WindowInputs in({qkv, bias_table, logit_scale, pad_qkv, num_heads, window_h, window_w, shift_h, shift_w, scale,
                   mask_value});
  check_gradient(grad_out, qkv);
  check_shared_memory(in, true);
  const ForwardResults forward(in, out, log_sums);
  const auto sums = qkv.options().dtype(at::kFloat);
  Tensor grad = grad_out.contiguous();
  Tensor grad_qkv = at::empty_like(in.qkv, at::MemoryFormat::Contiguous);
  Tensor grad_table = at::empty(bias_table.sizes(), sums);
  Tensor grad_scale = at::empty({logit_scale ? num_heads : 0}, sums);
  Tensor grad_pad = at::empty({pad_qkv ? qkv.size(3) : 0}, sums);
  auto& p = in.p;
  p.grad_out = grad.const_data_ptr();
  p.grad_qkv = grad_qkv.mutable_data_ptr();
  p.grad_bias_table = grad_table.mutable_data_ptr<float>();
  if (logit_scale) p.grad_logit_scale = grad_scale.mutable_data_ptr<float>();
  if (pad_qkv) p.grad_pad_qkv = grad_pad.mutable_data_ptr<float>();
  Tensor workspace = at::empty({int64_t(swin_moe_window_workspace(&p))}, qkv.options().dtype(at::kByte));
  p.workspace = workspace.mutable_data_ptr();
  C10_CUDA_CHECK(swin_moe_window_backward(&p, c10::cuda::getCurrentCUDAStream()));
  return {grad_qkv, grad_table.to(bias_table.scalar_type()),
          grad_scale.to(logit_scale ? logit_scale->scalar_type() : qkv.scalar_type()), grad_pad.to(qkv.scalar_type())};
}

Tensor window_partition_cuda(const Tensor& x, int64_t window_h, int64_t window_w, int64_t shift_h, int64_t shift_w) {
  const WindowGeometry g = check_partition(x, window_h, window_w, shift_h, shift_w);
  const c10::cuda::CUDAGuard guard(x.device());
  Tensor from = x.contiguous(), out = at::empty({x.size(0) * g.windows(), g.tokens(), x.size(3)}, x.options());
  if (out.numel() > 0)
    C10_CUDA_CHECK(swin_moe_move_windows(from.const_data_ptr(), out.mutable_data_ptr(), &g, x.size(0),
                                         x.size(3) * x.element_size(), 0, c10::cuda::getCurrentCUDAStream()));
  return out;
}

Tensor window_merge_cuda(const Tensor& windows, int64_t batch, int64_t height, int64_t width, int64_t window_h,
                         int64_t window_w, int64_t shift_h, int64_t shift_w) {
  const WindowGeometry g = check_merge(windows, {batch, height, width, window_h, window_w, shift_h, shift_w});
  const c10::cuda::CUDAGuard guard(windows.device());
  Tensor from = windows.contiguous(), out = at::empty({batch, height, width, windows.size(2)}, windows.options());
  if (out.numel() > 0)
    C10_CUDA_CHECK(swin_moe_move_windows(from.const_data_ptr(), out.mutable_data_ptr(), &g, batch,
                                         windows.size(2) * windows.element_size(), 1,
                                         c10::cuda::getCurrentCUDAStream()));
  return out;
}

}  // namespace
}  // namespace swin_moe

TORCH_LIBRARY_IMPL(swin_moe, CUDA, m) {
  m.impl("window_attention", &swin_moe::window_attention_cuda);
  m.impl("window_attention_and_sums", &swin_moe::window_attention_and_sums_cuda);
  m.impl("window_attention_backward", &swin_moe::window_attention_backward_cuda);
  m.impl("window_partition", &swin_moe::window_partition_cuda);
  m.impl("window_merge", &swin_moe::window_merge_cuda);
}
