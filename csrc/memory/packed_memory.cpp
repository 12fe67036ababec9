// Memory for packed weights, in large pages that several matrices share.
#include "packed_memory.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace swin_moe {

#if defined(__linux__)
namespace {

constexpr int64_t kPage = 2 << 20, kChunk = 16 << 20, kLine = 128;

int64_t rounded(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

struct Chunk {
  char* data = nullptr;
  int64_t size, used = 0;

  explicit Chunk(int64_t bytes) : size(rounded(bytes, kPage)) {
    data = static_cast<char*>(std::aligned_alloc(kPage, size));
    if (data) madvise(data, size, MADV_HUGEPAGE);  // where that is not allowed: as any other
  }
  ~Chunk() { std::free(data); }
  Chunk(const Chunk&) = delete;
};

}  // namespace

at::Tensor packed_memory(int64_t experts, int64_t bytes) {
  static std::mutex mutex;
  static std::weak_ptr<Chunk> last;  // which lives as long as what is packed in it
  const auto options = at::TensorOptions().dtype(at::kByte);
  const int64_t needed = rounded(experts * bytes, kLine);
  if (needed == 0) return at::empty({experts, bytes}, options);
  const std::lock_guard<std::mutex> guard(mutex);
  std::shared_ptr<Chunk> chunk = last.lock();
  if (!chunk || chunk->size - chunk->used < needed) {
    chunk = std::make_shared<Chunk>(std::max(needed, kChunk));
    if (!chunk->data) return at::empty({experts, bytes}, options);
    last = chunk;
  }
  char* const data = chunk->data + chunk->used;
  chunk->used += needed;
  return at::from_blob(data, {experts, bytes}, [chunk](void*) mutable { chunk.reset(); }, options);
}
#else
at::Tensor packed_memory(int64_t experts, int64_t bytes) {
  return at::empty({experts, bytes}, at::TensorOptions().dtype(at::kByte));
}
#endif

}  // namespace swin_moe
