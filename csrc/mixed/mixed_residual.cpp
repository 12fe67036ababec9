// The residual sum of bfloat16 maps with drop path, and the gradient of a branch.
// swin_moe/ops/mixed/residual.py says what each argument means and has the reference.
#include "memory/kept_memory.h"
#include "rows_of_half.h"

#include <torch/library.h>

#include <optional>

namespace swin_moe {
namespace {

using at::Tensor;

void check(const char* name, const Tensor& branch, const std::optional<Tensor>& factor) {
  TORCH_CHECK_TYPE(branch.scalar_type() == at::kBFloat16, name, ": maps must be bfloat16, got ", branch.scalar_type());
  TORCH_CHECK_VALUE(!factor || (branch.dim() >= 1 && factor->dim() == 1 && factor->size(0) == branch.size(0) &&
                                factor->scalar_type() == at::kBFloat16),
                    name, ": factor must be (images,) in bfloat16, got ", factor ? factor->sizes() : at::IntArrayRef(),
                    " for ", branch.sizes());
}

// x + factor * branch image by image, or without x factor * branch.
Tensor scaled_sum(const Tensor* x, const Tensor& branch, const std::optional<Tensor>& factor_) {
  const Tensor y = empty_kept(branch.sizes(), at::kBFloat16);
  const int64_t images = factor_ ? branch.size(0) : 1;
  if (y.numel() == 0) return y;
  const int64_t size = branch.numel() / images;
  const Tensor factor = factor_ ? factor_->contiguous() : Tensor();
  const at::BFloat16* factors = factor_ ? factor.const_data_ptr<at::BFloat16>() : nullptr;
  const uint16_t *a = x ? half_data(*x) : nullptr, *b = half_data(branch);
  uint16_t* to = half_data_to_write(y);
  at::parallel_for(0, y.numel(), kLeastElements, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t image = begin / size, count = std::min(end, (image + 1) * size) - begin;
      const float by = factors ? static_cast<float>(factors[image]) : 1.0f;
      mixed_kernels().add_scaled(a ? a + begin : nullptr, b + begin, by, count, to + begin);
      begin += count;
    }
  });
  return y;
}

Tensor mixed_residual_cpu(const Tensor& x, const Tensor& branch, const std::optional<Tensor>& factor) {
  check("mixed_residual", branch, factor);
  TORCH_CHECK_VALUE(x.sizes() == branch.sizes() && x.scalar_type() == at::kBFloat16,
                    "mixed_residual: x must be of the shape and dtype of branch, got ", x.sizes(), " of ",
                    x.scalar_type(), " and ", branch.sizes());
  const Tensor rows = x.contiguous();
  return scaled_sum(&rows, branch.contiguous(), factor);
}

Tensor scaled_images_cpu(const Tensor& x, const Tensor& factor) {
  check("scaled_images", x, factor);
  return scaled_sum(nullptr, x.contiguous(), factor);
}

}  // namespace
}  // namespace swin_moe

TORCH_LIBRARY_FRAGMENT(swin_moe, m) {
  m.def("mixed_residual(Tensor x, Tensor branch, Tensor? factor) -> Tensor");
  m.def("scaled_images(Tensor x, Tensor factor) -> Tensor");
}

TORCH_LIBRARY_IMPL(swin_moe, CPU, m) {
  m.impl("mixed_residual", &swin_moe::mixed_residual_cpu);
  m.impl("scaled_images", &swin_moe::scaled_images_cpu);
}
