// Roll + partition into windows, and merge + roll, as copies of whole tokens of any element type.
#include "cuda/rows/row_groups.cuh"
#include "cuda/rows/row_launch.h"

namespace swin_moe {
namespace {

// Int: what tokens of all images are counted in.
template <class Vector, class Int>
__global__ void __launch_bounds__(kRowThreads)
    move_windows_kernel(const Vector* from, Vector* to, WindowGeometry g, int64_t tokens, int vectors, int lanes,
                        bool merge) {
  const RowGroup group(lanes);
  if (group.row >= tokens) return;
  const Int row = Int(group.row), windows = Int(g.windows());
  const Int window = row / Int(g.tokens()), image = window / windows;
  const WindowPlace<Int> at(g, window - image * windows);
  const int64_t place = int64_t(image) * g.height * g.width + source_token(g, at, int(row - window * Int(g.tokens())));
  const Vector* read = from + (merge ? group.row : place) * vectors;
  Vector* write = to + (merge ? place : group.row) * vectors;
  for (int i = group.lane; i < vectors; i += lanes) write[i] = read[i];
}

struct alignas(16) Bytes16 {
  uint64_t halves[2];
};

template <class Vector>
bool move_windows(const void* from, void* to, const WindowGeometry& g, int64_t batch, int64_t token_bytes, bool merge,
                  cudaStream_t stream, cudaError_t* error) {
  const auto unaligned = reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to) | uintptr_t(token_bytes);
  if (unaligned % sizeof(Vector)) return false;
  const int64_t tokens = batch * g.height * g.width;
  const int vectors = int(token_bytes / int64_t(sizeof(Vector))), lanes = lanes_for(vectors);
  const auto kernel =
      tokens <= 0x7fffffff ? &move_windows_kernel<Vector, uint32_t> : &move_windows_kernel<Vector, int64_t>;
  *error = launch(kernel, row_blocks(tokens, lanes), kRowThreads, 0, stream, static_cast<const Vector*>(from),
                  static_cast<Vector*>(to), g, tokens, vectors, lanes, merge);
  return true;
}

}  // namespace
}  // namespace swin_moe

cudaError_t swin_moe_move_windows(const void* from, void* to, const swin_moe::WindowGeometry* geometry, int64_t batch,
                                  int64_t token_bytes, int merge, cudaStream_t stream) {
  using namespace swin_moe;
  if (token_bytes > 0x7fffffff) return cudaErrorInvalidValue;  // counted in 32 bits
  cudaError_t error = cudaSuccess;
  const auto& g = *geometry;
  const bool done = move_windows<Bytes16>(from, to, g, batch, token_bytes, merge, stream, &error) ||
                    move_windows<uint64_t>(from, to, g, batch, token_bytes, merge, stream, &error) ||
                    move_windows<uint32_t>(from, to, g, batch, token_bytes, merge, stream, &error) ||
                    move_windows<uint16_t>(from, to, g, batch, token_bytes, merge, stream, &error) ||
                    move_windows<uint8_t>(from, to, g, batch, token_bytes, merge, stream, &error);
  return done ? error : cudaErrorInvalidValue;
}
