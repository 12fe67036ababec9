// What the operators of packed layers ask of their arguments, and how rows are divided among threads.
#include "packed_arguments.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "capability.h"

namespace swin_moe {

using at::Tensor;

namespace {

const PackedKernels* all_kernels() {
#if defined(SWIN_MOE_X86_KERNELS)
  static const PackedKernels* chosen =
      of_capability(packed_kernels_default, packed_kernels_avx2, packed_kernels_avx512_bf16);
  return chosen;
#else
  return packed_kernels_default();
#endif
}

Element element_of(at::ScalarType type) {
  switch (type) {
    case at::kDouble: return Element::kFloat64;
    case at::kFloat: return Element::kFloat32;
    case at::kBFloat16: return Element::kBFloat16;
    case at::kHalf: return Element::kFloat16;
    default: TORCH_CHECK_TYPE(false, "packed layers are float64, float32, bfloat16 or float16, got ", type);
  }
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

}  // namespace

const PackedKernels& kernels_of(at::ScalarType type) { return all_kernels()[int(element_of(type))]; }

const Int8Kernels& int8_kernels() {
#if defined(SWIN_MOE_X86_KERNELS)
  switch (cpu_capability()) {
    case Capability::kAvx2: return has_byte_products() ? int8_kernels_avx_vnni() : int8_kernels_avx2();
    case Capability::kAvx512Bf16: return int8_kernels_avx512();
    default: break;
  }
#endif
  return int8_kernels_default();
}

at::ScalarType accumulated(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

int64_t whole_vectors(int64_t count, at::ScalarType type) {
  const int64_t lanes = kernels_of(type).vector_lanes;
  return (count + lanes - 1) / lanes * lanes;
}

const void* vector_of(const OptionalTensor& given, int64_t experts, int64_t count, at::ScalarType type,
                      const char* name) {
  if (!given) return nullptr;
  TORCH_CHECK_VALUE(given->dim() == 2 && given->size(0) == experts && given->size(1) == whole_vectors(count, type) &&
                        given->scalar_type() == accumulated(type) && given->is_contiguous(),
                    "packed layers: ", name, " must be what pack_vectors makes of (", experts, ", ", count, "), got ",
                    given->sizes(), " in ", given->scalar_type());
  return given->const_data_ptr();
}

PackedMatrix matrix_of(const Tensor& packed, const OptionalTensor& bias, int64_t inputs, int64_t outputs,
                       at::ScalarType type) {
  const bool int8 = packed.scalar_type() == at::kChar;
  const int64_t bytes = (int8 ? int8_kernels().packed_bytes : kernels_of(type).packed_bytes)(outputs, inputs);
  TORCH_CHECK_VALUE((int8 || packed.scalar_type() == at::kByte) && packed.dim() == 2 && packed.size(1) == bytes &&
                        packed.is_contiguous(),
                    "packed layers: a weight must be what pack_matrices makes of (E, ", outputs, ", ", inputs,
                    "), got ", packed.sizes());
  TORCH_CHECK_TYPE(!int8 || type != at::kDouble, "packed layers: rows of int8 products are float32, bfloat16 or float16");
  return {packed.const_data_ptr(), vector_of(bias, packed.size(0), outputs, type, "a bias"), inputs, outputs, int8};
}

RowNorm norm_of(const OptionalTensor& weight, const OptionalTensor& bias, int64_t count, double eps,
                at::ScalarType type, const char* name) {
  TORCH_CHECK_VALUE(weight.has_value() == bias.has_value(), "packed layers: a norm has a weight and a bias");
  return {vector_of(weight, 1, count, type, name), vector_of(bias, 1, count, type, name), eps};
}

void run_rows(const PackedLayers& layers, const std::vector<int64_t>& counts, at::ScalarType type) {
  const auto tasks = divide(counts);
  const auto run = layers.first.int8 ? int8_kernels().run[int(element_of(type))] : kernels_of(type).run;
  at::parallel_for(0, int64_t(tasks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t number = begin; number < end; ++number) run(layers, tasks[number]);
  });
}

}  // namespace swin_moe
