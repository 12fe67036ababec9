#include "kept_memory.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/Allocator.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace swin_moe {
namespace {

constexpr size_t kLeast = 128 << 10;  // bytes; the C library keeps smaller blocks itself
constexpr size_t kStep = 64 << 10;  // sizes are multiples of it
constexpr size_t kHugePage = 2 << 20;

struct Block {
  void* data;
  size_t size;
  uint64_t last_used;
};

void* take_from_system(size_t size) {
  void* data = nullptr;
  if (posix_memalign(&data, size < kHugePage ? 4096 : kHugePage, size)) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (size >= kHugePage) madvise(data, size, MADV_HUGEPAGE);  // refused where the system has none: small pages then
#endif
  return data;
}

class KeptMemory final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    Block* block = new Block(find(std::max<size_t>((bytes + kStep - 1) / kStep, 1) * kStep));
    return {block->data, block, &give_back, c10::Device(c10::DeviceType::CPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

  std::vector<int64_t> state() {
    std::lock_guard<std::mutex> guard(mutex_);
    return {int64_t(used_), int64_t(idle_bytes_), int64_t(peak_), taken_};
  }

  static KeptMemory& the_only() {
    static KeptMemory* memory = new KeptMemory;  // never destroyed: tensors may outlive what is
    return *memory;
  }

 private:
  static void give_back(void* context) {
    Block* block = static_cast<Block*>(context);
    KeptMemory& memory = the_only();
    {
      std::lock_guard<std::mutex> guard(memory.mutex_);
      memory.used_ -= block->size;
      memory.idle_bytes_ += block->size;
      block->last_used = ++memory.clock_;
      memory.idle_.emplace(block->size, *block);
    }
    delete block;
  }

  Block find(size_t size) {
    std::lock_guard<std::mutex> guard(mutex_);
    Block block;
    auto found = idle_.lower_bound(size);
    if (found != idle_.end() && found->first <= size + size / 8) {
      found = std::prev(idle_.upper_bound(found->first));  // the last one of its size, which a cache may still hold
      block = found->second;
      idle_bytes_ -= block.size;
      idle_.erase(found);
    } else {
      const size_t most = 2 * std::max(peak_, used_ + size);
      while (!idle_.empty() && used_ + idle_bytes_ + size > most) drop_longest_idle();
      block = {take_from_system(size), size, 0};
      ++taken_;
    }
    used_ += block.size;
    peak_ = std::max(peak_, used_);
    return block;
  }

  void drop_longest_idle() {
    auto longest = std::min_element(idle_.begin(), idle_.end(), [](const auto& a, const auto& b) {
      return a.second.last_used < b.second.last_used;
    });
    idle_bytes_ -= longest->first;
    std::free(longest->second.data);
    idle_.erase(longest);
  }

  std::mutex mutex_;
  std::multimap<size_t, Block> idle_;  // by size
  size_t used_ = 0, idle_bytes_ = 0, peak_ = 0;
  uint64_t clock_ = 0;
  int64_t taken_ = 0;
};

}  // namespace

at::Tensor empty_kept(at::IntArrayRef sizes, at::ScalarType dtype) {
  size_t bytes = c10::elementSize(dtype);
  for (int64_t size : sizes) bytes *= size;
  if (bytes < kLeast) return at::empty(sizes, at::TensorOptions().dtype(dtype));
  return at::detail::empty_generic(sizes, &KeptMemory::the_only(), c10::DispatchKeySet(c10::DispatchKey::CPU), dtype,
                                   std::nullopt);
}

}  // namespace swin_moe

TORCH_LIBRARY_FRAGMENT(swin_moe, m) {
  // Bytes in use, bytes idle, the most bytes that were in use at once, and blocks taken from the system so far.
  m.def("kept_memory() -> int[]", [] { return swin_moe::KeptMemory::the_only().state(); });
}
