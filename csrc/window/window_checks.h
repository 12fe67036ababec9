// What the operators of window attention refuse, on every device: one sentence that names the argument, what it was
// and what is allowed.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "window_geometry.h"

namespace swin_moe {

struct WindowArguments {
  const at::Tensor &qkv, &bias_table;
  const std::optional<at::Tensor> &logit_scale, &pad_qkv;
  int64_t num_heads, window_h, window_w, shift_h, shift_w;
  double scale, mask_value;
};

inline void check_window_attention(const WindowArguments& a) {
  const auto& qkv = a.qkv;
  TORCH_CHECK_VALUE(a.num_heads > 0, "window_attention: num_heads must be > 0, got ", a.num_heads);
  TORCH_CHECK_VALUE(qkv.dim() == 4 && qkv.size(3) > 0 && qkv.size(3) % (3 * a.num_heads) == 0 && qkv.size(1) > 0 &&
                        qkv.size(2) > 0,
                    "window_attention: qkv must be (B, H, W, 3C) with H, W > 0 and C a multiple of num_heads = ",
                    a.num_heads, ", got ", qkv.sizes());
  const int64_t head_dim = qkv.size(3) / 3 / a.num_heads;
  TORCH_CHECK_VALUE(kMinHeadDim <= head_dim && head_dim <= kMaxHeadDim, "window_attention: the head dimension must be ",
                    kMinHeadDim, " to ", kMaxHeadDim, ", got ", head_dim);
  TORCH_CHECK_VALUE(0 < a.window_h && 0 < a.window_w && a.window_h <= kMaxWindowTokens &&
                        a.window_w <= kMaxWindowTokens && a.window_h * a.window_w <= kMaxWindowTokens,
                    "window_attention: a window must have 1 to ", kMaxWindowTokens, " tokens, got ", a.window_h, " x ",
                    a.window_w);
  TORCH_CHECK_VALUE(0 <= a.shift_h && a.shift_h < a.window_h && 0 <= a.shift_w && a.shift_w < a.window_w,
                    "window_attention: shifts must be at least 0 and less than the window of ", a.window_h, " x ",
                    a.window_w, ", got ", a.shift_h, ", ", a.shift_w);
  const int64_t rows = (2 * a.window_h - 1) * (2 * a.window_w - 1);
  TORCH_CHECK_VALUE(a.bias_table.dim() == 2 && a.bias_table.size(0) == rows && a.bias_table.size(1) == a.num_heads,
                    "window_attention: bias_table must be (", rows, ", ", a.num_heads, "), got ",
                    a.bias_table.sizes());
  TORCH_CHECK_VALUE(a.bias_table.is_floating_point() && a.bias_table.device() == qkv.device(),
                    "window_attention: bias_table must be floating point on the device of qkv, ", qkv.device());
  if (a.logit_scale)
    TORCH_CHECK_VALUE(a.logit_scale->numel() == a.num_heads && a.logit_scale->dim() == 1 &&
                          a.logit_scale->is_floating_point() && a.logit_scale->device() == qkv.device(),
                      "window_attention: logit_scale must be (", a.num_heads,
                      ",), floating point, on the device of qkv, got ", a.logit_scale->sizes());
  if (a.pad_qkv)
    TORCH_CHECK_VALUE(a.pad_qkv->dim() == 1 && a.pad_qkv->size(0) == qkv.size(3) &&
                          a.pad_qkv->scalar_type() == qkv.scalar_type() && a.pad_qkv->device() == qkv.device(),
                      "window_attention: pad_qkv must be (", qkv.size(3), ",) in the dtype and on the device of qkv (",
                      qkv.scalar_type(), ", ", qkv.device(), "), got ", a.pad_qkv->sizes(), " in ",
                      a.pad_qkv->scalar_type());
}

inline void check_gradient(const at::Tensor& grad_out, const at::Tensor& qkv) {
  TORCH_CHECK_VALUE(grad_out.dim() == 4 && grad_out.size(0) == qkv.size(0) && grad_out.size(1) == qkv.size(1) &&
                        grad_out.size(2) == qkv.size(2) && grad_out.size(3) * 3 == qkv.size(3) &&
                        grad_out.scalar_type() == qkv.scalar_type() && grad_out.device() == qkv.device(),
                    "window_attention_backward: grad_out must be the gradient of the result of qkv ", qkv.sizes(),
                    " in its dtype and on its device, got ", grad_out.sizes(), " in ", grad_out.scalar_type());
}

}  // namespace swin_moe
