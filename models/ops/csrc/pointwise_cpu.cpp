// 1x1 convolutions on the CPU, with what follows them in a residual block: factor and bias, the residual, ReLU. float32
// and float64. A map is read and written once; what is added to it never makes a pass of its own.
//
// Layouts: maps (pixels, C), contiguous; weights (O, C) by strides. Each sum is one thread's, in the order of C.

#include <cstdint>

#include "export.h"
#include "gemm.h"
#include "scratch.h"
#include "vectors.h"

namespace {

constexpr int64_t BLOCK = 4 * gemm::ROWS;  // pixels at a time: of 2048 channels 400 KB of float32

struct Shape {
  int64_t pixels, channels, outputs, relu, weight_o, weight_c;
};

template <typename T>
struct Maps {
  const T *input, *scale, *shift, *residual;  // the residual may be absent, and may be the output
  T* output;
};

inline int64_t least(int64_t x, int64_t y) { return x < y ? x : y; }

// Rows of a block as panels of WIDTH channels: rows that lie a power of two apart share too few lines of a cache.
template <typename T>
void gather(const T* rows, int64_t count, int64_t channels, T* panels) {
  constexpr int W = gemm::WIDTH<T>;
  for (int64_t row = 0; row < count; ++row) {
    for (int64_t c = 0; c < channels; c += W) {
      std::memcpy(panels + c * BLOCK + row * W, rows + row * channels + c, least(W, channels - c) * sizeof(T));
    }
  }
}

template <typename T>
void multiply(const Shape& s, const Maps<T>& maps, const T* panels, const T* weights, int64_t first, int64_t count,
              int64_t output) {
  constexpr int W = gemm::WIDTH<T>, SIZE = vectors::LANES<T>, LINE = 64 / sizeof(T);
  const int64_t vectors = least(W, s.outputs - output) / SIZE;
  const vectors::Vector<T> zero = {};
  gemm::in_rows<T>(count, [&](int64_t row, auto& tile) {
    constexpr int ROWS = sizeof(tile.sums) / sizeof(tile.sums[0]);
    const int64_t at = (first + row) * s.outputs + output;
    for (int64_t i = 0; i < ROWS; ++i) {  // on their way while the sums are made
      for (int64_t o = 0; o < vectors * SIZE; o += LINE) {
        __builtin_prefetch((maps.residual ? maps.residual : maps.output) + at + i * s.outputs + o);
      }
    }
    tile.zero();
    for (int64_t c = 0; c < s.channels; c += W) {
      tile.multiply(panels + c * BLOCK + row * W, W, 1, weights + c * W, least(W, s.channels - c));
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      if (half >= vectors) break;
      const int64_t o = half * SIZE;
      const auto scale = vectors::load(maps.scale + output + o), shift = vectors::load(maps.shift + output + o);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i) {
        auto y = tile.sums[i][half] * scale + shift;
        const int64_t target = at + i * s.outputs + o;
        if (maps.residual) y += vectors::load(maps.residual + target);
        vectors::store(maps.output + target, s.relu ? (y < zero ? zero : y) : y);
      }
    }
  });
}

template <typename T>
void convolve(const Shape& s, int threads, const T* weights, const Maps<T>& maps) {
  constexpr int W = gemm::WIDTH<T>;
  const int64_t of_weights = gemm::packed_size<T>(s.channels, s.outputs), own = gemm::packed_size<T>(BLOCK, s.channels);
  Scratch<T> scratch(of_weights + threads * own);
  int64_t next = 0;
#pragma omp parallel num_threads(threads)
  {
    int64_t number;
#pragma omp atomic capture
    number = next++;
    T* const panels = scratch.start + of_weights + number * own;
#pragma omp for schedule(static)
    for (int64_t o = 0; o < s.outputs; o += W) {
      gemm::pack_panel(weights + o * s.weight_o, s.weight_c, s.weight_o, s.channels, least(W, s.outputs - o),
                       scratch.start + o * s.channels);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t first = 0; first < s.pixels; first += BLOCK) {
      const int64_t count = least(BLOCK, s.pixels - first);
      gather(maps.input + first * s.channels, count, s.channels, panels);
      for (int64_t o = 0; o < s.outputs; o += W) {
        multiply(s, maps, panels, scratch.start + o * s.channels, first, count, o);
      }
    }
  }
}

}  // namespace

#define EXPORT_TYPE(NAME, T)                                                                                      \
  EXPORT void pointwise_##NAME(const Shape* shape, int threads, const T* weights, const T* input, const T* scale, \
                               const T* shift, const T* residual, T* output) {                                    \
    convolve<T>(*shape, threads, weights, {input, scale, shift, residual, output});                               \
  }

EXPORT_TYPE(float32, float)
EXPORT_TYPE(float64, double)
