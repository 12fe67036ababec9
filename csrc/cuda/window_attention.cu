// The entry points of window attention: the element's table is asked for a kernel.
#include "window_variants.h"

namespace swin_moe {
namespace {

const ForwardVariant* find_forward(const WindowLaunch& p) {
  if (!countable(p)) return nullptr;
  switch (CudaElement(p.element)) {
    case CudaElement::kFloat32: return find_forward_fp32(p);
    case CudaElement::kBFloat16: return find_forward_bf16(p);
    case CudaElement::kFloat16: return find_forward_fp16(p);
  }
  return nullptr;
}

const BackwardVariant* find_backward(const WindowLaunch& p) {
  if (!countable(p)) return nullptr;
  switch (CudaElement(p.element)) {
    case CudaElement::kFloat32: return find_backward_fp32(p);
    case CudaElement::kBFloat16: return find_backward_bf16(p);
    case CudaElement::kFloat16: return find_backward_fp16(p);
  }
  return nullptr;
}

}  // namespace
}  // namespace swin_moe

using swin_moe::WindowLaunch;

size_t swin_moe_window_workspace(const WindowLaunch* launch) {
  const auto* variant = swin_moe::find_backward(*launch);
  return variant ? swin_moe::Workspace(*launch, variant->plan(*launch)).bytes : 0;
}

int swin_moe_window_needs_log_sums(const WindowLaunch* launch) {
  const auto* variant = swin_moe::find_backward(*launch);
  return variant && variant->shared_bytes;
}

cudaError_t swin_moe_window_forward(const WindowLaunch* launch, cudaStream_t stream) {
  const auto* variant = swin_moe::find_forward(*launch);
  return variant ? variant->run(*launch, stream) : cudaErrorInvalidValue;
}

cudaError_t swin_moe_window_backward(const WindowLaunch* launch, cudaStream_t stream) {
  const auto* variant = swin_moe::find_backward(*launch);
  return variant ? variant->run(*launch, stream) : cudaErrorInvalidValue;
}
