// The kernels of products of few rows with AVX2 and FMA; bfloat16 is widened as it is read, and multiplied in float32.
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
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#define SWIN_MOE_CAPABILITY rows_with_avx2
#define SWIN_MOE_VECTOR_BYTES 32
#define SWIN_MOE_VECTOR_REGISTERS 16
#define SWIN_MOE_HAS_F16C 1
#include "row_products.h"

namespace swin_moe {

void row_product_avx2(const RowProduct& p, const RowProductPart& part) {
  using namespace rows_with_avx2;
  const bool wide_b = p.b_element == RowElement::kFloat32, wide_out = p.out_element == RowElement::kFloat32;
  if (p.element == RowElement::kFloat32) {
    if (!wide_b) return product_of_part<Numbers<float>, float, BFloat16, float>(p, part);
    if (!wide_out) return product_of_part<Numbers<float>, float, float, BFloat16>(p, part);
    return product_of_part<Numbers<float>, float, float, float>(p, part);
  }
  if (wide_b) return product_of_part<RoundedNumbers, BFloat16, float, BFloat16>(p, part);
  if (wide_out) return product_of_part<Numbers<float>, BFloat16, BFloat16, float>(p, part);
  product_of_part<Numbers<float>, BFloat16, BFloat16, BFloat16>(p, part);
}

void row_sum_avx2(const RowSum& sum) {
  using namespace rows_with_avx2;
  sum.element == RowElement::kFloat32 ? sum_of_rows<float>(sum) : sum_of_rows<BFloat16>(sum);
}

}  // namespace swin_moe
#pragma GCC pop_options
#endif
