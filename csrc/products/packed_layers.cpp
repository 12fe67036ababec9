// The operators of packed layers (inference on the CPU): schemas, and what is refused.
#include "packed_arguments.h"
#include "memory/packed_memory.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

namespace swin_moe {
namespace {

using at::Tensor;

Tensor pack_matrices(const Tensor& weight) {
  TORCH_CHECK_VALUE(weight.dim() == 3, "pack_matrices: weight must be (E, O, I), got ", weight.sizes());
  const auto& kernels = kernels_of(weight.scalar_type());
  const Tensor given = weight.contiguous();
  const int64_t experts = given.size(0), outputs = given.size(1), inputs = given.size(2);
  const int64_t bytes = kernels.packed_bytes(outputs, inputs);
  Tensor packed = packed_memory(experts, bytes);
  for (int64_t expert = 0; expert < experts; ++expert)
    kernels.pack(static_cast<const char*>(given.const_data_ptr()) + expert * outputs * inputs * given.element_size(),
                 outputs, inputs, static_cast<uint8_t*>(packed.mutable_data_ptr()) + expert * bytes);
  return packed;
}

Tensor pack_int8_matrices(const Tensor& weight) {
  TORCH_CHECK_VALUE(weight.dim() == 3 && weight.scalar_type() == at::kFloat,
                    "pack_int8_matrices: weight must be (E, O, I) in Float, got ", weight.sizes(), " in ",
                    weight.scalar_type());
  const Tensor given = weight.contiguous();
  const int64_t experts = given.size(0), outputs = given.size(1), inputs = given.size(2);
  TORCH_CHECK_VALUE(inputs <= kMostInt8Inputs, "pack_int8_matrices: 32 bits hold sums of ", kMostInt8Inputs,
                    " products, the weight has ", inputs, " inputs");
  const auto& kernels = int8_kernels();
  const int64_t bytes = kernels.packed_bytes(outputs, inputs);
  Tensor packed = packed_memory(experts, bytes).view(at::kChar);
  for (int64_t expert = 0; expert < experts; ++expert)
    kernels.pack(given.const_data_ptr<float>() + expert * outputs * inputs, outputs, inputs,
                 static_cast<int8_t*>(packed.mutable_data_ptr()) + expert * bytes);
  return packed;
}

Tensor pack_vectors(const Tensor& vectors, at::ScalarType type) {
  TORCH_CHECK_VALUE(vectors.dim() == 2, "pack_vectors: vectors must be (E, n), got ", vectors.sizes());
  Tensor packed = at::zeros({vectors.size(0), whole_vectors(vectors.size(1), type)},
                            vectors.options().dtype(accumulated(type)));
  packed.narrow(1, 0, vectors.size(1)).copy_(vectors);
  return packed;
}

// Sets where rows come from and returns the sizes of the result without its last.
std::vector<int64_t> set_source(PackedLayers& p, const Tensor& x, at::IntArrayRef patch, bool merged) {
  if (patch.empty() && !merged) {
    TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) == p.first.inputs, "packed_layers: x must be (..., ", p.first.inputs,
                      "), got ", x.sizes());
    p.source = RowSource::kRows;
    return x.sizes().slice(0, x.dim() - 1).vec();
  }
  TORCH_CHECK_VALUE(x.dim() == 4, "packed_layers: x must have four dims, got ", x.sizes());
  if (merged) {
    p.source = RowSource::kMerged;
    p.height = x.size(1), p.width = x.size(2), p.channels = x.size(3);
    p.rows_of_image = (p.height + 1) / 2, p.columns_of_image = (p.width + 1) / 2;
    TORCH_CHECK_VALUE(4 * p.channels == p.first.inputs, "packed_layers: merged rows have ", 4 * p.channels,
                      " channels, the weight ", p.first.inputs, " inputs");
  } else {
    TORCH_CHECK_VALUE(patch.size() == 4 && *std::min_element(patch.begin(), patch.end()) > 0,
                      "packed_layers: patch must be (height, width, rows, columns), all > 0, got ", patch);
    p.source = RowSource::kPatches;
    p.channels = x.size(1), p.height = x.size(2), p.width = x.size(3);
    p.patch_h = patch[0], p.patch_w = patch[1], p.rows_of_image = patch[2], p.columns_of_image = patch[3];
    TORCH_CHECK_VALUE(p.channels * p.patch_h * p.patch_w == p.first.inputs, "packed_layers: patches have ",
                      p.channels * p.patch_h * p.patch_w, " pixels, the weight ", p.first.inputs, " inputs");
  }
  return {x.size(0), p.rows_of_image, p.columns_of_image};
}

