// Bias of each row's expert, GELU and dropout in one pass each way. A thread keeps to its channels and walks down the
// rows of a tile, so that bias, hashes of units and sums of gradients stay in registers.
#include "bias_gelu.h"
#include "row_groups.cuh"

namespace swin_moe {
namespace {

constexpr int kLanes = 16;  // of a row: hidden layers are multiples of 16 vectors
constexpr int kSlots = kRowThreads / kLanes;  // rows at a time
constexpr int64_t kTypicalColumns = kLanes * 8;  // of a tile, in 16 bits
constexpr int kBlocksAtOnce = 4;  // of a multiprocessor: 64 registers a thread; without it sm_100 gets 40, and spills
constexpr int kFoldCells = 32, kFoldSlices = 16;

// Which rows are an expert's.
struct Segments {
  const int32_t* ends;
  int64_t experts, each;
  __device__ __forceinline__ explicit Segments(const BiasGeluLaunch& p)
      : ends(p.ends), experts(p.experts), each(p.experts ? p.rows / p.experts : 0) {}
  __device__ __forceinline__ int64_t end(int64_t expert) const { return ends ? ends[expert] : (expert + 1) * each; }
  __device__ __forceinline__ int64_t begin(int64_t expert) const { return expert ? end(expert - 1) : 0; }
  // The expert of a row; `experts` for rows that belong to none.
  __device__ __forceinline__ int64_t of(int64_t row) const {
    int64_t low = 0, high = experts;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (end(middle) > row)
        high = middle;
      else
        low = middle + 1;
    }
    return low;
  }
};

// Which rows and vectors a thread works on.
template <int Width>
struct Tile {
  int64_t number, first, last, vector, vectors;
  int slot;
  __device__ __forceinline__ Tile(const BiasGeluLaunch& p, int64_t tile_rows, int64_t column_tiles)
      : number(blockIdx.x / column_tiles), first(number * tile_rows),
        last(first + tile_rows < p.rows ? first + tile_rows : p.rows),
        vector(blockIdx.x % column_tiles * kLanes + threadIdx.x % kLanes), vectors(p.channels / Width),
        slot(threadIdx.x / kLanes) {}
  __device__ __forceinline__ bool there() const { return vector < vectors; }
  template <class T>
  __device__ __forceinline__ Elements<T, Width>& at(const void* rows, int64_t row) const {
    return static_cast<Elements<T, Width>*>(const_cast<void*>(rows))[row * vectors + vector];
  }
};

// The draws of a thread's channels: hashes of units are made once, those of rows row by row.
template <int Width, bool kDrops>
struct Draws {
  uint32_t unit[Width];
  RandomKey key;
  __device__ __forceinline__ Draws(const BiasGeluLaunch& p, const Tile<Width>& tile) {
    if constexpr (kDrops) {
      key = split_key(derive_key(p.words, p.draw));
#pragma unroll
      for (int c = 0; c < Width; ++c) unit[c] = hash_unit(key, uint32_t(tile.vector * Width + c));
    }
  }
  __device__ __forceinline__ uint32_t of_row(const BiasGeluLaunch& p, int64_t row) const {
    return kDrops ? hash_row(key, p.numbers[row]) : 0u;
  }
  __device__ __forceinline__ float factor(const BiasGeluLaunch& p, uint32_t row, int c) const {
    if constexpr (!kDrops) return 1.f;
    return is_kept(random_bits(row, unit[c]), p.threshold) ? p.factor : 0.f;
  }
};

__device__ __forceinline__ float normal_share(float x) { return 0.5f * (1.f + erff(x * 0.70710678118654752f)); }

__device__ __forceinline__ float gelu_slope(float x) {
  return normal_share(x) + x * (expf(-0.5f * x * x) * 0.39894228040143268f);
}

template <class T, int Width, bool kGelu, bool kDrops>
__global__ void __launch_bounds__(kRowThreads, kBlocksAtOnce)
    forward_kernel(const BiasGeluLaunch p, int64_t tile_rows, int64_t column_tiles) {
  const Tile<Width> tile(p, tile_rows, column_tiles);
  if (!tile.there()) return;
  const Segments segments(p);
  const Draws<Width, kDrops> draws(p, tile);
  Elements<float, Width> bias{};
  int64_t expert = 0, end = 0;
  for (int64_t row = tile.first + tile.slot; row < tile.last; row += kSlots) {
    if (row >= end && expert < p.experts) {
      expert = segments.of(row);
      if (expert < p.experts) {
        end = segments.end(expert);
        bias = tile.template at<float>(p.bias, expert);
      }
    }
    if (!kGelu && expert == p.experts) return;
    float sums[Width] = {};
    if (expert < p.experts) {
      const auto x = tile.template at<T>(p.x, row);
      const uint32_t hash = draws.of_row(p, row);
#pragma unroll
      for (int c = 0; c < Width; ++c) {
        const float sum = to_float(x.values[c]) + bias.values[c];
        sums[c] = kGelu ? sum * normal_share(sum) * draws.factor(p, hash, c) : sum;
      }
    }
    Elements<T, Width> made;
    round_to(made, sums);
    tile.template at<T>(p.out, row) = made;
  }
}

// What each row slot of a block summed for the same channels, added in order.
template <int Width>
__device__ __forceinline__ void add_slots(const BiasGeluLaunch& p, const Tile<Width>& tile, int64_t expert,
                                          const float (&sums)[Width]) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  constexpr int kColumns = kLanes * Width;
#pragma unroll
  for (int c = 0; c < Width; ++c) shared[tile.slot * kColumns + threadIdx.x % kLanes * Width + c] = sums[c];
  __syncthreads();
  // Number and expert both grow along the rows, so no two pieces of an expert in a tile have the same sum of the two.
  float* partials = p.partials + (tile.number + expert) * p.channels;
  const int64_t first = (tile.vector - threadIdx.x % kLanes) * Width;
  for (int column = threadIdx.x; column < kColumns && first + column < p.channels; column += kRowThreads) {
    float sum = 0.f;
    for (int slot = 0; slot < kSlots; ++slot) sum += shared[slot * kColumns + column];
    partials[first + column] = sum;
  }
  __syncthreads();
}

