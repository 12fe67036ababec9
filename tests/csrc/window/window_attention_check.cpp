// Runs every CPU kernel of window attention on random shapes in buffers of exactly the right size and compares with
// loops in float64; made to be compiled with sanitizers. Usage: window_attention_check CASES. Prints the largest errors.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

#include "window/window_attention.h"

using namespace swin_moe;

namespace {

float from_half(uint16_t bits) {
  int exponent = bits >> 10 & 31;
  float mantissa = float(bits & 1023), sign = bits & 0x8000 ? -1.0f : 1.0f;
  return sign * (exponent ? std::ldexp(1024.0f + mantissa, exponent - 25) : std::ldexp(mantissa, -24));
}

// The nearest of all 16-bit numbers is among the neighbours of the truncated one.
uint16_t to_16_bits(double x, Element type);
double from_16_bits(uint16_t bits, Element type) {
  return type == Element::kFloat16 ? from_half(bits) : std::bit_cast<float>(uint32_t(bits) << 16);
}
uint16_t to_16_bits(double x, Element type) {
  uint16_t low = 0, high = type == Element::kFloat16 ? 0x7bff : 0x7f7f;
  while (high - low > 1) {
    uint16_t middle = (low + high) / 2;
    (from_16_bits(middle, type) <= std::abs(x) ? low : high) = middle;
  }
  double below = std::abs(x) - from_16_bits(low, type), above = from_16_bits(high, type) - std::abs(x);
  return (below <= above ? low : high) | (x < 0 ? 0x8000 : 0);
}

size_t size_of(Element type) { return type == Element::kFloat64 ? 8 : type == Element::kFloat32 ? 4 : 2; }

// A tensor in one of the element types; its buffer ends where the tensor ends, so that reading past it is caught.
struct Buffer {
  Element type;
  size_t count;
  char* data;
  Buffer(Element type, size_t count) : type(type), count(count), data(new char[count * size_of(type)]) {
    std::memset(data, 0xee, count * size_of(type));  // whatever is not written shows
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { delete[] data; }
  double get(size_t i) const {
    if (type == Element::kFloat64) return reinterpret_cast<const double*>(data)[i];
    if (type == Element::kFloat32) return reinterpret_cast<const float*>(data)[i];
    return from_16_bits(reinterpret_cast<const uint16_t*>(data)[i], type);
  }
  void set(size_t i, double x) {
    if (type == Element::kFloat64)
      reinterpret_cast<double*>(data)[i] = x;
    else if (type == Element::kFloat32)
      reinterpret_cast<float*>(data)[i] = float(x);
    else
      reinterpret_cast<uint16_t*>(data)[i] = to_16_bits(x, type);
  }
};

struct Expected {
  std::vector<double> out, grad_qkv, grad_table, grad_scale, grad_pad;
};

// One window and head: its rows of queries, keys and values, and what attention makes of them.
struct ReferenceWindow {
  const WindowAttention& p;
  const int64_t window;
  const int head, n, d;
  std::vector<int64_t> token = {};                              // of the image's batch; -1: padding
  std::vector<double> x[3] = {}, unit[2] = {}, length[2] = {};  // queries, keys, values; of length 1 if scaled
  std::vector<double> go = {}, dx[3] = {};                      // gradients of the output, and of x
  double factor = 1;
  bool scaled = false;

  int64_t channel(int part, int i) const { return int64_t(part) * p.channels + head * d + i; }

  void read(const Buffer& qkv, const Buffer& pad, const Buffer* logit_scale, const Buffer& grad, int64_t image) {
    token.resize(n);
    go.resize(n * d);
    for (int t = 0; t < n; ++t) {
      int64_t source = source_token(p.geometry, window, t);
      token[t] = source == kPadding ? -1 : image * p.geometry.height * p.geometry.width + source;
    }
    for (int part = 0; part < 3; ++part) {
      x[part].resize(n * d);
      dx[part].resize(n * d);
      for (int t = 0; t < n; ++t)
        for (int i = 0; i < d; ++i) {
          int64_t at = channel(part, i);
          x[part][t * d + i] = token[t] < 0 ? pad.get(at) : qkv.get(token[t] * 3 * p.channels + at);
          if (part == 0 && token[t] >= 0) go[t * d + i] = grad.get(token[t] * p.channels + at);
        }
    }
    scaled = logit_scale != nullptr;
    factor = scaled ? logit_scale->get(head) : p.scale;
    for (int part = 0; part < 2; ++part) normalize(part);
  }

