// The sizes of one call of deformable attention, and how many threads it is worth.
#pragma once

#include <cstdint>

namespace {

struct Problem {
  const int64_t* sizes;  // height, width of each level
  int64_t batch, length, heads, channels, levels, queries, points;
  int threads;
};

inline Problem problem(const int64_t* sizes, const int64_t* dimensions, int threads) {
  const int64_t* d = dimensions;  // B, L, N, C, levels, Q, points
  const int64_t cells = d[0] * d[2] * d[3] * d[4] * d[5] * d[6];  // read, a quarter of them
  const int64_t worth = cells / 32768 + 1;  // for less, waking a thread takes longer than its share of the work
  return {sizes, d[0], d[1], d[2], d[3], d[4], d[5], d[6], int(worth < threads ? worth : threads)};
}

}  // namespace
