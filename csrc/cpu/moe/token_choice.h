// Which experts tokens choose and which slots they get there, token by token: what routing operators on the CPU share.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <type_traits>
#include <utility>
#include <vector>

#include "moe/moe_route.h"

namespace swin_moe {

// The index of the first largest of n numbers. Not-a-number is larger than all, as for torch.max.
template <class T>
int64_t first_largest(const T* v, int64_t n) {
  constexpr int64_t kLanes = 8;
  if (n >= kLanes) {
    T best[kLanes], odd[kLanes] = {};  // odd: how many are not-a-number
    std::copy(v, v + kLanes, best);
    for (int64_t e = 0; e + kLanes <= n; e += kLanes)
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        best[lane] = v[e + lane] > best[lane] ? v[e + lane] : best[lane];
        odd[lane] += v[e + lane] == v[e + lane] ? T(0) : T(1);
      }
    T largest = best[0], sum = T(0);
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      largest = std::max(largest, best[lane]);
      sum += odd[lane];
    }
    for (int64_t e = n / kLanes * kLanes; e < n; ++e) {
      largest = std::max(largest, v[e]);
      sum += v[e] == v[e] ? T(0) : T(1);
    }
    if (sum == T(0)) return std::find(v, v + n, largest) - v;
  }
  int64_t best = 0;
  for (int64_t e = 1; e < n; ++e)
    if (v[e] > v[best] || (std::isnan(v[e]) && !std::isnan(v[best]))) best = e;
  return best;
}

// What a token's choices are read from and written to.
template <class T>
struct Choices {
  const T *scores, *noisy, *bias;  // noisy is read with a threshold only; bias may be null
  int64_t experts, top_k;
  int64_t* expert;
  T *gate, *threshold;  // threshold may be null
};

template <class T>
void choose(const Choices<T>& c, int64_t begin, int64_t end) {
  std::vector<T> rest(c.experts);
  const bool plain = c.top_k == 1 && !c.bias;
  for (int64_t t = begin; t < end; ++t) {
    const T* row = c.scores + t * c.experts;
    int64_t* chosen = c.expert + t * c.top_k;
    if (plain) {
      chosen[0] = first_largest(row, c.experts);
    } else {
      for (int64_t e = 0; e < c.experts; ++e) rest[e] = c.bias ? row[e] + c.bias[e] : row[e];
      for (int64_t k = 0; k < c.top_k; ++k) {
        chosen[k] = first_largest(rest.data(), c.experts);
        rest[chosen[k]] = -std::numeric_limits<T>::infinity();
      }
    }
    for (int64_t k = 0; k < c.top_k; ++k) c.gate[t * c.top_k + k] = row[chosen[k]];
    if (c.threshold) c.threshold[t] = c.noisy[t * c.experts + chosen[c.top_k - 1]];
  }
}

// Ascending keys are descending numbers, not-a-number first; both zeros are one key.
template <class T>
auto sort_key(T value) {
  using Key = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  if (std::isnan(value)) return Key(0);
  value += T(0);
  Key bits;
  std::memcpy(&bits, &value, sizeof bits);
  constexpr Key kSign = Key(1) << (8 * sizeof(Key) - 1);
  return Key(~(bits & kSign ? ~bits : bits | kSign));
}

// The stable order of n keys, by radix: bytes from the lowest up, those that are equal in all keys left out.
template <class Key>
void sort_stably(std::vector<Key>& keys, std::vector<int64_t>& order) {
  const size_t n = keys.size();
  order.resize(n);
  std::iota(order.begin(), order.end(), int64_t(0));
  std::vector<std::array<int64_t, 256>> counts(sizeof(Key), std::array<int64_t, 256>{});
  for (const Key key : keys)
    for (size_t byte = 0; byte < sizeof(Key); ++byte) ++counts[byte][key >> (8 * byte) & 255];
  std::vector<Key> other_keys(n);
  std::vector<int64_t> other(n);
  for (size_t byte = 0; byte < sizeof(Key); ++byte) {
    auto& count = counts[byte];
    if (n == 0 || count[keys[0] >> (8 * byte) & 255] == int64_t(n)) continue;
    int64_t first = 0;
    for (int64_t& value : count) first += std::exchange(value, first);
    for (size_t i = 0; i < n; ++i) {
      const int64_t to = count[keys[i] >> (8 * byte) & 255]++;
      other_keys[to] = keys[i];
      other[to] = order[i];
    }
    keys.swap(other_keys);
    order.swap(other);
  }
}

struct Slots {
  int64_t *slot, *demand, *kept;
  bool* keep;
};

// Slots of one group, choice-major: in token order, or where tokens have priority, the most confident first.
template <class T>
void take_slots(const Choices<T>& c, const RoutingGroups& groups, int64_t group, bool prioritized, const Slots& to) {
  const int64_t begin = groups.begin(group), count = groups.end(group) - begin, limit = groups.limit(group);
  std::vector<int64_t> order;
  if (prioritized) {
    std::vector<decltype(sort_key(T()))> keys(count);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t t = begin + i;
      keys[i] = sort_key(c.scores[t * c.experts + c.expert[t * c.top_k]]);
    }
    sort_stably(keys, order);
  }
  int64_t* taken = to.demand + group * c.experts;
  std::fill_n(taken, c.experts, int64_t(0));
  for (int64_t k = 0; k < c.top_k; ++k)
    for (int64_t i = 0; i < count; ++i) {
      const int64_t pair = (begin + (prioritized ? order[i] : i)) * c.top_k + k;
      const int64_t slot = taken[c.expert[pair]]++;
      to.slot[pair] = slot;
      to.keep[pair] = limit < 0 || slot < limit;
    }
  for (int64_t e = 0; e < c.experts; ++e)
    to.kept[group * c.experts + e] = limit < 0 ? taken[e] : std::min(taken[e], limit);
}

}  // namespace swin_moe
