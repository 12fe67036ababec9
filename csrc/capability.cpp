// Which of the compiled instruction sets this processor has.
#include "capability.h"

#include <c10/util/Exception.h>
#include <torch/library.h>

#include <cstdlib>
#include <string>
#include <vector>

namespace swin_moe {
namespace {

const char* const kNames[] = {"default", "avx2", "avx512_bf16"};

Capability best() {
#if defined(SWIN_MOE_X86_KERNELS)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
      __builtin_cpu_supports("bmi2")) {
    bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                __builtin_cpu_supports("avx512bf16");
    return wide ? Capability::kAvx512Bf16 : Capability::kAvx2;
  }
#endif
  return Capability::kDefault;
}

}  // namespace

Capability cpu_capability() {
  static const Capability chosen = [] {
    const Capability most = best();
    const char* wanted = std::getenv("SWIN_MOE_CPU_CAPABILITY");
    if (!wanted || !*wanted) return most;
    std::string names;
    for (int i = 0; i <= int(most); ++i) {
      if (kNames[i] == std::string(wanted)) return Capability(i);
      names += (i ? ", " : "") + std::string(kNames[i]);
    }
    TORCH_CHECK_VALUE(false, "SWIN_MOE_CPU_CAPABILITY must be one of ", names, " on this processor, got ", wanted);
  }();
  return chosen;
}

std::string name_of_capability() { return kNames[int(cpu_capability())]; }

}  // namespace swin_moe

TORCH_LIBRARY_FRAGMENT(swin_moe, m) { m.def("cpu_capability() -> str", &swin_moe::name_of_capability); }
