// Runs CUDA kernels on the host, for tests: csrc/cuda/warp.cuh includes this instead of talking to a device.
//
// The threads of a block are fibers; one warp after the other runs until all of its lanes wait at a barrier of the
// block. An operation of a warp (shuffle, matrix load, matrix product) is computed for all by the last of its 32 lanes
// to arrive, with the fragment layouts of the PTX manual (ldmatrix, mma.m16n8k16). Shared memory is filled with
// not-a-number before a block runs and guarded behind its end, so a barrier that is missing shows as not-a-number or as
// a result that depends on the order: SWIN_MOE_EMULATION_REVERSE=1 runs lanes and warps in the opposite one. Errors (lanes that do not meet, a barrier not reached by all, a
// write past shared memory) end the launch with cudaErrorLaunchFailure and one line on stderr.
//
// Only one operating-system thread may use it at a time.
#pragma once

#include <csetjmp>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <tuple>
#include <ucontext.h>
#include <vector>

#include "cuda_emulation_types.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct EmulatedIndex {
  unsigned x, y, z;
};
inline EmulatedIndex threadIdx, blockIdx, blockDim, gridDim;

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

template <class T>
inline T min(T a, T b) {
  return a < b ? a : b;
}
template <class T>
inline T max(T a, T b) {
  return a < b ? b : a;
}

namespace swin_moe {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int64_t kEnoughBlocks = 4, kEnoughBackwardBlocks = 4;  // so few that small maps, too, have blocks with several windows

namespace emulation {

enum class Waits { kNothing, kBlock, kWarp, kEnded };

struct Fiber {
  std::jmp_buf point;
  std::unique_ptr<char[]> stack;
  bool started = false;
  Waits waits = Waits::kNothing;
  const void* place = nullptr;  // what kind of operation it waits at
  void* arguments = nullptr;
};

// One block at a time.
struct Machine {
  static constexpr size_t kStackBytes = 256 << 10;
  static constexpr size_t kGuardBytes = 256;
  static constexpr unsigned char kGuard = 0xA5, kUnset = 0xFF;

  std::vector<Fiber> fibers;
  std::vector<unsigned> arrived;  // lanes of each warp that wait at its operation
  std::vector<unsigned char> shared;
  size_t shared_bytes = 0;
  void (*body)(void*) = nullptr;
  void* body_arguments = nullptr;
  unsigned current = 0;
  const char* error = nullptr;
  std::jmp_buf scheduler;

  unsigned threads() const { return unsigned(fibers.size()); }

  void wait(Waits what) {
    Fiber& fiber = fibers[current];
    fiber.waits = what;
    if (_setjmp(fiber.point) == 0) std::longjmp(scheduler, 1);
  }

  void fail(const char* what) {
    error = what;
    std::longjmp(scheduler, 1);
  }

  static void enter() {
    Machine& machine = instance();
    machine.body(machine.body_arguments);
    machine.wait(Waits::kEnded);
  }

  void resume(unsigned index) {
    current = index;
    threadIdx = {index, 0, 0};
    Fiber& fiber = fibers[index];
    if (_setjmp(scheduler) != 0) return;
    if (fiber.started) std::longjmp(fiber.point, 1);
    fiber.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.get();
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, &Machine::enter, 0);
    setcontext(&context);
  }

  bool all_at(Waits what) const {
    for (const Fiber& fiber : fibers)
      if (fiber.waits != what) return false;
    return true;
  }

  void start_block() {
    for (Fiber& fiber : fibers) {
      fiber.started = false;
      fiber.waits = Waits::kNothing;
      if (!fiber.stack) fiber.stack = std::make_unique<char[]>(kStackBytes);
    }
    arrived.assign((threads() + 31) / 32, 0);
    shared.assign(shared_bytes + kGuardBytes, kUnset);
    std::memset(shared.data() + shared_bytes, kGuard, kGuardBytes);
  }

  // Lets a warp go as far as it comes, so that it is far ahead of the next; returns whether it moved.
  bool run_warp(unsigned warp, bool reverse) {
    bool moved = false;
    for (bool again = true; again && !error;) {
      again = false;
      for (unsigned i = 0; i < 32 && !error; ++i) {
        const unsigned index = warp * 32 + (reverse ? 31 - i : i);
        if (fibers[index].waits != Waits::kNothing) continue;
        again = moved = true;
        resume(index);
      }
    }
    return moved;
  }

