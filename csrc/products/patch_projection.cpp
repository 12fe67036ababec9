// The gradients of a projection of patches that do not overlap (a convolution whose stride is its kernel): those of a
// linear layer over the patches, which are cut out some at a time and stay in the cache until they are multiplied.
// swin_moe/ops/linear.py says what each argument means.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "row_linear.h"

namespace swin_moe {
namespace {

using at::Tensor;

constexpr int64_t kPatchesAtOnce = 3136;     // of 48 numbers each, which the second-level cache holds
constexpr int64_t kLeastElements = 1 << 14;  // of a task

// Images of contiguous rows and the patches in them.
struct Patches {
  int64_t channels, height, width, rows, columns, patch_height, patch_width, bytes;  // bytes of an element

  int64_t of_image() const { return rows * columns; }
  int64_t numbers() const { return channels * patch_height * patch_width; }

  // Writes the patches of one row of an image.
  void cut_row(const char* image, int64_t row, char* to) const {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = 0; i < patch_height; ++i) {
        const char* line = image + (c * height + row * patch_height + i) * width * bytes;
        cut_line(line, to + (c * patch_height + i) * patch_width * bytes);
      }
  }

 private:
  void cut_line(const char* line, char* to) const {
    const int64_t piece = patch_width * bytes, stride = numbers() * bytes;
    const auto copy = [&](auto size) {
      for (int64_t j = 0; j < columns; ++j) std::memcpy(to + j * stride, line + j * piece, size);
    };
    if (piece == 16) return copy(std::integral_constant<size_t, 16>());
    if (piece == 8) return copy(std::integral_constant<size_t, 8>());
    copy(size_t(piece));
  }
};

// Writes all patches of some images, row by row.
void cut(const Patches& p, const char* images, int64_t count, char* to) {
  const int64_t grain = std::max<int64_t>(kLeastElements / std::max<int64_t>(p.columns * p.numbers(), 1), 1);
  at::parallel_for(0, count * p.rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
      p.cut_row(images + n / p.rows * p.channels * p.height * p.width * p.bytes, n % p.rows,
                to + n * p.columns * p.numbers() * p.bytes);
  });
}

std::tuple<Tensor, Tensor> patch_projection_backward_cpu(const Tensor& grad_, const Tensor& image_,
                                                         const Tensor& weight, std::array<bool, 2> needs) {
  TORCH_CHECK_VALUE(
      grad_.dim() == 4 && image_.dim() == 4 && weight.dim() == 4 && grad_.size(0) == image_.size(0) &&
          grad_.size(1) == weight.size(0) && image_.size(1) == weight.size(1) &&
          grad_.size(2) * weight.size(2) <= image_.size(2) && grad_.size(3) * weight.size(3) <= image_.size(3),
      "patch_projection_backward: grad must be (images, outputs, rows, columns), image (images, channels, height, "
      "width) and weight (outputs, channels, height and width of a patch), got ", grad_.sizes(), ", ", image_.sizes(),
      " and ", weight.sizes());
  TORCH_CHECK_TYPE(grad_.scalar_type() == image_.scalar_type(), "patch_projection_backward: grad and image must be of "
                   "one type, got ", grad_.scalar_type(), " and ", image_.scalar_type());
  const Tensor image = image_.contiguous(), grad = grad_.permute({0, 2, 3, 1}).contiguous();
  const Patches p{image.size(1), image.size(2), image.size(3), grad.size(1), grad.size(2), weight.size(2),
                  weight.size(3), int64_t(image.element_size())};
  const int64_t images = image.size(0), outputs = weight.size(0);
  const int64_t step = std::max<int64_t>(kPatchesAtOnce / std::max<int64_t>(p.of_image(), 1), 1);
  const Tensor rows = at::empty({std::min(step, images) * p.of_image(), p.numbers()}, image.options());
  const auto wide = image.options().dtype(at::kFloat);
  const Tensor like = at::empty({outputs, p.numbers()}, wide);  // not read: sums of 16 bits are rounded once
  Tensor grad_weight = at::empty({0}, wide), grad_bias = at::empty({0}, wide);
  if (needs[0]) grad_weight = at::zeros_like(like);
  if (needs[1]) grad_bias = at::zeros({outputs}, wide);
  for (int64_t first = 0; first < images; first += step) {
    const int64_t count = std::min(step, images - first);
    cut(p, static_cast<const char*>(image.const_data_ptr()) + first * image.stride(0) * p.bytes, count,
        static_cast<char*>(rows.mutable_data_ptr()));
    const auto [_, of_weight, of_bias] =
        row_linear_backward_cpu(grad.slice(0, first, first + count).view({-1, outputs}),
                                rows.slice(0, 0, count * p.of_image()), like, {false, needs[0], needs[1]});
    if (needs[0]) grad_weight.add_(of_weight);
    if (needs[1]) grad_bias.add_(of_bias);
  }
  if (needs[0]) grad_weight = grad_weight.view(weight.sizes());
  return {grad_weight.to(weight.scalar_type()), grad_bias.to(weight.scalar_type())};
}

}  // namespace
}  // namespace swin_moe

TORCH_LIBRARY_FRAGMENT(swin_moe, m) {
  m.def("patch_projection_backward(Tensor grad, Tensor image, Tensor weight, bool[2] needs) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(swin_moe, CPU, m) {
  m.impl("patch_projection_backward", &swin_moe::patch_projection_backward_cpu);
}