std::vector<int64_t> rows_of_experts(const OptionalTensor& counts, int64_t experts, int64_t rows) {
  if (!counts) {
    TORCH_CHECK_VALUE(experts == 1, "packed_layers: counts must be given for ", experts, " experts");
    return {rows};
  }
  TORCH_CHECK_VALUE(counts->scalar_type() == at::kLong && counts->dim() == 1 && counts->size(0) == experts,
                    "packed_layers: counts must be (", experts, ",) int64, got ", counts->sizes(), " in ",
                    counts->scalar_type());
  const Tensor given = counts->contiguous();
  auto* first = given.const_data_ptr<int64_t>();
  std::vector<int64_t> found(first, first + experts);
  int64_t sum = 0;
  for (int64_t count : found) {
    TORCH_CHECK_VALUE(count >= 0, "packed_layers: counts must be >= 0, got ", count);
    sum += count;
  }
  TORCH_CHECK_VALUE(sum == rows, "packed_layers: counts must add up to the ", rows, " rows, got ", sum);
  return found;
}

Tensor packed_layers_cpu(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                         const OptionalTensor& weight2, const OptionalTensor& bias2, const OptionalTensor& norm_weight,
                         const OptionalTensor& norm_bias, const OptionalTensor& after_weight,
                         const OptionalTensor& after_bias, const OptionalTensor& residual,
                         const OptionalTensor& counts, at::IntArrayRef sizes, double eps, at::IntArrayRef patch,
                         bool merged, at::ScalarType dtype, bool wide) {
  TORCH_CHECK_VALUE(sizes.size() == (weight2 ? 3 : 2) && *std::min_element(sizes.begin(), sizes.end()) > 0,
                    "packed_layers: sizes must be inputs, hidden if there are two weights, and outputs, got ", sizes);
  const auto sums = accumulated(dtype);
  const int64_t experts = weight.size(0), outputs = sizes.back();
  PackedLayers p{};
  p.first = matrix_of(weight, bias, sizes[0], sizes[1], dtype);
  if (weight2) {
    TORCH_CHECK_VALUE(weight2->size(0) == experts, "packed_layers: weights of ", experts, " and ", weight2->size(0),
                      " experts");
    p.second = matrix_of(*weight2, bias2, sizes[1], sizes[2], dtype);
    TORCH_CHECK_VALUE(p.first.int8 == p.second.int8, "packed_layers: both weights are int8, or none");
  }
  TORCH_CHECK_VALUE(x.scalar_type() == sums || x.scalar_type() == dtype, "packed_layers: x must be ", sums, " or ",
                    dtype, ", got ", x.scalar_type());
  const Tensor given = x.contiguous();
  auto out_sizes = set_source(p, given, patch, merged);
  out_sizes.push_back(outputs);
  Tensor out = at::empty(out_sizes, x.options().dtype(wide ? sums : dtype));
  Tensor added;
  if (residual) {
    TORCH_CHECK_VALUE(residual->sizes() == out.sizes() && residual->scalar_type() == sums,
                      "packed_layers: the residual must be ", out.sizes(), " in ", sums, ", got ", residual->sizes(),
                      " in ", residual->scalar_type());
    added = residual->contiguous();
    p.residual = added.const_data_ptr();
  }
  p.accumulated_in = x.scalar_type() == sums;
  p.accumulated_out = wide;
  p.before = norm_of(norm_weight, norm_bias, sizes[0], eps, dtype, "a norm");
  p.after = norm_of(after_weight, after_bias, outputs, eps, dtype, "a norm");
  p.x = given.const_data_ptr();
  p.out = out.mutable_data_ptr();
  run_rows(p, rows_of_experts(counts, experts, out.numel() / outputs), dtype);
  return out;
}

}  // namespace
}  // namespace swin_moe

TORCH_LIBRARY_FRAGMENT(swin_moe, m) {
  m.def("pack_matrices(Tensor weight) -> Tensor");
  m.def("pack_int8_matrices(Tensor weight) -> Tensor");
  m.def("pack_vectors(Tensor vectors, ScalarType dtype) -> Tensor");
  m.def(
      "packed_layers(Tensor x, Tensor weight, Tensor? bias, Tensor? weight2, Tensor? bias2, Tensor? norm_weight, "
      "Tensor? norm_bias, Tensor? after_weight, Tensor? after_bias, Tensor? residual, Tensor? counts, int[] sizes, "
      "float eps, int[] patch, bool merged, ScalarType dtype, bool wide) -> Tensor");
}

TORCH_LIBRARY_IMPL(swin_moe, CPU, m) {
  m.impl("pack_matrices", &swin_moe::pack_matrices);
  m.impl("pack_int8_matrices", &swin_moe::pack_int8_matrices);
  m.impl("pack_vectors", &swin_moe::pack_vectors);
  m.impl("packed_layers", &swin_moe::packed_layers_cpu);
}
