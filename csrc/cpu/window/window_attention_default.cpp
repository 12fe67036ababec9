// The kernels of window attention for any processor: vectors of 16 bytes.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>

#include "window/window_attention.h"

#define SWIN_MOE_CAPABILITY with_default
#define SWIN_MOE_VECTOR_BYTES 16
#define SWIN_MOE_VECTOR_REGISTERS 16
#include "window_backward.h"
#include "window_kernels.h"

const swin_moe::WindowKernels& swin_moe::window_kernels_default() {
  static const WindowKernels kernels = with_default::make_window_kernels<with_default::Numbers<float>>();
  return kernels;
}