template <class T, int Width, bool kGelu, bool kDrops>
__global__ void __launch_bounds__(kRowThreads, kBlocksAtOnce)
    backward_kernel(const BiasGeluLaunch p, int64_t tile_rows, int64_t column_tiles) {
  const Tile<Width> tile(p, tile_rows, column_tiles);
  const Segments segments(p);
  const Draws<Width, kDrops> draws(p, tile);
  int64_t from = tile.first;
  while (from < tile.last) {
    const int64_t expert = segments.of(from);
    if (expert == p.experts) break;
    const int64_t end = segments.end(expert), to = end < tile.last ? end : tile.last;
    float sums[Width] = {};
    if (tile.there()) {
      Elements<float, Width> bias{};
      if constexpr (kGelu) bias = tile.template at<float>(p.bias, expert);
      for (int64_t row = from + tile.slot; row < to; row += kSlots) {
        const auto grad = tile.template at<T>(p.grad, row);
        if constexpr (!kGelu) {
#pragma unroll
          for (int c = 0; c < Width; ++c) sums[c] += to_float(grad.values[c]);
        } else {
          const auto x = tile.template at<T>(p.x, row);
          const uint32_t hash = draws.of_row(p, row);
          float grads[Width];
#pragma unroll
          for (int c = 0; c < Width; ++c) {
            const float slope = gelu_slope(to_float(x.values[c]) + bias.values[c]);
            sums[c] += grads[c] = to_float(grad.values[c]) * draws.factor(p, hash, c) * slope;
          }
          Elements<T, Width> made;
          round_to(made, grads);
          tile.template at<T>(p.out, row) = made;
        }
      }
    }
    add_slots<Width>(p, tile, expert, sums);
    from = to;
  }
  if (!kGelu || !tile.there()) return;
  const Elements<T, Width> nothing{};
  for (int64_t row = from + tile.slot; row < tile.last; row += kSlots) tile.template at<T>(p.out, row) = nothing;
}

// A block for 32 channels of an expert: the sums of its tiles, added in a fixed order.
__global__ void __launch_bounds__(kFoldCells* kFoldSlices)
    fold_kernel(const BiasGeluLaunch p, int64_t tile_rows, int64_t column_tiles) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int cell = threadIdx.x % kFoldCells, slice = threadIdx.x / kFoldCells;
  const int64_t expert = blockIdx.x / column_tiles, column = blockIdx.x % column_tiles * kFoldCells + cell;
  const Segments segments(p);
  const int64_t begin = segments.begin(expert), end = segments.end(expert);
  float sum = 0.f;
  if (column < p.channels && begin < end)
