// Rows of queries, keys and values between a map and shared memory, and their lengths.
#pragma once

#include <climits>
#include <type_traits>

#include "row_sum.cuh"
#include "window_block.cuh"

namespace swin_moe {

constexpr float kShortest = 1e-12f;                // least length a query or key is divided by, as F.normalize
constexpr float kLargestInverse = 1.f / kShortest;

// Rows of one head in a matrix of an image, of which a token has several parts (queries, keys, values) or one.
template <class T>
struct HeadRows {
  T* image;             // element 0 of the head in token 0
  const T* pad;         // the head of a padding token; null = zeros
  uint32_t stride;      // bytes between tokens
  int part, head_dim;   // elements between parts; of the head
  bool vectors;         // every row is a multiple of 16 aligned bytes

  // 32 bits times 32 bits, which is one instruction; `token` is not negative.
  __device__ __forceinline__ T* at(int token, int column) const {
    using Byte = std::conditional_t<std::is_const_v<T>, const unsigned char, unsigned char>;
    return reinterpret_cast<T*>(reinterpret_cast<Byte*>(image + column) + uint64_t(uint32_t(token)) * stride);
  }
};

template <class T>
SWIN_MOE_BOTH bool whole_vectors(const void* matrix, int head_dim) {
  return reinterpret_cast<uintptr_t>(matrix) % 16 == 0 && head_dim * int(sizeof(T)) % 16 == 0;
}

// Of a head of an image in a (B, H, W, 3C) matrix, from part 0, 1 or 2 (queries, keys, values) on.
template <class T, class U>
__device__ __forceinline__ HeadRows<T> qkv_rows(const WindowLaunch& p, U* matrix, int64_t image, int head, int part) {
  const int c = p.channels(), first = part * c + head * p.head_dim;
  const T* pad = static_cast<const T*>(p.pad_qkv);
  return {static_cast<T*>(const_cast<void*>(static_cast<const void*>(matrix))) +
              image * p.geometry.height * p.geometry.width * 3 * c + first,
          pad ? pad + first : nullptr, uint32_t(3 * c * int(sizeof(T))), c, p.head_dim,
          whole_vectors<T>(matrix, p.head_dim) && whole_vectors<T>(pad, p.head_dim)};
}

// Of a head of an image in a (B, H, W, C) matrix; padding holds zeros.
template <class T, class U>
__device__ __forceinline__ HeadRows<T> out_rows(const WindowLaunch& p, U* matrix, int64_t image, int head) {
  const int c = p.channels();
  return {static_cast<T*>(const_cast<void*>(static_cast<const void*>(matrix))) +
              image * p.geometry.height * p.geometry.width * c + head * p.head_dim,
          nullptr, uint32_t(c * int(sizeof(T))), 0, p.head_dim, whole_vectors<T>(matrix, p.head_dim)};
}

// The vectors of 16 bytes of some rows that one of `Threads` threads moves: all of one column, so that only rows are
// counted. Threads are left over where a row is no power of two of vectors.
template <class S, int Threads>
struct VectorsOfThread {
  static constexpr int kVector = 16 / int(sizeof(typename S::T)), kVectors = S::kHeadDim / kVector;
  static constexpr int kStep = Threads / kVectors;  // rows from one to the next
  int row, column;

