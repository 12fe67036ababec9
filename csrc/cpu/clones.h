// Functions compiled for what the processor has, chosen when the library is loaded.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SWIN_MOE_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define SWIN_MOE_CLONES
#endif

// Of what such a function calls, to be compiled as the function is.
#define SWIN_MOE_INLINED inline __attribute__((always_inline))
