// The instruction sets that CPU kernels are compiled for, and the one that runs here.
#pragma once

#include "window/window_attention.h"

namespace swin_moe {

// Sorted from the least to the most demanding.
enum class Capability { kDefault, kAvx2, kAvx512Bf16 };

// The capability of this processor, or the one that SWIN_MOE_CPU_CAPABILITY names; chosen once.
//
// Raises ValueError where that is none of this processor's.
Capability cpu_capability();

// Whether dot products of bytes (AVX-VNNI) may be used beside kAvx2; not where SWIN_MOE_CPU_CAPABILITY says avx2.
bool has_byte_products();

// Returns what of three stands for the capability that runs.
template <class T>
T of_capability(T (*plain)(), T (*avx2)(), T (*avx512_bf16)()) {
  switch (cpu_capability()) {
    case Capability::kAvx2: return avx2();
    case Capability::kAvx512Bf16: return avx512_bf16();
    default: return plain();
  }
}

}  // namespace swin_moe
