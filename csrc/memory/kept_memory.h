// Memory of tensors that every training step makes and frees again, kept for the next step.
#pragma once

#include <ATen/core/Tensor.h>

namespace swin_moe {

// Returns an uninitialized CPU tensor in memory that an earlier one of about its size has left, where there is one.
//
// The C library gives large blocks back to the system, and every page of a new one costs a fault: a step of Swin-T in
// bfloat16 has 10,000 (1 image) to 90,000 (8 images) of them. Blocks from 2 MiB on lie in huge pages where the system
// has them. What is kept, idle and in use, is at most twice what was in use at once; the longest idle goes first.
at::Tensor empty_kept(at::IntArrayRef sizes, at::ScalarType dtype);

}  // namespace swin_moe
