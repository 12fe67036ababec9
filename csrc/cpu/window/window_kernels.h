// The table of kernels of one translation unit.
#pragma once

#include "window_backward.h"

namespace swin_moe {
namespace SWIN_MOE_CAPABILITY {

// BFloat16Operand: how bfloat16 tensors are multiplied.
template <class BFloat16Operand>
WindowKernels make_window_kernels() {
  return {{forward<double, Numbers<double>>, forward<float, Numbers<float>>, forward<BFloat16, BFloat16Operand>,
           forward<Float16, Numbers<float>>},
          {backward<double, Numbers<double>>, backward<float, Numbers<float>>, backward<BFloat16, BFloat16Operand>,
           backward<Float16, Numbers<float>>}};
}

}  // namespace SWIN_MOE_CAPABILITY
}  // namespace swin_moe
