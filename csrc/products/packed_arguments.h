// What the operators of packed layers share: which kernels run, what packed tensors must be, how rows are divided.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "packed_layers.h"

namespace swin_moe {

using OptionalTensor = std::optional<at::Tensor>;

// The kernels of factors of a dtype. Raises TypeError for another.
const PackedKernels& kernels_of(at::ScalarType type);

// The kernels of products of whole numbers.
const Int8Kernels& int8_kernels();

// The dtype that sums have where factors have this one.
at::ScalarType accumulated(at::ScalarType type);

int64_t whole_vectors(int64_t count, at::ScalarType type);

// Return pointers to what pack_vectors, pack_matrices and pack_int8_matrices made. Raise ValueError where they are not of
// these sizes.
const void* vector_of(const OptionalTensor& given, int64_t experts, int64_t count, at::ScalarType type,
                      const char* name);
PackedMatrix matrix_of(const at::Tensor& packed, const OptionalTensor& bias, int64_t inputs, int64_t outputs,
                       at::ScalarType type);
RowNorm norm_of(const OptionalTensor& weight, const OptionalTensor& bias, int64_t count, double eps,
                at::ScalarType type, const char* name);

// Runs the kernel on all rows, so many of each expert, which follow each other. What a row gives does not depend on the
// number of threads.
void run_rows(const PackedLayers& layers, const std::vector<int64_t>& counts, at::ScalarType type);

}  // namespace swin_moe
