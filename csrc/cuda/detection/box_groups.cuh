// Boxes sorted by group, a block for each group.
#pragma once

#include "cuda/warp.cuh"

namespace swin_moe {

// Calls `body(start, end)` for the groups whose first row is one of the block's: of `count` rows every gridDim-th. All
// threads of a block do so alike. group: (count) in rising order; null = one group of all rows.
template <class Body>
__device__ __forceinline__ void for_groups(const int64_t* group, int64_t count, Body body) {
  for (int64_t start = blockIdx.x; start < count; start += gridDim.x) {
    if (start > 0 && (!group || group[start - 1] == group[start])) continue;
    int64_t low = group ? start + 1 : count, end = count;
    while (low < end) {
      const int64_t middle = (low + end) / 2;
      if (group[middle] == group[start])
        low = middle + 1;
      else
        end = middle;
    }
    body(start, end);
  }
}

// Blocks for so many rows, one a group at most; without groups the only one.
inline int64_t group_blocks(const int64_t* group, int64_t count) {
  const int64_t most = group ? count : int64_t(count > 0);
  return most < kEnoughBlocks ? most : kEnoughBlocks;
}

}  // namespace swin_moe
