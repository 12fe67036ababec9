#include "reused_memory.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/util/accumulate.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <deque>
#include <mutex>

namespace swin_moe {
namespace {

constexpr int64_t kSmallest = 1 << 20;  // bytes; smaller blocks stay in the C library's heap
constexpr int64_t kLine = 128;

struct Block {
  char* data;
  int64_t size;
};

// Blocks that no tensor uses. With those in use they are at most a quarter more than what was in use at once, which the
// next step needs again; the oldest go first.
class Pool {
 public:
  Block take(int64_t bytes) {
    const std::lock_guard<std::mutex> guard(mutex_);
    auto best = free_.end();
    for (auto block = free_.begin(); block != free_.end(); ++block)
      if (block->size >= bytes && block->size <= bytes + bytes / 4 && (best == free_.end() || block->size < best->size))
        best = block;
    Block found{nullptr, 0};
    if (best != free_.end()) {
      found = *best;
      free_.erase(best);
    } else {
      // Rows of an expert vary from step to step: a block of up to an eighth more serves many numbers of them.
      const int64_t unit = std::max<int64_t>(int64_t(std::bit_floor(uint64_t(bytes))) / 8, kLine);
      found.size = (bytes + unit - 1) / unit * unit;
      found.data = static_cast<char*>(std::aligned_alloc(kLine, found.size));
      TORCH_CHECK(found.data, "no memory for ", found.size, " bytes");
      kept_ += found.size;
    }
    used_ += found.size;
    most_ = std::max(most_, used_);
    shrink();
    return found;
  }

  void give_back(Block block) {
    const std::lock_guard<std::mutex> guard(mutex_);
    free_.push_back(block);
    used_ -= block.size;
    shrink();
  }

 private:
  void shrink() {
    while (kept_ > most_ + most_ / 4 && !free_.empty()) {
      kept_ -= free_.front().size;
      std::free(free_.front().data);
      free_.pop_front();
    }
  }

  std::mutex mutex_;
  std::deque<Block> free_;
  int64_t used_ = 0, most_ = 0, kept_ = 0;  // bytes in use, the most at once, and of all blocks
};

}  // namespace

at::Tensor empty_reused(at::IntArrayRef sizes, const at::TensorOptions& options) {
  static Pool& pool = *new Pool;  // outlives every tensor
  const int64_t bytes = c10::multiply_integers(sizes) * int64_t(options.dtype().itemsize());
  if (bytes < kSmallest) return at::empty(sizes, options);
  const Block block = pool.take(bytes);
  return at::from_blob(block.data, sizes, [block](void*) { pool.give_back(block); }, options);
}

}  // namespace swin_moe