#pragma unroll 4
    for (int64_t tile = begin / tile_rows + slice; tile <= (end - 1) / tile_rows; tile += kFoldSlices)
      sum += p.partials[(tile + expert) * p.channels + column];
  shared[slice * kFoldCells + cell] = sum;
  __syncthreads();
  if (slice != 0 || column >= p.channels) return;
  for (int other = 1; other < kFoldSlices; ++other) sum += shared[other * kFoldCells + cell];
  p.grad_bias[expert * p.channels + column] = sum;
}

int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Enough blocks for a device, each with as many rows as that leaves.
int64_t rows_of_tile(int64_t rows, int64_t channels) {
  const int64_t wanted = ceiling(kEnoughBlocks, ceiling(channels, kTypicalColumns));
  return ceiling(ceiling(rows, wanted), kSlots) * kSlots;
}

template <class T, int Width, bool kGelu, bool kDrops>
cudaError_t run(const BiasGeluLaunch& p, bool backward, cudaStream_t stream) {
  const int64_t tile_rows = rows_of_tile(p.rows, p.channels), tiles = swin_moe_bias_gelu_tiles(p.rows, p.channels);
  const int64_t column_tiles = ceiling(p.channels / Width, kLanes);
  if (!backward)
    return launch(forward_kernel<T, Width, kGelu, kDrops>, tiles * column_tiles, kRowThreads, 0, stream, p, tile_rows,
                  column_tiles);
  const cudaError_t error = launch(backward_kernel<T, Width, kGelu, kDrops>, tiles * column_tiles, kRowThreads,
                                   kRowThreads * Width * sizeof(float), stream, p, tile_rows, column_tiles);
  if (error != cudaSuccess) return error;
  const int64_t cells = ceiling(p.channels, kFoldCells);
  return launch(fold_kernel, p.experts * cells, kFoldCells * kFoldSlices, kFoldCells * kFoldSlices * sizeof(float),
                stream, p, tile_rows, cells);
}

template <class T, bool kGelu, bool kDrops>
cudaError_t run_width(const BiasGeluLaunch& p, bool backward, cudaStream_t stream) {
  constexpr int kWidth = 16 / int(sizeof(T));
  const auto addresses = reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.grad) |
                         reinterpret_cast<uintptr_t>(p.out) | reinterpret_cast<uintptr_t>(p.bias);
  const bool whole = p.channels % kWidth == 0 && addresses % 16 == 0;
  return whole ? run<T, kWidth, kGelu, kDrops>(p, backward, stream) : run<T, 1, kGelu, kDrops>(p, backward, stream);
}

template <bool kGelu, bool kDrops>
cudaError_t run_element(const BiasGeluLaunch& p, bool backward, cudaStream_t stream) {
  switch (RowElement(p.element)) {
    case RowElement::kFloat32: return run_width<float, kGelu, kDrops>(p, backward, stream);
    case RowElement::kBFloat16: return run_width<BFloat16, kGelu, kDrops>(p, backward, stream);
    case RowElement::kFloat16: return run_width<Float16, kGelu, kDrops>(p, backward, stream);
    default: return cudaErrorInvalidValue;
  }
}

cudaError_t run_gelu(const BiasGeluLaunch& p, bool backward, cudaStream_t stream) {
  return p.words ? run_element<true, true>(p, backward, stream) : run_element<true, false>(p, backward, stream);
}

}  // namespace
}  // namespace swin_moe

cudaError_t swin_moe_bias_gelu(const swin_moe::BiasGeluLaunch* p, cudaStream_t stream) {
  return swin_moe::run_gelu(*p, false, stream);
}

cudaError_t swin_moe_bias_gelu_backward(const swin_moe::BiasGeluLaunch* p, cudaStream_t stream) {
  return swin_moe::run_gelu(*p, true, stream);
}

cudaError_t swin_moe_expert_bias(const swin_moe::BiasGeluLaunch* p, cudaStream_t stream) {
  return swin_moe::run_element<false, false>(*p, false, stream);
}

cudaError_t swin_moe_expert_bias_gradient(const swin_moe::BiasGeluLaunch* p, cudaStream_t stream) {
  return swin_moe::run_element<false, false>(*p, true, stream);
}

int64_t swin_moe_bias_gelu_tiles(int64_t rows, int64_t channels) {
  return swin_moe::ceiling(rows, swin_moe::rows_of_tile(rows, channels));
}
