// The kernels of packed layers for any processor: vectors of 16 bytes.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>

#include "products/packed_layers.h"

#define SWIN_MOE_CAPABILITY with_default
#define SWIN_MOE_VECTOR_BYTES 16
#define SWIN_MOE_VECTOR_REGISTERS 16
#include "packed_kernels.h"

const swin_moe::PackedKernels* swin_moe::packed_kernels_default() {
  return with_default::packed_kernels_by_element<with_default::Numbers<float>>();
}
