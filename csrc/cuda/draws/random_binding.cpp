// drop_path_factors, random_dropout and random_normal on CUDA tensors. Compiled only where torch is a CUDA build.
#include "draws/random_draws.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>

#include "random_draws.h"

namespace swin_moe {
namespace {

using at::Tensor;

// A number as the element type has it.
double rounded(double value, at::ScalarType type) {
  switch (type) {
    case at::kDouble: return value;
    case at::kBFloat16: return double(float(c10::BFloat16(float(value))));
    case at::kHalf: return double(float(c10::Half(float(value))));
    default: return double(float(value));
  }
}

RowElement element_of(at::ScalarType type) {
  switch (type) {
    case at::kDouble: return RowElement::kFloat64;
    case at::kFloat: return RowElement::kFloat32;
    case at::kBFloat16: return RowElement::kBFloat16;
    case at::kHalf: return RowElement::kFloat16;
    default: TORCH_CHECK_TYPE(false, "random_dropout: x must be float64, float32, bfloat16 or float16, got ", type);
  }
}

Tensor drop_path_factors_cuda(const Tensor& words, const Tensor& sample, at::ArrayRef<double> rates,
                              at::IntArrayRef purposes, at::ScalarType dtype) {
  constexpr const char* kName = "drop_path_factors";
  check_words(kName, words, sample);
  check_rates(kName, rates, dtype);
  TORCH_CHECK_VALUE(purposes.size() <= 2, kName, ": at most two purposes");
  const c10::cuda::CUDAGuard guard(sample.device());
  const Tensor samples = sample.contiguous();
  const int64_t blocks = int64_t(rates.size());
  Tensor out = at::empty({int64_t(purposes.size()), blocks, sample.size(0)}, sample.options().dtype(dtype));
  if (out.numel() == 0) return out;
  DropPathLaunch p{};
  p.words = words.const_data_ptr<int64_t>();
  p.sample = samples.const_data_ptr<int64_t>();
  p.out = out.mutable_data_ptr();
  p.batch = sample.size(0);
  p.blocks = blocks;
  p.purposes = int(purposes.size());
  std::copy(purposes.begin(), purposes.end(), p.purpose);
  p.element = int(element_of(dtype));
  for (p.first_block = 0; p.first_block < blocks; p.first_block += kBlocksOfLaunch) {
    p.launch_blocks = int(std::min<int64_t>(kBlocksOfLaunch, blocks - p.first_block));
    for (int own = 0; own < p.launch_blocks; ++own) {
      const double rate = rates[p.first_block + own];
      p.threshold[own] = keep_threshold(rate);
      p.factor[own] = dtype == at::kDouble ? 1.0 / (1.0 - rate) : double(1.0f / float(1.0 - rate));
    }
    C10_CUDA_CHECK(swin_moe_drop_path(&p, c10::cuda::getCurrentCUDAStream()));
  }
  return out;
}

Tensor random_dropout_cuda(const Tensor& x, const Tensor& words, int64_t layer, int64_t purpose, int64_t site,
                           const Tensor& rows, double drop, double scale) {
  constexpr const char* kName = "random_dropout";
  check_words(kName, words, rows);
  check_dropped(kName, x, rows, drop);
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor in = x.contiguous(), numbers = rows.contiguous();
  Tensor out = at::empty_like(in);
  if (out.numel() == 0) return out;
  DropoutLaunch p{};
  p.x = in.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.words = words.const_data_ptr<int64_t>();
  p.rows = numbers.const_data_ptr<int64_t>();
  p.count = x.size(0);
  p.units = x.size(1);
  p.draw = {layer, purpose, site};
  p.threshold = keep_threshold(drop);
  p.factor = rounded(scale, x.scalar_type());
  p.element = int(element_of(x.scalar_type()));
  C10_CUDA_CHECK(swin_moe_random_dropout(&p, c10::cuda::getCurrentCUDAStream()));
  return out;
}

Tensor random_normal_cuda(const Tensor& words, int64_t layer, int64_t purpose, const Tensor& rows, int64_t units) {
  check_words("random_normal", words, rows);
  const c10::cuda::CUDAGuard guard(rows.device());
  const Tensor numbers = rows.contiguous();
  Tensor out = at::empty({rows.size(0), units}, rows.options().dtype(at::kFloat));
  if (out.numel() == 0) return out;
  NormalLaunch p{};
  p.words = words.const_data_ptr<int64_t>();
  p.rows = numbers.const_data_ptr<int64_t>();
  p.out = out.mutable_data_ptr<float>();
  p.count = rows.size(0);
  p.units = units;
  p.draw = {layer, purpose, -1};
  C10_CUDA_CHECK(swin_moe_random_normal(&p, c10::cuda::getCurrentCUDAStream()));
  return out;
}

}  // namespace
}  // namespace swin_moe

TORCH_LIBRARY_IMPL(swin_moe, CUDA, m) {
  m.impl("drop_path_factors", &swin_moe::drop_path_factors_cuda);
  m.impl("random_dropout", &swin_moe::random_dropout_cuda);
  m.impl("random_normal", &swin_moe::random_normal_cuda);
}
