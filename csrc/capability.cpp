// Which of the compiled instruction sets this processor has.
#include "capability.h"

#include <c10/util/Exception.h>
#include <torch/library.h>

#include <cstdlib>
#include <string>
#include <vector>

namespace swin_moe {
namespace {

struct Chosen {
  const char* name;
  Capability capability;
  bool byte_products;  // beside AVX2
};

// What this processor has, from the least to the most demanding; sets of AVX-512 without products of bytes are taken for
// AVX2: there is hardly a processor that has its bfloat16 without them.
std::vector<Chosen> supported() {
  std::vector<Chosen> found{{"default", Capability::kDefault, false}};
#if defined(SWIN_MOE_X86_KERNELS)
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
        __builtin_cpu_supports("bmi2")))
    return found;
  found.push_back({"avx2", Capability::kAvx2, false});
  if (__builtin_cpu_supports("avxvnni")) found.push_back({"avx2_vnni", Capability::kAvx2, true});
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"))
    found.push_back({"avx512_bf16", Capability::kAvx512Bf16, false});
#endif
  return found;
}

const Chosen& chosen_one() {
  static const Chosen chosen = [] {
    const std::vector<Chosen> found = supported();
    const char* wanted = std::getenv("SWIN_MOE_CPU_CAPABILITY");
    if (!wanted || !*wanted) return found.back();
    std::string names;
    for (const Chosen& one : found) {
      if (one.name == std::string(wanted)) return one;
      names += (names.empty() ? "" : ", ") + std::string(one.name);
    }
    TORCH_CHECK_VALUE(false, "SWIN_MOE_CPU_CAPABILITY must be one of ", names, " on this processor, got ", wanted);
  }();
  return chosen;
}

}  // namespace

Capability cpu_capability() { return chosen_one().capability; }

bool has_byte_products() { return chosen_one().byte_products; }

// avx2_vnni is avx2 to all but int8 products.
std::string name_of_capability() {
  static const char* const kNames[] = {"default", "avx2", "avx512_bf16"};
  return kNames[int(cpu_capability())];
}

}  // namespace swin_moe

TORCH_LIBRARY_FRAGMENT(swin_moe, m) { m.def("cpu_capability() -> str", &swin_moe::name_of_capability); }
