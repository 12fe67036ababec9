#include "mixed_rows.h"

#include "capability.h"

namespace swin_moe {

const MixedKernels& mixed_kernels() {
#if defined(SWIN_MOE_X86_KERNELS)
  static const MixedKernels* chosen =
      of_capability(&mixed_kernels_default, &mixed_kernels_avx2, &mixed_kernels_avx512_bf16);
#else
  static const MixedKernels* chosen = mixed_kernels_default();
#endif
  return *chosen;
}

}  // namespace swin_moe
