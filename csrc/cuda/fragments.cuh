// Products of 16 x 16 tiles by one warp, float32 sums.
//
// A tile of sums is float[8] per lane: element e lies in row l / 4 + 8 (e / 2 % 2) and column 2 (l % 4) + e % 2 + 8 (e
// / 4) of the tile, l being the lane. This is the layout of mma.m16n8k16, twice side by side; left factors have it
// too, so that sums become factors without leaving their lane.
#pragma once

#include "warp.cuh"

namespace swin_moe {

constexpr int kTile = 16;      // rows and columns of a tile
constexpr int kTileSums = 8;   // of one lane

struct Lane {
  int id, row, column;         // of the first element of a tile

  __device__ __forceinline__ Lane() : id(threadIdx.x % 32), row(id / 4), column(id % 4 * 2) {}
  __device__ __forceinline__ int row_of(int e) const { return row + (e & 2) * 4; }
  __device__ __forceinline__ int column_of(int e) const { return column + (e & 1) + (e & 4) * 2; }
};

// 16-bit elements on the tensor cores.
template <class T>
struct Fragments {
  struct Left {
    uint32_t r[4];
  };
  struct Right {
    uint32_t r[4];
  };

  // Rows row.., columns k.. of a matrix in shared memory.
  static __device__ __forceinline__ Left left(const T* matrix, int pitch, int row, int k) {
    const int lane = threadIdx.x % 32;
    Left a;
    load_matrices(a.r, matrix + (row + lane % 16) * pitch + k + lane / 16 * 8);
    return a;
  }

  // Rows of the transposed matrix: sums[m][n] += matrix[k][m] right[k][n].
  static __device__ __forceinline__ Left left_of_columns(const T* matrix, int pitch, int m, int k) {
    const int lane = threadIdx.x % 32;
    Left a;
    load_matrices_transposed(a.r, matrix + (k + lane % 8 + lane / 16 * 8) * pitch + m + lane / 8 % 2 * 8);
    return a;
  }

  static __device__ __forceinline__ Left left(const float (&sums)[kTileSums]) {
    Left a;
#pragma unroll
    for (int i = 0; i < 4; ++i) a.r[i] = pack(sums[2 * i], sums[2 * i + 1], T{});
    return a;
  }

  static __device__ __forceinline__ void negate(Left& a) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a.r[i] ^= 0x80008000u;
  }

  // What `left` rounded.
  static __device__ __forceinline__ void values(const Left& a, float (&sums)[kTileSums]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sums[2 * i] = to_float(T{uint16_t(a.r[i])});
      sums[2 * i + 1] = to_float(T{uint16_t(a.r[i] >> 16)});
    }
  }

  // The transposed of rows n.., columns k..: sums[m][n] += left[m][k] matrix[n][k].
  static __device__ __forceinline__ Right right_of_rows(const T* matrix, int pitch, int n, int k) {
    const int lane = threadIdx.x % 32;
    Right b;
    load_matrices(b.r, matrix + (n + lane % 8 + lane / 16 * 8) * pitch + k + lane / 8 % 2 * 8);
    return b;
  }

  // Rows k.., columns n..: sums[m][n] += left[m][k] matrix[k][n].
  static __device__ __forceinline__ Right right_of_columns(const T* matrix, int pitch, int k, int n) {
    const int lane = threadIdx.x % 32;
    Right b;
    load_matrices_transposed(b.r, matrix + (k + lane % 16) * pitch + n + lane / 16 * 8);
    return b;
  }

  // Both: also the upper eight columns.
  static __device__ __forceinline__ void multiply(float (&sums)[kTileSums], const Left& a, const Right& b,
                                                  bool both = true) {
    multiply_add(sums, a.r, b.r[0], b.r[1], T{});
    if (both) multiply_add(sums + 4, a.r, b.r[2], b.r[3], T{});
  }
};

// float32 by plain multiply-adds, as exact as eager float32: the tensor cores would round the factors to 11 bits, and
// splitting them into three products depends on how the hardware truncates its sums.
template <>
struct Fragments<float> {
  struct Left {
    float v[kTileSums];
  };
  struct RightOfRows {
    const float* at;
    int pitch;
    __device__ __forceinline__ float operator()(int k, int n) const { return at[n * pitch + k]; }
  };
  struct RightOfColumns {
    const float* at;
    int pitch;
    __device__ __forceinline__ float operator()(int k, int n) const { return at[k * pitch + n]; }
  };

  static __device__ __forceinline__ Left left(const float* matrix, int pitch, int row, int k) {
    const Lane lane;
    Left a;
#pragma unroll
    for (int e = 0; e < kTileSums; ++e) a.v[e] = matrix[(row + lane.row_of(e)) * pitch + k + lane.column_of(e)];
    return a;
  }

  static __device__ __forceinline__ Left left_of_columns(const float* matrix, int pitch, int m, int k) {
    const Lane lane;
    Left a;
#pragma unroll
    for (int e = 0; e < kTileSums; ++e) a.v[e] = matrix[(k + lane.column_of(e)) * pitch + m + lane.row_of(e)];
    return a;
  }

  static __device__ __forceinline__ Left left(const float (&sums)[kTileSums]) {
    Left a;
#pragma unroll
    for (int e = 0; e < kTileSums; ++e) a.v[e] = sums[e];
    return a;
  }

  static __device__ __forceinline__ void negate(Left& a) {
#pragma unroll
    for (int e = 0; e < kTileSums; ++e) a.v[e] = -a.v[e];
  }

  static __device__ __forceinline__ RightOfRows right_of_rows(const float* matrix, int pitch, int n, int k) {
    return {matrix + n * pitch + k, pitch};
  }
  static __device__ __forceinline__ RightOfColumns right_of_columns(const float* matrix, int pitch, int k, int n) {
    return {matrix + k * pitch + n, pitch};
  }

  template <class Right>
  static __device__ __forceinline__ void multiply(float (&sums)[kTileSums], const Left& a, const Right& b, bool = true) {
    const Lane lane;
    float products[kTileSums];  // 16 at a time, so that a sum of many is rounded once for them
#pragma unroll
    for (int e = 0; e < kTileSums; ++e) products[e] = 0.f;
#pragma unroll
    for (int k = 0; k < kTile; ++k) {
      const int owner = (lane.id & ~3) | (k % 8 / 2), e = k % 2 + k / 8 * 4;
      const float upper = __shfl_sync(kAllLanes, a.v[e], owner), lower = __shfl_sync(kAllLanes, a.v[e + 2], owner);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float b0 = b(k, lane.column + half * 8), b1 = b(k, lane.column + half * 8 + 1);
        products[half * 4] = fmaf(upper, b0, products[half * 4]);
        products[half * 4 + 1] = fmaf(upper, b1, products[half * 4 + 1]);
        products[half * 4 + 2] = fmaf(lower, b0, products[half * 4 + 2]);
        products[half * 4 + 3] = fmaf(lower, b1, products[half * 4 + 3]);
      }
    }
#pragma unroll
    for (int e = 0; e < kTileSums; ++e) sums[e] += products[e];
  }
};

__device__ __forceinline__ void set_zero(float (&sums)[kTileSums]) {
#pragma unroll
  for (int e = 0; e < kTileSums; ++e) sums[e] = 0.f;
}

}  // namespace swin_moe
