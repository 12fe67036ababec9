// PyTorch's operators with the same bits for every number of threads.
//
// Two things of PyTorch depend on it. A sum of everything is one sum for each thread. And where a share of the elements
// begins inside a vector, the elements beside it take another path: sigmoid's vectors are not its single numbers, and a
// softmax gradient, of rows that are no whole vectors, is compiled twice, for one thread and for a share, which rounds
// differently (12 experts with AVX2, 100 with AVX-512). Inside of a task PyTorch shares nothing and computes as on one
// thread, so the operators are called in tasks of rows whose number does not depend on the threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>
#include <cstdint>

namespace swin_moe {

// Calls visit(first row, row after the last) for blocks of `step` rows, each as on one thread.
template <class Visit>
void for_steady_blocks(int64_t rows, int64_t step, Visit visit) {
  // One task alone would run outside of a parallel region, and PyTorch would share what is inside.
  const int64_t blocks = std::max<int64_t>((rows + step - 1) / step, 2);
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView below;
    for (int64_t row = begin * step; row < std::min(end * step, rows); row += step)
      visit(row, std::min(row + step, rows));
  });
}

// Rows of a block of about as many elements as are worth a thread, a multiple of every vector's length.
inline int64_t steady_rows(int64_t columns) {
  constexpr int64_t kLeastElements = 1 << 14, kWholeVectors = 64;
  return std::max<int64_t>(kLeastElements / (std::max<int64_t>(columns, 1) * kWholeVectors), 1) * kWholeVectors;
}

// Calls run() as on one thread.
template <class Run>
void on_one_thread(Run run) {
  for_steady_blocks(1, 1, [&](int64_t, int64_t) { run(); });
}

}  // namespace swin_moe
