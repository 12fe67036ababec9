// The kernels of products of few rows with AVX-512 and its bfloat16 dot products.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "products/row_products.h"

#if defined(SWIN_MOE_ROW_PRODUCTS)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,avx2,fma,f16c,bmi,bmi2,prefer-vector-width=512")
#define SWIN_MOE_CAPABILITY rows_with_avx512_bf16
#define SWIN_MOE_VECTOR_BYTES 64
#define SWIN_MOE_VECTOR_REGISTERS 32
#define SWIN_MOE_HAS_F16C 1
#define SWIN_MOE_HAS_AVX512_BF16 1
#include "row_products.h"

namespace swin_moe {

void row_product_avx512_bf16(const RowProduct& p, const RowProductPart& part) {
  using namespace rows_with_avx512_bf16;
  const bool wide_b = p.b_element == RowElement::kFloat32, wide_out = p.out_element == RowElement::kFloat32;
  if (p.element == RowElement::kFloat32) {
    if (!wide_b) return product_of_part<Numbers<float>, float, BFloat16, float>(p, part);
    if (!wide_out) return product_of_part<Numbers<float>, float, float, BFloat16>(p, part);
    return product_of_part<Numbers<float>, float, float, float>(p, part);
  }
  if (wide_b) return product_of_part<Pairs, BFloat16, float, BFloat16>(p, part);
  if (wide_out) return product_of_part<Pairs, BFloat16, BFloat16, float>(p, part);
  product_of_part<Pairs, BFloat16, BFloat16, BFloat16>(p, part);
}

void row_sum_avx512_bf16(const RowSum& sum) {
  using namespace rows_with_avx512_bf16;
  sum.element == RowElement::kFloat32 ? sum_of_rows<float>(sum) : sum_of_rows<BFloat16>(sum);
}

}  // namespace swin_moe
#pragma GCC pop_options
#endif
