// Random draws as operators: schemas and the CPU kernels. swin_moe/ops/random_draws.py says what each argument means.
#include "random_draws.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/cos.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/log.h>

#include <vector>

#include "cpu/clones.h"

namespace swin_moe {
namespace {

using at::Tensor;

constexpr int64_t kLeastElements = 1 << 14;  // of a task

// The hash is integer arithmetic on whole vectors.
SWIN_MOE_CLONES void fill_bits(uint32_t row, const uint32_t* units, int64_t count, uint32_t* out) {
  for (int64_t u = 0; u < count; ++u) out[u] = random_bits(row, units[u]);
}

SWIN_MOE_CLONES void fill_factors(uint32_t row, const uint32_t* units, int64_t count, int32_t threshold, float factor,
                                  float* out) {
  for (int64_t u = 0; u < count; ++u) out[u] = int32_t(random_bits(row, units[u])) >= threshold ? factor : 0.0f;
}

SWIN_MOE_CLONES void scale_floats(const float* x, const float* factors, int64_t count, float* out) {
  for (int64_t u = 0; u < count; ++u) out[u] = x[u] * factors[u];
}

// y = x * factor where the bits reach the threshold, else x * 0, for one row.
template <class T>
void drop_row(const T* x, T* y, int64_t units, uint32_t row, const uint32_t* unit, int32_t least, T factor,
              float* factors) {
  if constexpr (std::is_same_v<T, double>) {
    fill_factors(row, unit, units, least, 1.0f, factors);  // a float would round the factor
    for (int64_t u = 0; u < units; ++u) y[u] = x[u] * (factors[u] != 0.0f ? factor : 0.0);
  } else {
    fill_factors(row, unit, units, least, float(factor), factors);
    if constexpr (std::is_same_v<T, float>)
      scale_floats(x, factors, units, y);
    else
      for (int64_t u = 0; u < units; ++u) y[u] = T(float(x[u]) * factors[u]);
  }
}

std::vector<uint32_t> unit_hashes(RandomKey key, int64_t units) {
  std::vector<uint32_t> hashes(units);
  for (int64_t u = 0; u < units; ++u) hashes[u] = hash_unit(key, uint32_t(u));
  return hashes;
}

int64_t grain(int64_t units) { return std::max<int64_t>(1, kLeastElements / std::max<int64_t>(units, 1)); }

Tensor drop_path_factors_cpu(const Tensor& words, const Tensor& sample, at::ArrayRef<double> rates,
                             at::IntArrayRef purposes, at::ScalarType dtype) {
  constexpr const char* kName = "drop_path_factors";
  check_words(kName, words, sample);
  check_rates(kName, rates, dtype);
  const Tensor samples = sample.contiguous();
  const int64_t blocks = int64_t(rates.size()), batch = sample.size(0);
  Tensor out = at::empty({int64_t(purposes.size()), blocks, batch}, sample.options().dtype(dtype));
  const int64_t* rows = samples.const_data_ptr<int64_t>();
  AT_DISPATCH_FLOATING_TYPES(dtype, kName, [&] {
    scalar_t* factors = out.mutable_data_ptr<scalar_t>();
    for (const int64_t purpose : purposes)
      for (int64_t block = 0; block < blocks; ++block) {
        const RandomKey key = split_key(derive_key(words.const_data_ptr<int64_t>(), {block, purpose, -1}));
        const scalar_t factor = scalar_t(1) / scalar_t(1.0 - rates[block]);
        const int64_t threshold = keep_threshold(rates[block]);
        const uint32_t unit = hash_unit(key, 0);
        for (int64_t b = 0; b < batch; ++b)
          *factors++ = is_kept(random_bits(hash_row(key, rows[b]), unit), threshold) ? factor : scalar_t(0);
      }
  });
  return out;
}

Tensor random_dropout_cpu(const Tensor& x, const Tensor& words, int64_t layer, int64_t purpose, int64_t site,
                          const Tensor& rows, double drop, double scale) {
  constexpr const char* kName = "random_dropout";
  check_words(kName, words, rows);
  check_dropped(kName, x, rows, drop);
  const Tensor in = x.contiguous(), numbers = rows.contiguous();
  Tensor out = at::empty_like(in);
  const int64_t units = x.size(1);
  const RandomKey key = split_key(derive_key(words.const_data_ptr<int64_t>(), {layer, purpose, site}));
  // drop < 1, so the threshold is at most the largest int32 but for rounding, which then keeps nothing.
  const int64_t threshold = keep_threshold(drop);
  const int32_t least = int32_t(std::min<int64_t>(threshold, INT32_MAX));
  const std::vector<uint32_t> unit = unit_hashes(key, units);
  const int64_t* row = numbers.const_data_ptr<int64_t>();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), kName, [&] {
    const scalar_t* from = in.const_data_ptr<scalar_t>();
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    const scalar_t factor = static_cast<scalar_t>(scale);
    at::parallel_for(0, in.size(0), grain(units), [&](int64_t begin, int64_t end) {
      std::vector<float> factors(units);
      for (int64_t n = begin; n < end; ++n)
        drop_row<scalar_t>(from + n * units, to + n * units, units, hash_row(key, row[n]), unit.data(), least, factor,
                           factors.data());
    });
  });
  return out;
}

