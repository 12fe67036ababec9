// The kernels of a training step in bfloat16 for any processor: vectors of 16 bytes.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#include "mixed/mixed_rows.h"

#define SWIN_MOE_CAPABILITY mixed_with_default
#define SWIN_MOE_VECTOR_BYTES 16
#define SWIN_MOE_VECTOR_REGISTERS 16
#include "mixed_kernels.h"

const swin_moe::MixedKernels* swin_moe::mixed_kernels_default() { return mixed_with_default::mixed_kernels_here(); }