  void normalize(int part) {
    unit[part] = x[part];
    length[part].assign(n, 1.0);
    if (!scaled) return;
    for (int t = 0; t < n; ++t) {
      double square = 0;
      for (int i = 0; i < d; ++i) square += x[part][t * d + i] * x[part][t * d + i];
      length[part][t] = std::max(std::sqrt(square), 1e-12);
      for (int i = 0; i < d; ++i) unit[part][t * d + i] /= length[part][t];
    }
  }

  // Row i: scores, softmax, values, and back to what scores, values and the position bias get.
  void attend(int i, const Buffer& table, Expected& e) {
    const WindowGeometry& g = p.geometry;
    double most = -1e300, sum = 0, mean = 0;
    std::vector<double> dot(n), weight(n), dw(n);
    for (int j = 0; j < n; ++j) {
      for (int k = 0; k < d; ++k) dot[j] += unit[0][i * d + k] * unit[1][j * d + k];
      weight[j] = factor * dot[j] + table.get(head * g.table_rows() + bias_row(g, i, j));
      if (seam_side(g, window, i) != seam_side(g, window, j)) weight[j] += p.mask_value;
      most = std::max(most, weight[j]);
    }
    for (int j = 0; j < n; ++j) sum += weight[j] = std::exp(weight[j] - most);
    for (int j = 0; j < n; ++j) {
      weight[j] /= sum;
      for (int k = 0; k < d; ++k) {
        if (token[i] >= 0) e.out[token[i] * p.channels + head * d + k] += weight[j] * x[2][j * d + k];
        dw[j] += go[i * d + k] * x[2][j * d + k];
        dx[2][j * d + k] += weight[j] * go[i * d + k];
      }
      mean += weight[j] * dw[j];
    }
    for (int j = 0; j < n; ++j) {
      double ds = weight[j] * (dw[j] - mean);
      e.grad_table[head * g.table_rows() + bias_row(g, i, j)] += ds;
      if (scaled) e.grad_scale[head] += ds * dot[j];
      for (int k = 0; k < d; ++k) {
        dx[0][i * d + k] += factor * ds * unit[1][j * d + k];
        dx[1][j * d + k] += factor * ds * unit[0][i * d + k];
      }
    }
  }

  // Through the unit lengths, to the rows that were read.
  void give_back(int part, Expected& e) const {
    const bool unscaled = part == 2 || !scaled;
    for (int t = 0; t < n; ++t) {
      double along = 0;
      if (!unscaled && length[part][t] > 1e-12)
        for (int i = 0; i < d; ++i) along += dx[part][t * d + i] * unit[part][t * d + i];
      for (int i = 0; i < d; ++i) {
        double value = dx[part][t * d + i];
        if (!unscaled) value = (value - along * unit[part][t * d + i]) / length[part][t];
        int64_t at = channel(part, i);
        (token[t] < 0 ? e.grad_pad[at] : e.grad_qkv[token[t] * 3 * p.channels + at]) += value;
      }
    }
  }
};

// One window and head as the formulas read: scores, softmax, values, and back.
void reference_window(const WindowAttention& p, const Buffer& qkv, const Buffer& pad, const Buffer& table,
                      const Buffer* logit_scale, const Buffer& grad, int64_t image, int64_t window, int head,
                      Expected& e) {
  const int n = p.geometry.tokens(), d = p.head_dim;
  ReferenceWindow w{p, window, head, n, d};
  w.read(qkv, pad, logit_scale, grad, image);
  for (int i = 0; i < n; ++i) w.attend(i, table, e);
  for (int part = 0; part < 3; ++part) w.give_back(part, e);
}

// ||a - b|| / ||b||, NaN if anything is.
template <class Get>
double error_of(const std::vector<double>& expected, Get get) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    difference += (get(i) - expected[i]) * (get(i) - expected[i]);
    norm += expected[i] * expected[i];
  }
  return std::sqrt(difference) / (std::sqrt(norm) + 1e-3 * std::sqrt(double(expected.size()) + 1));
}

struct Random {
  std::mt19937 engine;
  int pick(std::initializer_list<int> from) { return from.begin()[engine() % from.size()]; }
  double normal() { return std::normal_distribution<double>()(engine); }
};