  // Returns what went wrong, or null.
  const char* run_block(bool reverse) {
    start_block();
    while (!all_at(Waits::kEnded)) {
      bool moved = false;
      for (unsigned i = 0; i < threads() / 32; ++i) moved |= run_warp(reverse ? threads() / 32 - 1 - i : i, reverse);
      if (error) return error;
      if (moved) continue;
      if (!all_at(Waits::kBlock)) return error = "threads wait for each other: a barrier or a warp is not whole";
      for (Fiber& fiber : fibers) fiber.waits = Waits::kNothing;
    }
    for (size_t i = 0; i < kGuardBytes; ++i)
      if (shared[shared_bytes + i] != kGuard) return error = "a write past the end of shared memory";
    return nullptr;
  }

  static Machine& instance() {
    static Machine machine;
    return machine;
  }
};

// An operation of a warp: `all(arguments of the 32 lanes)` runs once, when they are all here.
template <class Arguments, class All>
void meet(const void* place, Arguments& mine, All all) {
  Machine& machine = Machine::instance();
  const unsigned first = machine.current / 32 * 32;
  Fiber& fiber = machine.fibers[machine.current];
  fiber.arguments = &mine;
  fiber.place = place;
  if (++machine.arrived[first / 32] < 32) return machine.wait(Waits::kWarp);
  machine.arrived[first / 32] = 0;
  Arguments* lanes[32];
  for (unsigned lane = 0; lane < 32; ++lane) {
    const Fiber& other = machine.fibers[first + lane];
    if (other.place != place) machine.fail("lanes of a warp meet at different operations");
    lanes[lane] = static_cast<Arguments*>(other.arguments);
  }
  all(lanes);
  for (unsigned lane = 0; lane < 32; ++lane) machine.fibers[first + lane].waits = Waits::kNothing;
}

template <class T>
T shuffle(T value, unsigned from, const void* place) {
  struct Arguments {
    T value;
    unsigned from;
    T result;
  } mine{value, from, value};
  meet(place, mine, [](Arguments** lanes) {
    for (int lane = 0; lane < 32; ++lane) lanes[lane]->result = lanes[lanes[lane]->from % 32]->value;
  });
  return mine.result;
}

}  // namespace emulation

inline unsigned char* shared_memory() { return emulation::Machine::instance().shared.data(); }

}  // namespace swin_moe

inline void __syncthreads() { swin_moe::emulation::Machine::instance().wait(swin_moe::emulation::Waits::kBlock); }

inline void __syncwarp() {
  static const char place = 0;
  char nothing = 0;
  swin_moe::emulation::meet(&place, nothing, [](char**) {});
}

template <class T>
T __shfl_sync(unsigned, T value, int from) {
  static const char place = 0;
  return swin_moe::emulation::shuffle(value, unsigned(from), &place);
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  static const char place = 0;
  return swin_moe::emulation::shuffle(value, threadIdx.x % 32 ^ unsigned(mask), &place);
}

inline bool __any_sync(unsigned, bool mine) {
  static const char place = 0;
  struct Arguments {
    bool mine, any;
  } vote{mine, false};
  swin_moe::emulation::meet(&place, vote, [](Arguments** lanes) {
    bool any = false;
    for (int lane = 0; lane < 32; ++lane) any |= lanes[lane]->mine;
    for (int lane = 0; lane < 32; ++lane) lanes[lane]->any = any;
  });
  return vote.any;
}

namespace swin_moe {

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float to_float(Float16 x) {
  _Float16 value;
  std::memcpy(&value, &x.bits, 2);
  return value;
}

inline uint16_t rounded(float x, BFloat16) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return 0x7fff;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint16_t rounded(float x, Float16) {
  const _Float16 value = _Float16(x);
  uint16_t bits;
  std::memcpy(&bits, &value, 2);
  return bits;
}
template <class T>
uint32_t pack(float first, float second, T t) {
  return rounded(first, t) | uint32_t(rounded(second, t)) << 16;
}

struct LoadArguments {
  uint32_t* registers;
  const void* row;
};

inline void load_eight_by_eight(LoadArguments** lanes, bool transposed) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t elements[8][8];
    for (int row = 0; row < 8; ++row) {
      const void* from = lanes[matrix * 8 + row]->row;
      if (reinterpret_cast<uintptr_t>(from) % 16)
        emulation::Machine::instance().fail("a matrix row is not aligned to 16 bytes");
      std::memcpy(elements[row], from, 16);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int row = lane / 4, column = lane % 4 * 2;
      const uint16_t low = transposed ? elements[column][row] : elements[row][column];
      const uint16_t high = transposed ? elements[column + 1][row] : elements[row][column + 1];
      lanes[lane]->registers[matrix] = low | uint32_t(high) << 16;
    }
  }
}