Tensor random_normal_cpu(const Tensor& words, int64_t layer, int64_t purpose, const Tensor& rows, int64_t units) {
  constexpr const char* kName = "random_normal";
  check_words(kName, words, rows);
  const Tensor numbers = rows.contiguous();
  const int64_t count = rows.size(0), size = count * units;
  // Box-Muller over two draws; logarithm and cosine are PyTorch's, whose last digits the Python form has too.
  Tensor radius = at::empty({count, units}, rows.options().dtype(at::kDouble)), angle = at::empty_like(radius);
  const RandomKey first = split_key(derive_key(words.const_data_ptr<int64_t>(), {layer, purpose, -1}));
  const int64_t* row = numbers.const_data_ptr<int64_t>();
  const std::pair<RandomKey, double*> draws[] = {{first, radius.mutable_data_ptr<double>()},
                                                 {second_key(first), angle.mutable_data_ptr<double>()}};
  for (const auto& [key, out] : draws) {
    const std::vector<uint32_t> unit = unit_hashes(key, units);
    at::parallel_for(0, count, grain(units), [&, key = key, out = out](int64_t begin, int64_t end) {
      std::vector<uint32_t> bits(units);
      for (int64_t n = begin; n < end; ++n) {
        fill_bits(hash_row(key, row[n]), unit.data(), units, bits.data());
        for (int64_t u = 0; u < units; ++u) out[n * units + u] = to_uniform(bits[u]);
      }
    });
  }
  if (size) {
    at::log_(radius);
    radius.mul_(-2.0).sqrt_();
    angle.mul_(2.0 * 3.141592653589793);
    at::cos_(angle);
  }
  return radius.mul_(angle).to(at::kFloat);
}

}  // namespace
}  // namespace swin_moe

TORCH_LIBRARY_FRAGMENT(swin_moe, m) {
  m.def(
      "drop_path_factors(Tensor words, Tensor sample, float[] rates, int[] purposes, ScalarType dtype) -> Tensor");
  m.def(
      "random_dropout(Tensor x, Tensor words, int layer, int purpose, int site, Tensor rows, float drop, float scale) "
      "-> Tensor");
  m.def("random_normal(Tensor words, int layer, int purpose, Tensor rows, int units) -> Tensor");
}

TORCH_LIBRARY_IMPL(swin_moe, CPU, m) {
  m.impl("drop_path_factors", &swin_moe::drop_path_factors_cpu);
  m.impl("random_dropout", &swin_moe::random_dropout_cpu);
  m.impl("random_normal", &swin_moe::random_normal_cpu);
}
