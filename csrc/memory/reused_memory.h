// Large tensors in memory that was used before: the first write to fresh memory is a fault of every page, and the C
// library gives blocks back to the system at once. swin_moe/ops/reused_memory.py does the same for weight gradients.
#pragma once

#include <ATen/core/Tensor.h>

namespace swin_moe {

// What at::empty returns, contiguous, on the CPU.
at::Tensor empty_reused(at::IntArrayRef sizes, const at::TensorOptions& options);

}  // namespace swin_moe
