// Memory for packed weights.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace swin_moe {

// Returns (experts, bytes) uint8, not filled. All that is packed while some of it lives lies side by side in pages of
// 2 MiB, where the system has them: a forward reads weights from end to end, and with pages of 4 KiB waits for their
// addresses too.
at::Tensor packed_memory(int64_t experts, int64_t bytes);

}  // namespace swin_moe
