// Dropout on the CPU, alone and after a ReLU, float32 and float64. Random numbers are drawn anew in backward.

#include <algorithm>
#include <cstdint>

#include "dropping.h"
#include "export.h"

namespace {

constexpr int64_t ROW = 1024;  // values that share a row of random numbers

// Calls work(first, count, factors) for all values, by as many threads as they are worth.
template <typename T, typename Work>
void in_rows(int64_t number, int threads, const dropping::Rule<T>& rule, const Work& work) {
  threads = int(std::min<int64_t>(threads, number / 32768 + 1));
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < (number + ROW - 1) / ROW; ++row) {
    T factors[ROW];
    const int64_t first = row * ROW, count = std::min(ROW, number - first);
    rule.draw(row, 0, count, factors);
    work(first, count, factors);
  }
}

template <typename T>
void dropout(int64_t number, int threads, const dropping::Rule<T>& rule, const T* from, T* to) {
  in_rows<T>(number, threads, rule, [=](int64_t first, int64_t count, const T* factors) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) to[first + i] = from[first + i] * factors[i];
  });
}

template <typename T>
void relu_dropout(int64_t number, int threads, const dropping::Rule<T>& rule, T* x) {
  in_rows<T>(number, threads, rule, [=](int64_t first, int64_t count, const T* factors) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) x[first + i] = x[first + i] < 0 ? T(0) : x[first + i] * factors[i];
  });
}

// Of the result alone: what was negative and what was dropped are both 0 in it.
template <typename T>
void relu_dropout_backward(int64_t number, int threads, T kept, const T* result, const T* given, T* gradient) {
  threads = int(std::min<int64_t>(threads, number / 32768 + 1));
#pragma omp parallel for simd num_threads(threads) schedule(static)
  for (int64_t i = 0; i < number; ++i) gradient[i] = result[i] <= 0 ? T(0) : given[i] * kept;
}

}  // namespace

#define EXPORT_FOR(T, NAME)                                                                                           \
  EXPORT void dropout_##NAME(int64_t number, int threads, double probability, const int64_t* seed, const T* from,     \
                             T* to) {                                                                                 \
    dropout<T>(number, threads, dropping::Rule<T>(seed, probability), from, to);                                      \
  }                                                                                                                   \
  EXPORT void relu_dropout_##NAME(int64_t number, int threads, double probability, const int64_t* seed, T* x) {       \
    relu_dropout<T>(number, threads, dropping::Rule<T>(seed, probability), x);                                        \
  }                                                                                                                   \
  EXPORT void relu_dropout_backward_##NAME(int64_t number, int threads, double probability, const T* result,          \
                                           const T* given, T* gradient) {                                             \
    relu_dropout_backward<T>(number, threads, dropping::Rule<T>(nullptr, probability).kept, result, given, gradient); \
  }

EXPORT_FOR(float, float32)
EXPORT_FOR(double, float64)
