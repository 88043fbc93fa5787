// A transformer layer's feed-forward branch with its residual and normalisation, on the CPU, forward alone:
// LayerNorm(x + W2 relu(W1 x + b1) + b2), float32 and float64.
//
// Some rows at a time, so that what lies between the two products stays in a core's caches: for 11,340 rows and 1,024
// units it has 46 MB, and new memory of that size takes as long to get as a third of a product.
//
// Layouts, all contiguous: x and output (rows, C); W1 (F, C), b1 (F), W2 (C, F), b2 (C); scale and shift of the norm
// (C).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>

#include "export.h"
#include "gemm.h"
#include "vectors.h"

namespace {

using gemm::WIDTH;
using namespace vectors;

template <typename T>
std::unique_ptr<T[]> packed_transposed(const T* weight, int64_t outputs, int64_t inputs, int threads) {
  std::unique_ptr<T[]> packed(new T[gemm::packed_size<T>(inputs, outputs)]);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t first = 0; first < outputs; first += WIDTH<T>) {
    const int64_t number = std::min<int64_t>(WIDTH<T>, outputs - first);
    gemm::pack_panel(weight + first * inputs, 1, inputs, inputs, number, packed.get() + first * inputs);
  }
  return packed;
}

template <typename T>
void forward(const int64_t* sizes, int threads, double epsilon, const T* x, const T* w1, const T* b1, const T* w2,
             const T* b2, const T* scale, const T* shift, T* output) {
  typedef Vector<T> V;
  constexpr int S = LANES<T>;
  const int64_t rows = sizes[0], channels = sizes[1], units = sizes[2];
  const auto first_weight = packed_transposed(w1, units, channels, threads);
  const auto second_weight = packed_transposed(w2, channels, units, threads);
  // Half a MiB between the products at most, and work for every thread. A stride that is no power of two: rows would
  // otherwise meet in the same places of the first cache.
  const int64_t stride = (units + S - 1) / S * S + S;
  const int64_t most = std::max<int64_t>(1, (1 << 19) / (stride * sizeof(T)) / gemm::ROWS) * gemm::ROWS;
  const int64_t share = (rows / (4 * threads) / gemm::ROWS + 1) * gemm::ROWS;
  const int64_t of_block = std::min({most, share, int64_t(96)});

#pragma omp parallel num_threads(threads)
  {
    const std::unique_ptr<T[]> hidden(new T[of_block * stride]), biases(new T[stride + WIDTH<T>]());
    std::copy_n(b1, units, biases.get());
#pragma omp for schedule(dynamic, 1)
    for (int64_t first = 0; first < rows; first += of_block) {
      const int64_t number = std::min(of_block, rows - first);
      const T* input = x + first * channels;
      T* result = output + first * channels;
      for (int64_t unit = 0; unit < units; unit += WIDTH<T>) {
        const int64_t columns = std::min<int64_t>(WIDTH<T>, units - unit);
        const V left = load(biases.get() + unit), right = load(biases.get() + unit + S);
        gemm::in_rows<T>(number, [&](int64_t row, auto& tile) {
          tile.zero();
          tile.multiply(input + row * channels, channels, 1, first_weight.get() + unit * channels, channels);
          for (auto& sums : tile.sums) {
            const V a = sums[0] + left, b = sums[1] + right;
            sums[0] = a < 0 ? V{} : a;  // so that what is no number stays none
            sums[1] = b < 0 ? V{} : b;
          }
          tile.store_to(hidden.get() + row * stride + unit, stride, columns);
        });
      }
      for (int64_t row = 0; row < number; ++row) {
        for (int64_t c = 0; c < channels; ++c) result[row * channels + c] = input[row * channels + c] + b2[c];
      }
      gemm::product<T>(number, channels, units, hidden.get(), stride, 1, second_weight.get(), result, channels, true);
      for (int64_t row = 0; row < number; ++row) {
        T* y = result + row * channels;
        T sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t c = 0; c < channels; ++c) sum += y[c];
        const T mean = sum / T(channels);
#pragma omp simd reduction(+ : squares)
        for (int64_t c = 0; c < channels; ++c) squares += (y[c] - mean) * (y[c] - mean);
        const T factor = 1 / std::sqrt(squares / T(channels) + T(epsilon));
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) y[c] = (y[c] - mean) * factor * scale[c] + shift[c];
      }
    }
  }
}

}  // namespace

// sizes: rows, C, F.
#define EXPORT_FOR(T, NAME)                                                                                           \
  EXPORT void feed_forward_##NAME(const int64_t* sizes, int threads, double epsilon, const T* x, const T* w1,         \
                                  const T* b1, const T* w2, const T* b2, const T* scale, const T* shift, T* output) { \
    forward<T>(sizes, threads, epsilon, x, w1, b1, w2, b2, scale, shift, output);                                     \
  }

EXPORT_FOR(float, float32)
EXPORT_FOR(double, float64)
