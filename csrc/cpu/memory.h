// Memory of kernels: pieces of one allocation that a thread keeps.
#pragma once

#include "vector.h"

namespace swin_moe {
namespace SWIN_MOE_CAPABILITY {

// Hands out aligned pieces of one allocation; with base = null it only adds up what is needed.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}
  template <class T>
  T* take(int64_t count) {
    T* piece = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (count * int64_t(sizeof(T)) + 127) / 64 * 64;  // a vector may be read past the end
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// Memory of one thread. Not a class of the standard library: this file is compiled for several sets of instructions, and
// the linker would keep the code of any one of them for the whole program.
struct ThreadMemory {
  char* data = nullptr;
  int64_t size = 0;
  ~ThreadMemory() { std::free(data); }
};

// Returns memory of this thread for `count` elements, which is kept until the thread ends: fresh pages cost more than the
// work. Whoever asks next with the same type and for the same use gets the same.
template <class T = char, int kUse = 0>
T* thread_memory(int64_t count) {
  static thread_local ThreadMemory memory;
  const int64_t bytes = count * int64_t(sizeof(T));
  if (memory.size < bytes) {
    std::free(memory.data);
    memory.size = (bytes + 63) / 64 * 64;
    memory.data = static_cast<char*>(std::aligned_alloc(64, memory.size));
    if (!memory.data) {
      memory.size = 0;
      throw std::bad_alloc();
    }
  }
  return reinterpret_cast<T*>(memory.data);
}

inline char* zeroed_thread_memory(int64_t bytes) {
  char* memory = thread_memory(bytes);
  std::memset(memory, 0, bytes);
  return memory;
}

}  // namespace SWIN_MOE_CAPABILITY
}  // namespace swin_moe
