// The entry points of window attention: the element's table is asked for a kernel.
#include "cuda/warp.cuh"
#include "window_variants.h"

namespace swin_moe {
namespace {

const ForwardVariant* find_forward(const WindowLaunch& p, size_t most) {
  if (!countable(p)) return nullptr;
  switch (CudaElement(p.element)) {
    case CudaElement::kFloat32: return find_forward_fp32(p, most);
    case CudaElement::kBFloat16: return find_forward_bf16(p, most);
    case CudaElement::kFloat16: return find_forward_fp16(p, most);
  }
  return nullptr;
}

const BackwardVariant* find_backward(const WindowLaunch& p, size_t most) {
  if (!countable(p)) return nullptr;
  switch (CudaElement(p.element)) {
    case CudaElement::kFloat32: return find_backward_fp32(p, most);
    case CudaElement::kBFloat16: return find_backward_bf16(p, most);
    case CudaElement::kFloat16: return find_backward_fp16(p, most);
  }
  return nullptr;
}

}  // namespace
}  // namespace swin_moe

using swin_moe::WindowLaunch;

size_t swin_moe_window_shared(const WindowLaunch* launch, int backward, size_t most) {
  const auto bytes = [launch](const auto* variant) { return variant ? variant->shared_bytes(*launch) : 0; };
  return backward ? bytes(swin_moe::find_backward(*launch, most)) : bytes(swin_moe::find_forward(*launch, most));
}

size_t swin_moe_window_most_shared() { return swin_moe::most_shared_bytes(); }

size_t swin_moe_window_workspace(const WindowLaunch* launch) {
  const auto* variant = swin_moe::find_backward(*launch, swin_moe::most_shared_bytes());
  return variant ? swin_moe::Workspace(*launch, variant->plan(*launch)).bytes : 0;
}

int swin_moe_window_needs_log_sums(const WindowLaunch* launch) {
  const auto* variant = swin_moe::find_backward(*launch, swin_moe::most_shared_bytes());
  return variant && variant->reads_sums;
}

cudaError_t swin_moe_window_forward(const WindowLaunch* launch, cudaStream_t stream) {
  const auto* variant = swin_moe::find_forward(*launch, swin_moe::most_shared_bytes());
  return variant ? variant->run(*launch, stream) : cudaErrorInvalidValue;
}

cudaError_t swin_moe_window_backward(const WindowLaunch* launch, cudaStream_t stream) {
  const auto* variant = swin_moe::find_backward(*launch, swin_moe::most_shared_bytes());
  return variant ? variant->run(*launch, stream) : cudaErrorInvalidValue;
}
