// What this library was compiled for, readable in the file before anything of it runs: it serves one minor version of
// torch only (swin_moe/ops/extension.py looks for it), and of these sources (benchmarks/gpu_machine.py does).
#include <torch/version.h>

#include "source_mark.h"  // written by setup.py: SWIN_MOE_SOURCES, a digest of csrc/

#define SWIN_MOE_TEXT_OF(x) #x
#define SWIN_MOE_TEXT(x) SWIN_MOE_TEXT_OF(x)

extern "C" __attribute__((used, visibility("default"))) const char swin_moe_build_mark[] =
    "swin_moe built for torch " SWIN_MOE_TEXT(TORCH_VERSION_MAJOR) "." SWIN_MOE_TEXT(TORCH_VERSION_MINOR) " from sources " SWIN_MOE_SOURCES;
