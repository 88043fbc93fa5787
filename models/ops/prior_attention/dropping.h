// Which values dropout keeps: a function of a seed and a place, so that nothing needs to be kept for backward.
#pragma once

#include <algorithm>
#include <cstdint>

namespace dropping {

// 64 bits from 64 (the finaliser of MurmurHash3).
inline uint64_t mixed(uint64_t x) {
  x ^= x >> 33;
  x *= 0xff51afd7ed558ccdULL;
  x ^= x >> 33;
  x *= 0xc4ceb9fe1a85ec53ULL;
  return x ^ (x >> 33);
}

template <typename T>
struct Rule {
  const int64_t* seed;  // null: nothing is dropped
  uint32_t threshold;   // what has a lower random number is dropped
  T kept;               // what the others are multiplied with

  Rule(const int64_t* seed, double probability)
      : seed(seed),
        threshold(uint32_t(std::min(probability * 4294967296.0, 4294967295.0))),
        kept(T(probability < 1 ? 1 / (1 - probability) : 0)) {}

  // Factors, 0 or `kept`, of the values of one row from `first` on.
  void draw(int64_t row, int64_t first, int64_t count, T* factors) const {
    const uint64_t of_row = mixed(mixed(uint64_t(*seed)) + uint64_t(row));
    const uint32_t low = uint32_t(of_row), high = uint32_t(of_row >> 32), least = threshold;
    const T factor = kept;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      uint32_t x = (uint32_t(first) + uint32_t(i)) * 0x9e3779b9u + low;
      x ^= x >> 16;
      x *= 0x7feb352du;
      x ^= (x >> 15) ^ high;
      x *= 0x846ca68bu;
      x ^= x >> 16;
      factors[i] = x >= least ? factor : T(0);
    }
  }
};

}  // namespace dropping
