// Products of few rows: what their kernels are given, without torch. swin_moe/ops/row_products.py says what it is for.
#pragma once

#include <cstdint>

namespace swin_moe {

enum class RowElement : int { kFloat32, kBFloat16 };

// out[row, column] = sum over steps of a[row, step] * b[step, column] (+ bias[column]). Strides count elements; one
// stride of each factor is 1. Sums are float32 and go through the steps in their order.
struct RowProduct {
  int64_t rows, columns, steps;
  const void* a;     // of `element`
  int64_t a_row, a_step;
  const void* b;     // of b_element, converted to `element` as it is read
  int64_t b_step, b_column;
  const void* bias;  // of `element`; null = none
  void* out;         // of out_element: sums are rounded to `element` first; not both others differ from `element`
  int64_t out_row;
  RowElement element, b_element, out_element;
};

// Computes rows [row_begin, row_end) of columns [column_begin, column_end), of which column_begin is a multiple of
// kRowProductColumns. No element depends on how a product is divided.
constexpr int64_t kRowProductColumns = 64;
struct RowProductPart {
  int64_t row_begin, row_end, column_begin, column_end;
};

// out[column] = sum of the rows of a (rows x columns), rows adjacent; both of `element`, sums are float32.
struct RowSum {
  int64_t rows, columns;
  const void* a;
  int64_t a_row;
  void* out;
  RowElement element;
};

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SWIN_MOE_ROW_PRODUCTS 1  // the kernels choose instructions by a pragma of GCC
void row_product_avx2(const RowProduct& product, const RowProductPart& part);
void row_sum_avx2(const RowSum& sum);
void row_product_avx512_bf16(const RowProduct& product, const RowProductPart& part);
void row_sum_avx512_bf16(const RowSum& sum);
#endif

}  // namespace swin_moe