inline void load_matrices(uint32_t (&r)[4], const void* row) {
  static const char place = 0;
  LoadArguments mine{r, row};
  emulation::meet(&place, mine, [](LoadArguments** lanes) { load_eight_by_eight(lanes, false); });
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  static const char place = 0;
  LoadArguments mine{r, row};
  emulation::meet(&place, mine, [](LoadArguments** lanes) { load_eight_by_eight(lanes, true); });
}

struct ProductArguments {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};

template <class T>
float half_of(uint32_t pair, int high) {
  return to_float(T{uint16_t(pair >> (16 * high))});
}

template <class T>
void multiply_all(ProductArguments** lanes) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4 * 2;
    for (int h = 0; h < 2; ++h) {
      a[g][t + h] = half_of<T>(lanes[lane]->a[0], h);
      a[g + 8][t + h] = half_of<T>(lanes[lane]->a[1], h);
      a[g][t + 8 + h] = half_of<T>(lanes[lane]->a[2], h);
      a[g + 8][t + 8 + h] = half_of<T>(lanes[lane]->a[3], h);
      b[t + h][g] = half_of<T>(lanes[lane]->b[0], h);
      b[t + 8 + h][g] = half_of<T>(lanes[lane]->b[1], h);
    }
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int e = 0; e < 4; ++e) {
      const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
      float sum = 0.f;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      lanes[lane]->c[e] += sum;
    }
}

template <class T>
void multiply_add(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T) {
  static const char place = 0;
  ProductArguments mine{c, a, {b0, b1}};
  emulation::meet(&place, mine, &multiply_all<T>);
}

inline int fresh_thread() { return int(threadIdx.x); }

inline void copy_async(void* shared, const void* global, bool inside) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16)
    emulation::Machine::instance().fail("an asynchronous copy is not aligned to 16 bytes");
  if (inside)
    std::memcpy(shared, global, 16);
  else
    std::memset(shared, 0, 16);
}
inline void wait_for_copies() {}

inline float exp2_fast(float x) { return std::exp2(x); }
inline float reciprocal_fast(float x) { return 1.f / x; }
inline float reciprocal_root_fast(float x) { return 1.f / std::sqrt(x); }

// Of an H100, or what SWIN_MOE_EMULATION_SHARED says.
inline size_t most_shared_bytes() {
  const char* bytes = std::getenv("SWIN_MOE_EMULATION_SHARED");
  return bytes ? size_t(std::atoll(bytes)) : size_t(227) << 10;
}

template <class... P>
cudaError_t launch(void (*kernel)(P...), int64_t blocks, int threads, size_t shared_bytes, cudaStream_t,
                   P... arguments) {
  auto& machine = emulation::Machine::instance();
  const char* order = std::getenv("SWIN_MOE_EMULATION_REVERSE");
  auto call = std::make_tuple(kernel, arguments...);
  machine.body = [](void* at) {
    std::apply([](auto* f, auto&... values) { f(values...); }, *static_cast<decltype(call)*>(at));
  };
  machine.body_arguments = &call;
  machine.fibers.resize(threads);
  machine.shared_bytes = shared_bytes;
  machine.error = nullptr;
  if (shared_bytes > most_shared_bytes()) return cudaErrorInvalidValue;
  blockDim = {unsigned(threads), 1, 1};
  gridDim = {unsigned(blocks), 1, 1};
  for (int64_t block = 0; block < blocks; ++block) {
    blockIdx = {unsigned(block), 0, 0};
    if (const char* error = machine.run_block(order && *order == '1')) {
      std::fprintf(stderr, "emulated launch, block %lld, thread %u: %s\n", (long long)block, machine.current, error);
      return cudaErrorLaunchFailure;
    }
  }
  return cudaSuccess;
}

}  // namespace swin_moe