double check(const WindowKernels& kernels, Element type, int number) {
  Random random{std::mt19937(number)};
  const int wh = random.pick({1, 2, 3, 5, 7, 8}), ww = random.pick({1, 3, 4, 7, 9});
  const int sh = random.pick({0, wh / 2, wh - 1}), sw = random.pick({0, ww / 2});
  const int height = random.pick({wh, 2 * wh, 2 * wh + 1, std::max(1, wh - 1)}), width = random.pick({ww, ww + 1, 3 * ww});
  const int heads = random.pick({1, 2, 3}), d = random.pick({8, 9, 16, 31, 32, 33, 64}), batch = random.pick({1, 2});
  const bool cosine = random.engine() % 2;
  const Element sums = type == Element::kFloat64 ? Element::kFloat64 : Element::kFloat32;
  WindowAttention p{};
  p.geometry = make_geometry(height, width, wh, ww, sh, sw);
  p.batch = batch, p.channels = heads * d, p.num_heads = heads, p.head_dim = d, p.scale = 0.3, p.mask_value = -100;
  const int64_t tokens = int64_t(batch) * height * width, rows = p.geometry.table_rows();
  const int64_t windows = batch * p.geometry.windows();
  Buffer qkv(type, tokens * 3 * p.channels), pad(type, 3 * p.channels), table(sums, heads * rows), scale(sums, heads),
      grad(type, tokens * p.channels), out(type, tokens * p.channels), grad_qkv(type, tokens * 3 * p.channels);
  for (Buffer* buffer : {&qkv, &pad, &table, &grad})
    for (size_t i = 0; i < buffer->count; ++i) buffer->set(i, random.normal());
  for (int h = 0; h < heads; ++h) scale.set(h, 1 + 5 * (h + 1));
  if (number % 5 == 0 && type != Element::kFloat16)  // whose gradients do not reach 1e12
    for (int i = 0; i < d; ++i) qkv.set(i, 0);       // a query without length
  p.qkv = qkv.data, p.pad_qkv = pad.data, p.bias_table = table.data, p.grad_out = grad.data;
  p.out = out.data, p.grad_qkv = grad_qkv.data;
  if (cosine) p.logit_scale = scale.data;
  const int64_t shares = std::min<int64_t>(windows, 3);
  std::vector<double> grad_table(shares * heads * rows), grad_scale(shares * heads), grad_pad(shares * 3 * p.channels);
  p.grad_bias_table = grad_table.data(), p.grad_pad_qkv = grad_pad.data();
  if (cosine) p.grad_logit_scale = grad_scale.data();
  for (int64_t share = 0; share < shares; ++share)
    for (int first = 0; first < heads; first += 2) {  // groups of heads, the last one smaller
      WindowTask task{first, std::min(first + 2, heads), windows * share / shares, windows * (share + 1) / shares, share};
      kernels.forward[int(type)](p, task);
      kernels.backward[int(type)](p, task);
    }
  Expected e;
  e.out.resize(out.count), e.grad_qkv.resize(grad_qkv.count), e.grad_table.resize(heads * rows);
  e.grad_scale.resize(heads), e.grad_pad.resize(3 * p.channels);
  for (int64_t window = 0; window < windows; ++window)
    for (int head = 0; head < heads; ++head)
      reference_window(p, qkv, pad, table, cosine ? &scale : nullptr, grad, window / p.geometry.windows(),
                       window % p.geometry.windows(), head, e);
  auto summed = [&](const std::vector<double>& parts) {
    return [&](size_t i) {
      double sum = 0;
      for (int64_t share = 0; share < shares; ++share) sum += parts[share * (parts.size() / shares) + i];
      return sum;
    };
  };
  const double errors[] = {error_of(e.out, [&](size_t i) { return out.get(i); }),
                           error_of(e.grad_qkv, [&](size_t i) { return grad_qkv.get(i); }),
                           error_of(e.grad_table, summed(grad_table)),
                           cosine ? error_of(e.grad_scale, summed(grad_scale)) : 0.0,
                           error_of(e.grad_pad, summed(grad_pad))};
  double worst = 0;
  for (double error : errors) worst = error <= worst ? worst : error;  // NaN comes through
  return worst;
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 20;
  std::vector<std::pair<const char*, const WindowKernels*>> all = {{"default", &window_kernels_default()}};
#if defined(SWIN_MOE_X86_KERNELS)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) all.emplace_back("avx2", &window_kernels_avx2());
  if (__builtin_cpu_supports("avx512bf16")) all.emplace_back("avx512_bf16", &window_kernels_avx512_bf16());
#endif
  const double limits[] = {1e-12, 2e-4, 1e-2, 2e-3};  // sums that nearly cancel, of single heads, need the room
  const char* names[] = {"float64", "float32", "bfloat16", "float16"};
  bool good = true;
  for (auto [name, kernels] : all)
    for (int type = 0; type < kElements; ++type) {
      double worst = 0;
      for (int number = 0; number < cases; ++number) {
        double error = check(*kernels, Element(type), number);
        if (!(error < limits[type])) std::printf("case %d: %s %s: error %g\n", number, name, names[type], error);
        worst = error <= worst ? worst : error;
      }
      std::printf("%s %s: %d cases, largest error %.1e (allowed %.0e)\n", name, names[type], cases, worst, limits[type]);
      good &= worst < limits[type];
    }
  return good ? 0 : 1;
}
