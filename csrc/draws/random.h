// Random bits as a pure function of a key, a row and a unit: swin_moe/randomness.py on host and device, bit for bit.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define SWIN_MOE_RANDOM inline __host__ __device__
#else
#define SWIN_MOE_RANDOM inline
#endif

namespace swin_moe {

struct RandomKey {
  uint32_t low, high;
};

// One draw of a network: what RandomContext.key makes a key of, besides seed and step. A site of -1 is none.
struct DrawSite {
  int64_t layer, purpose, site;
};

SWIN_MOE_RANDOM uint64_t derive_word(uint64_t state, uint64_t word) {
  state = (state ^ word) * 0xBF58476D1CE4E5B9ull;
  state ^= state >> 31;
  state *= 0x94D049BB133111EBull;
  return state ^ state >> 29;
}

constexpr uint64_t kFirstState = 0x9E3779B97F4A7C15ull;

// words: seed and step.
SWIN_MOE_RANDOM uint64_t derive_key(const int64_t* words, const DrawSite& draw) {
  uint64_t state = kFirstState;
  state = derive_word(state, uint64_t(words[0]));
  state = derive_word(state, uint64_t(words[1]));
  state = derive_word(state, uint64_t(draw.layer));
  state = derive_word(state, uint64_t(draw.purpose));
  if (draw.site < 0) return state;
  return derive_word(derive_word(kFirstState, state), uint64_t(draw.site));
}

SWIN_MOE_RANDOM RandomKey split_key(uint64_t key) { return {uint32_t(key), uint32_t(key >> 32)}; }

// The key of an independent draw of the same site.
SWIN_MOE_RANDOM RandomKey second_key(RandomKey key) { return {key.low ^ 0xD2545F49u, key.high ^ 0x5DEECE66u}; }

SWIN_MOE_RANDOM uint32_t mix_bits(uint32_t x) {
  x = (x ^ x >> 16) * 0x7FEB352Du;
  x = (x ^ x >> 15) * 0x846CA68Bu;
  return x ^ x >> 16;
}

SWIN_MOE_RANDOM uint32_t hash_row(RandomKey key, int64_t row) {
  return mix_bits(mix_bits(uint32_t(row) ^ key.low) + uint32_t(row >> 32) + key.high);
}

SWIN_MOE_RANDOM uint32_t hash_unit(RandomKey key, uint32_t unit) {
  return mix_bits(unit * 0x9E3779B9u + key.high);
}

SWIN_MOE_RANDOM uint32_t random_bits(uint32_t row_hash, uint32_t unit_hash) { return mix_bits(row_hash + unit_hash); }

// In (0, 1), on a grid of 2^-24 shifted by half a step; in float, as the Python form has it.
SWIN_MOE_RANDOM float to_uniform(uint32_t bits) { return (float(bits >> 8) + 0.5f) * 0x1p-24f; }

// A draw is kept where its bits, as a signed number, are at least this.
inline int64_t keep_threshold(double drop) { return int64_t(std::nearbyint(drop * 0x1p32)) - (int64_t(1) << 31); }

SWIN_MOE_RANDOM bool is_kept(uint32_t bits, int64_t threshold) { return int64_t(int32_t(bits)) >= threshold; }

}  // namespace swin_moe
