// The kernel of int8 products for any processor: vectors of 16 bytes, by numbers of 16 bits.
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
#include "packed_int8.h"

const swin_moe::Int8Kernels& swin_moe::int8_kernels_default() { return with_default::int8_kernels(); }
