// The operators of packed layers (inference on the CPU): schemas, what is refused, and how rows are divided.
#include "packed_layers.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "capability.h"

namespace swin_moe {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

const PackedKernels* all_kernels() {
#if defined(SWIN_MOE_X86_KERNELS)
  static const PackedKernels* chosen =
      of_capability(packed_kernels_default, packed_kernels_avx2, packed_kernels_avx512_bf16);
  return chosen;
#else
  return packed_kernels_default();
#endif
}

const PackedKernels& kernels_of(at::ScalarType type) {
  switch (type) {
    case at::kDouble: return all_kernels()[int(Element::kFloat64)];
    case at::kFloat: return all_kernels()[int(Element::kFloat32)];
    case at::kBFloat16: return all_kernels()[int(Element::kBFloat16)];
    case at::kHalf: return all_kernels()[int(Element::kFloat16)];
    default: TORCH_CHECK_TYPE(false, "packed layers are float64, float32, bfloat16 or float16, got ", type);
  }
}

at::ScalarType accumulated(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

int64_t whole_vectors(int64_t count, at::ScalarType type) {
  const int64_t lanes = kernels_of(type).vector_lanes;
  return (count + lanes - 1) / lanes * lanes;
}

// Returns memory for packed weights, read from end to end in every forward: pages of 2 MiB, where the system has
// them and the last one is not mostly empty (3 % of Swin-T in bfloat16 at batch 1).
Tensor packed_memory(int64_t experts, int64_t bytes, const at::TensorOptions& options) {
#if defined(__linux__)
  constexpr int64_t kPage = 2 << 20, kWorthIt = 768 << 10;
  const int64_t used = experts * bytes, whole = (used + kPage - 1) / kPage * kPage;
  if (used % kPage == 0 || used % kPage >= kWorthIt || used >= 8 * kPage) {
    void* data = used ? std::aligned_alloc(kPage, whole) : nullptr;
    if (data) {
      madvise(data, whole, MADV_HUGEPAGE);  // where that is not allowed: as any other
      return at::from_blob(data, {experts, bytes}, [](void* p) { std::free(p); }, options);
    }
  }
#endif
  return at::empty({experts, bytes}, options);
}

Tensor pack_matrices(const Tensor& weight) {
  TORCH_CHECK_VALUE(weight.dim() == 3, "pack_matrices: weight must be (E, O, I), got ", weight.sizes());
  const auto& kernels = kernels_of(weight.scalar_type());
  const Tensor given = weight.contiguous();
  const int64_t experts = given.size(0), outputs = given.size(1), inputs = given.size(2);
  const int64_t bytes = kernels.packed_bytes(outputs, inputs);
  Tensor packed = packed_memory(experts, bytes, given.options().dtype(at::kByte));
  for (int64_t expert = 0; expert < experts; ++expert)
    kernels.pack(static_cast<const char*>(given.const_data_ptr()) + expert * outputs * inputs * given.element_size(),
                 outputs, inputs, static_cast<uint8_t*>(packed.mutable_data_ptr()) + expert * bytes);
  return packed;
}

Tensor pack_vectors(const Tensor& vectors, at::ScalarType type) {
  TORCH_CHECK_VALUE(vectors.dim() == 2, "pack_vectors: vectors must be (E, n), got ", vectors.sizes());
  Tensor packed = at::zeros({vectors.size(0), whole_vectors(vectors.size(1), type)},
                            vectors.options().dtype(accumulated(type)));
  packed.narrow(1, 0, vectors.size(1)).copy_(vectors);
  return packed;
}

const void* vector_of(const OptionalTensor& given, int64_t experts, int64_t count, at::ScalarType type,
                      const char* name) {
  if (!given) return nullptr;
  TORCH_CHECK_VALUE(given->dim() == 2 && given->size(0) == experts && given->size(1) == whole_vectors(count, type) &&
                        given->scalar_type() == accumulated(type) && given->is_contiguous(),
                    "packed_layers: ", name, " must be what pack_vectors makes of (", experts, ", ", count, "), got ",
                    given->sizes(), " in ", given->scalar_type());
  return given->const_data_ptr();
}

PackedMatrix matrix_of(const Tensor& packed, const OptionalTensor& bias, int64_t inputs, int64_t outputs,
                       at::ScalarType type) {
  const int64_t bytes = kernels_of(type).packed_bytes(outputs, inputs);
  TORCH_CHECK_VALUE(packed.scalar_type() == at::kByte && packed.dim() == 2 && packed.size(1) == bytes &&
                        packed.is_contiguous(),
                    "packed_layers: a weight must be what pack_matrices makes of (E, ", outputs, ", ", inputs,
                    "), got ", packed.sizes());
  return {packed.const_data_ptr(), vector_of(bias, packed.size(0), outputs, type, "a bias"), inputs, outputs};
}

// Tasks are whole runs of rows of one expert; the more threads, the shorter. What a row gives does not depend on it.
std::vector<PackedTask> divide(const std::vector<int64_t>& counts) {
  constexpr int64_t kRowsOfTask = 256, kFewestRows = 12;
  std::vector<PackedTask> tasks;
  int64_t begin = 0;
  for (int64_t expert = 0; expert < int64_t(counts.size()); ++expert) {
    const int64_t rows = counts[expert];
    const int64_t fewest = std::min<int64_t>(at::get_num_threads(), (rows + kFewestRows - 1) / kFewestRows);
    const int64_t parts = std::max((rows + kRowsOfTask - 1) / kRowsOfTask, fewest);
    for (int64_t part = 0; part < parts; ++part)
      tasks.push_back({expert, begin + rows * part / parts, begin + rows * (part + 1) / parts, -1});
    begin += rows;
  }
  for (size_t number = 0; number + 1 < tasks.size(); ++number) tasks[number].next_expert = tasks[number + 1].expert;
  return tasks;
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
  p.before = {vector_of(norm_weight, 1, sizes[0], dtype, "norm_weight"),
              vector_of(norm_bias, 1, sizes[0], dtype, "norm_bias"), eps};
  p.after = {vector_of(after_weight, 1, outputs, dtype, "after_weight"),
             vector_of(after_bias, 1, outputs, dtype, "after_bias"), eps};
  TORCH_CHECK_VALUE(!p.before.weight == !p.before.bias && !p.after.weight == !p.after.bias,
                    "packed_layers: a norm has a weight and a bias");
  p.x = given.const_data_ptr();
  p.out = out.mutable_data_ptr();
  const auto tasks = divide(rows_of_experts(counts, experts, out.numel() / outputs));
  auto run = kernels_of(dtype).run;
  at::parallel_for(0, int64_t(tasks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t number = begin; number < end; ++number) run(p, tasks[number]);
  });
  return out;
}

}  // namespace
}  // namespace swin_moe

TORCH_LIBRARY_FRAGMENT(swin_moe, m) {
  m.def("pack_matrices(Tensor weight) -> Tensor");
  m.def("pack_vectors(Tensor vectors, ScalarType dtype) -> Tensor");
  m.def(
      "packed_layers(Tensor x, Tensor weight, Tensor? bias, Tensor? weight2, Tensor? bias2, Tensor? norm_weight, "
      "Tensor? norm_bias, Tensor? after_weight, Tensor? after_bias, Tensor? residual, Tensor? counts, int[] sizes, "
      "float eps, int[] patch, bool merged, ScalarType dtype, bool wide) -> Tensor");
}

TORCH_LIBRARY_IMPL(swin_moe, CPU, m) {
  m.impl("pack_matrices", &swin_moe::pack_matrices);
  m.impl("pack_vectors", &swin_moe::pack_vectors);
  m.impl("packed_layers", &swin_moe::packed_layers_cpu);
}
