// What a balance loss balances, by the numbers of KINDS in swin_moe/ops/moe/moe_balance.py.
#pragma once

#include <cstdint>

namespace swin_moe {

enum BalanceKind : int64_t { kNone = 0, kGshard = 1, kGshardOfShares = 2, kLoadImportance = 3 };

}  // namespace swin_moe