  __device__ __forceinline__ explicit VectorsOfThread(int thread)
      : row(thread / kVectors), column(thread % kVectors * kVector) {}
  __device__ __forceinline__ bool none() const { return Threads % kVectors && row >= kStep; }
};

// Starts to bring `Rows` tokens into shared memory, one tile per part of them: zeros beyond the head dimension and where
// there is no token. Complete after wait_for_copies and a barrier.
template <class S, int Rows, int Parts>
__device__ __forceinline__ void load_rows(typename S::T* const (&tiles)[Parts],
                                          const HeadRows<const typename S::T>& from, const int* source) {
  if (!from.vectors) {
#pragma unroll 1
    for (int i = fresh_thread(); i < Rows * S::kHeadDim; i += S::kThreads) {
      const int row = i / S::kHeadDim, column = i % S::kHeadDim, token = source[row];
      const auto* at = token >= 0 ? from.at(token, column) : token == kPadding && from.pad ? from.pad + column : nullptr;
      for (int part = 0; part < Parts; ++part)
        tiles[part][row * S::kPitch + column] = at && column < from.head_dim ? at[part * from.part] : typename S::T{};
    }
    return;
  }
  using Vectors = VectorsOfThread<S, S::kThreads>;
  const Vectors mine(fresh_thread());
  if (mine.none()) return;
  const auto* pad = from.pad ? from.pad + mine.column : from.image;
  const int least = mine.column >= from.head_dim ? INT_MAX : from.pad ? kPadding : 0;  // of tokens that hold something
#pragma unroll
  for (int first = 0; first < Rows; first += Vectors::kStep) {
    const int row = first + mine.row;
    if (first + Vectors::kStep > Rows && row >= Rows) break;
    const int token = source[row];
    const auto* at = token >= 0 ? from.at(token, mine.column) : pad;
#pragma unroll
    for (int part = 0; part < Parts; ++part)
      copy_async(tiles[part] + row * S::kPitch + mine.column, at + part * from.part, token >= least);
  }
}
template <class S, int Rows>
__device__ __forceinline__ void load_rows(typename S::T* tile, const HeadRows<const typename S::T>& from,
                                          const int* source) {
  typename S::T* const tiles[] = {tile};
  load_rows<S, Rows>(tiles, from, source);
}

// Writes `Rows` rows of shared memory to their tokens; padding has none. Threads: of a block, or 32, of each warp.
template <class S, int Rows, int Threads>
__device__ __forceinline__ void store_rows(const typename S::T* tile, const HeadRows<typename S::T>& to,
                                           const int* source) {
  const int thread = fresh_thread() % Threads;
  if (!to.vectors) {
#pragma unroll 1
    for (int i = thread; i < Rows * S::kHeadDim; i += Threads) {
      const int row = i / S::kHeadDim, column = i % S::kHeadDim, token = source[row];
      if (token >= 0 && column < to.head_dim) *to.at(token, column) = tile[row * S::kPitch + column];
    }
    return;
  }
  using Vectors = VectorsOfThread<S, Threads>;
  const Vectors mine(thread);
  if (mine.none() || mine.column >= to.head_dim) return;
#pragma unroll
  for (int first = 0; first < Rows; first += Vectors::kStep) {
    const int row = first + mine.row;
    if (first + Vectors::kStep > Rows && row >= Rows) break;
    const int token = source[row];
    if (token < 0) continue;
    *reinterpret_cast<Vector*>(to.at(token, mine.column)) =
        *reinterpret_cast<const Vector*>(tile + row * S::kPitch + mine.column);
  }
}

// A row of shared memory in float32, spread over four lanes, which work together.
template <class S>
struct QuadRow {
  using T = typename S::T;
  static constexpr int kVector = 16 / int(sizeof(T)), kVectors = S::kHeadDim / kVector, kOfLane = (kVectors + 3) / 4;
  float x[kOfLane][kVector];

  // Whether vector i of this lane is in the row.
  static __device__ __forceinline__ bool has(int i) {
    return kVectors % 4 == 0 || int(threadIdx.x % 4) + 4 * i < kVectors;
  }
  static __device__ __forceinline__ int column(int i) { return (threadIdx.x % 4 + 4 * i) * kVector; }

  __device__ __forceinline__ explicit QuadRow(const T* row) {
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
#pragma unroll
      for (int c = 0; c < kVector; ++c) x[i][c] = 0.f;
      if (has(i)) load_vector(row + column(i), x[i]);
    }
  }

  __device__ __forceinline__ RowSum<T> product(const QuadRow& other) const {
    RowSum<T> sum;
#pragma unroll
    for (int i = 0; i < kOfLane; ++i)
#pragma unroll
      for (int c = 0; c < kVector; ++c) sum.add_product(x[i][c], other.x[i][c]);
    return quad_sum(sum);
  }

  // Writes it times a factor.
  __device__ __forceinline__ void store(T* row, const RowNumber<T>& factor) {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < kOfLane; ++i)
#pragma unroll
        for (int c = 0; c < kVector; ++c) x[i][c] = factor.times(x[i][c]);
    }
#pragma unroll
    for (int i = 0; i < kOfLane; ++i)
      if (has(i)) store_vector(row + column(i), x[i], sizeof(T) == 4 ? 1.f : factor.high);
  }
};

// One over the length of a row, kLargestInverse where the length is clamped. In float32 by one step of Newton's from
// the rounded one, with which a row of cosines would be too large or too small.
template <class T>
__device__ __forceinline__ RowNumber<T> inverse_length(const RowSum<T>& squares) {
  if constexpr (sizeof(T) == 2) {
    return {fminf(reciprocal_root_fast(squares.high), kLargestInverse)};
  } else {
    const float high = 1.f / fmaxf(sqrtf(squares.high), kShortest), square = rounded_product(high, high);
    const float lost = fmaf(squares.high, fmaf(high, high, -square), squares.low * square);
    const float left = fmaf(-squares.high, square, 1.f) - lost;
    return with_remainder(high, high < kLargestInverse ? 0.5f * high * left : 0.f);
  }
}

// Divides `Rows` rows by their lengths; keeps the inverse lengths, where they are wanted.
template <class S, int Rows>
__device__ __forceinline__ void normalize_rows(typename S::T* tile, float* inverse) {
  for (int row = fresh_thread() / 4; row < Rows; row += S::kThreads / 4) {
    QuadRow<S> x(tile + row * S::kPitch);
    const RowNumber<typename S::T> scale = inverse_length<typename S::T>(x.product(x));
    x.store(tile + row * S::kPitch, scale);
    if (inverse && threadIdx.x % 4 == 0) inverse[row] = scale.high;
  }
}

}  // namespace swin_moe
