// 3x3 convolutions of stride 1 on the CPU with a quarter of the multiplications: Winograd's F(4x4, 3x3), after Lavin
// and Gray, "Fast algorithms for convolutional neural networks", CVPR 2016. float32 and float64.
//
// A tile of 4x4 outputs takes 6x6 inputs d and the 3x3 weights g:  Y = A^T ((G g G^T) * (B^T d B)) A, * of each of the
// 36 elements. Summed over channels, each element is a matrix product of its own, tiles x C by C x O. The 36 products
// are of blocks that stay in the caches from the transform that makes them to the one that uses them up.
//
// Padding is the dilation, so the output is as large as the input. A map of dilation D falls into D x D maps without,
// interleaved; here they differ only in where a tile lies.
//
// Layouts: maps (B, H, W, C), contiguous; weights by strides. The gradient of the input is the same convolution, of the
// gradient of the output with the weights turned by half a turn and O and C exchanged, which is a matter of strides.
// The sums of no element are shared between threads, and no order depends on how many there are.

#include <cstdint>

#include "export.h"
#include "gemm.h"
#include "scratch.h"
#include "vectors.h"

namespace {

constexpr int IN = 6, OUT = 4, POINTS = IN * IN;

// Interpolation points 0, a, -a, b, -b and infinity. Powers of two would save nothing here, and with 5/8 and 3/2, all
// of whose factors are exact, the largest error in float32 is a fifth of that with 1 and 2.
constexpr double a = 0.625, b = 1.5, aa = a * a, bb = b * b;

template <typename T>
using Numbers = vectors::Vector<T>;
template <typename T>
constexpr int SIZE = vectors::LANES<T>;
template <typename T>
constexpr int WIDTH = gemm::WIDTH<T>;
template <typename T>
constexpr int64_t LINE = 64 / sizeof(T);  // of the caches

inline int64_t least(int64_t x, int64_t y) { return x < y ? x : y; }

// One line of each transform; `V` is a vector of channels. Lines are `step` vectors apart.

template <typename T, typename V>
inline void input_line(const V* d, int step, V* out, int out_step) {  // B^T d, 6 -> 6
  const V d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step], d5 = d[5 * step];
  const V even_a = d4 - T(bb) * d2, odd_a = T(a) * d3 - T(a * bb) * d1;
  const V even_b = d4 - T(aa) * d2, odd_b = T(b) * d3 - T(b * aa) * d1;
  out[0] = d4 - T(aa + bb) * d2 + T(aa * bb) * d0;
  out[out_step] = even_a + odd_a;
  out[2 * out_step] = even_a - odd_a;
  out[3 * out_step] = even_b + odd_b;
  out[4 * out_step] = even_b - odd_b;
  out[5 * out_step] = d5 - T(aa + bb) * d3 + T(aa * bb) * d1;
}

template <typename T, typename V>
inline void output_line(const V* m, int step, V* out, int out_step) {  // A^T m, 6 -> 4
  const V plus_a = m[step] + m[2 * step], minus_a = m[step] - m[2 * step];
  const V plus_b = m[3 * step] + m[4 * step], minus_b = m[3 * step] - m[4 * step];
  out[0] = m[0] + plus_a + plus_b;
  out[out_step] = T(a) * minus_a + T(b) * minus_b;
  out[2 * out_step] = T(aa) * plus_a + T(bb) * plus_b;
  out[3 * out_step] = T(aa * a) * minus_a + T(bb * b) * minus_b + m[5 * step];
}

template <typename T, typename V>
inline void gradient_line(const V* y, int step, V* out, int out_step) {  // A y, 4 -> 6
  const V y0 = y[0], y1 = y[step], y2 = y[2 * step], y3 = y[3 * step];
  const V even_a = y0 + T(aa) * y2, odd_a = T(a) * y1 + T(aa * a) * y3;
  const V even_b = y0 + T(bb) * y2, odd_b = T(b) * y1 + T(bb * b) * y3;
  out[0] = y0;
  out[out_step] = even_a + odd_a;
  out[2 * out_step] = even_a - odd_a;
  out[3 * out_step] = even_b + odd_b;
  out[4 * out_step] = even_b - odd_b;
  out[5 * out_step] = y3;
}

constexpr double at_0 = 1 / (aa * bb), at_a = 1 / (2 * aa * (aa - bb)), at_b = 1 / (2 * bb * (bb - aa));

template <typename T, typename V>
inline void weight_line(const V* g, int step, V* out, int out_step) {  // G g, 3 -> 6
  const V g0 = g[0], g1 = g[step], g2 = g[2 * step];
  const V even_a = T(at_a) * g0 + T(at_a * aa) * g2, odd_a = T(at_a * a) * g1;
  const V even_b = T(at_b) * g0 + T(at_b * bb) * g2, odd_b = T(at_b * b) * g1;
  out[0] = T(at_0) * g0;
  out[out_step] = even_a + odd_a;
  out[2 * out_step] = even_a - odd_a;
  out[3 * out_step] = even_b + odd_b;
  out[4 * out_step] = even_b - odd_b;
  out[5 * out_step] = g2;
}

template <typename T, typename V>
inline void weight_gradient_line(const V* u, int step, V* out, int out_step) {  // G^T u, 6 -> 3
  const V plus_a = T(at_a) * (u[step] + u[2 * step]), minus_a = T(at_a * a) * (u[step] - u[2 * step]);
  const V plus_b = T(at_b) * (u[3 * step] + u[4 * step]), minus_b = T(at_b * b) * (u[3 * step] - u[4 * step]);
  out[0] = T(at_0) * u[0] + plus_a + plus_b;
  out[out_step] = minus_a + minus_b;
  out[2 * out_step] = T(aa) * plus_a + T(bb) * plus_b + u[5 * step];
}

// A square of FROM x FROM vectors to one of TO x TO, by one of the lines above in both directions.
#define BOTH_WAYS(LINE, FROM, TO, from, to)                                                                 \
  do {                                                                                                      \
    Numbers<T> half_[TO * FROM];                                                                            \
    _Pragma("GCC unroll 6") for (int i_ = 0; i_ < FROM; ++i_) LINE<T>(from + i_, FROM, half_ + i_, FROM);   \
    _Pragma("GCC unroll 6") for (int i_ = 0; i_ < TO; ++i_) LINE<T>(half_ + i_ * FROM, 1, to + i_ * TO, 1); \
  } while (false)

struct Shape {
  int64_t batch, height, width, channels, outputs, dilation, relu;
  int64_t weight_start, weight_o, weight_c, weight_tap;  // where the first tap is, and strides
  int64_t scale_o, scale_c;  // of the factors: they belong to O, or (1 and 0 exchanged) to C

  int64_t rows() const {
    return gemm::panels(gemm::panels(height, dilation), OUT);
  }  // of tiles, of one interleaved map
  int64_t columns() const { return gemm::panels(gemm::panels(width, dilation), OUT); }
  int64_t tiles() const { return batch * dilation * dilation * rows() * columns(); }
};

// Where a tile's cells lie in a map: offsets in pixels, -1 outside.
struct Place {
  int64_t image, y, x;

  Place(const Shape& s, int64_t tile) {
    const int64_t column = tile % s.columns();
    tile /= s.columns();
    const int64_t row = tile % s.rows();
    tile /= s.rows();
    x = tile % s.dilation + column * OUT * s.dilation;
    tile /= s.dilation;
    y = tile % s.dilation + row * OUT * s.dilation;
    image = tile / s.dilation;
  }

  int64_t pixel(const Shape& s, int64_t down, int64_t right) const {
    const int64_t i = y + down * s.dilation, j = x + right * s.dilation;
    return i < 0 || j < 0 || i >= s.height || j >= s.width ? -1 : (image * s.height + i) * s.width + j;
  }
};

// How far apart the 36 elements lie, of which each has `size` numbers: an odd number of lines. Each transform touches
// all 36 at once, and they must not fall into the same few sets of the caches.
template <typename T>
inline int64_t spread(int64_t size) {
  return (gemm::panels(size, LINE<T>) | 1) * LINE<T>;
}

// Transformed tiles: for each of the 36 elements panels of WIDTH channels, tiles x WIDTH. As A of a product a panel has
// the tiles as rows, as B (of the weights' gradient) it is packed as that wants it.
template <typename T>
struct Tiles {
  T* data;
  int64_t channels, capacity;

  int64_t step() const { return spread<T>(gemm::panels(channels, WIDTH<T>) * capacity * WIDTH<T>); }
  T* panel(int64_t point, int64_t panel) const { return data + point * step() + panel * capacity * WIDTH<T>; }
  int64_t size() const { return POINTS * step(); }
  static int64_t bytes_of_tile(int64_t channels) {
    return POINTS * gemm::panels(channels, WIDTH<T>) * WIDTH<T> * sizeof(T);
  }
};

// Tiles `first` to `last` of a map into `to`, from its tile `at` on: inputs of 6x6 cells, or gradients of 4x4.
template <typename T, int CELLS>
void transform_tiles(const Shape& s, const T* map, int64_t first, int64_t last, const Tiles<T>& to, int64_t at) {
  constexpr int BEFORE = CELLS == IN ? 1 : 0;
  const int64_t channels = to.channels, step = to.step();
  alignas(64) static const T zeros[SIZE<T>] = {};
  for (int64_t tile = first; tile < last; ++tile, ++at) {
    const Place place(s, tile);
    const T* cells[CELLS * CELLS];
    int64_t steps[CELLS * CELLS];
    for (int i = 0; i < CELLS * CELLS; ++i) {
      const int64_t pixel = place.pixel(s, i / CELLS - BEFORE, i % CELLS - BEFORE);
      cells[i] = pixel < 0 ? zeros : map + pixel * channels;
      steps[i] = pixel < 0 ? 0 : 1;
    }
    for (int64_t c = 0; c < channels; c += SIZE<T>) {
      Numbers<T> from[CELLS * CELLS], result[POINTS];
      for (int i = 0; i < CELLS * CELLS; ++i) from[i] = vectors::load(cells[i] + c * steps[i]);
      if constexpr (CELLS == IN) {
        BOTH_WAYS(input_line, IN, IN, from, result);
      } else {
        BOTH_WAYS(gradient_line, OUT, IN, from, result);
      }
      T* target = to.panel(0, c / WIDTH<T>) + at * WIDTH<T> + c % WIDTH<T>;
      for (int i = 0; i < POINTS; ++i) vectors::store(target + i * step, result[i]);
    }
  }
}

constexpr int64_t SOME = 16;  // input channels whose weights are read together

// Weights of WIDTH outputs, from `output` on, and of SOME inputs, from `channel` on, transformed: for each of the 36
// elements lines `line` and on of a packed panel of `depth` lines. Outputs there are not count as zeros.
template <typename T>
void transform_weights(const Shape& s, const T* weights, const T* scale, int64_t output, int64_t channel, T* panels,
                       int64_t depth, int64_t line) {
  constexpr int W = WIDTH<T>;
  alignas(64) T taps[SOME][9][W], factors[W] = {};
  const int64_t outputs = least(W, s.outputs - output), step = spread<T>(depth * W);
  const T* from = weights + s.weight_start + output * s.weight_o + channel * s.weight_c;
  if (outputs < W) std::memset(taps, 0, sizeof(taps));
  if (s.weight_o == 1) {
    for (int64_t c = 0; c < SOME; ++c) {
      for (int tap = 0; tap < 9; ++tap) {
        std::memcpy(taps[c][tap], from + c * s.weight_c + tap * s.weight_tap, outputs * sizeof(T));
      }
    }
  } else {
    for (int64_t o = 0; o < outputs; ++o) {
      for (int tap = 0; tap < 9; ++tap) {
        const T* const line = from + o * s.weight_o + tap * s.weight_tap;
        __builtin_prefetch(line + s.weight_o);  // too far away for the processor to see it coming
        for (int64_t c = 0; c < SOME; ++c) taps[c][tap][o] = line[c * s.weight_c];
      }
    }
  }
  for (int64_t c = 0; c < SOME; ++c) {
    for (int64_t o = 0; o < outputs; ++o) factors[o] = scale[(output + o) * s.scale_o + (channel + c) * s.scale_c];
    for (int o = 0; o < W; o += SIZE<T>) {
      const Numbers<T> factor = vectors::load(factors + o);
      Numbers<T> from_taps[9], result[POINTS];
      for (int tap = 0; tap < 9; ++tap) from_taps[tap] = factor * vectors::load(&taps[c][tap][o]);
      BOTH_WAYS(weight_line, 3, IN, from_taps, result);
      T* const target = panels + (line + c) * W + o;
      for (int i = 0; i < POINTS; ++i) vectors::store(target + i * step, result[i]);
    }
  }
}

// `count` tiles, from `at` on, times one panel of weights: sums (36, count, WIDTH) `step` apart, of `depth` channels
// from `channel` on; added to what is there unless these are the first.
template <typename T>
void multiply(const Tiles<T>& input, int64_t at, int64_t count, int64_t channel, int64_t depth, const T* panels,
              T* sums, int64_t step) {
  constexpr int W = WIDTH<T>;
  for (int point = 0; point < POINTS; ++point) {
    gemm::in_rows<T>(count, [&](int64_t row, auto& tile) {
      T* const to = sums + point * step + row * W;
      if (channel == 0) {
        tile.zero();
      } else {
        tile.load_from(to, W);
      }
      const T* weights = panels + point * spread<T>(depth * W);
      for (int64_t c = 0; c < depth; c += W) {
        const T* const from = input.panel(point, (channel + c) / W) + (at + row) * W;
        if (c + W < depth) {  // a panel's rows are too short a piece of memory for the processor to see them coming
          for (int64_t i = 0; i < gemm::ROWS * W; i += LINE<T>) __builtin_prefetch(from + input.capacity * W + i);
        }
        tile.multiply(from, W, 1, weights + c * W, least(W, depth - c));
      }
      tile.store_to(to, W);
    });
  }
}

// Sums of `count` tiles, the map's from `first` on, to WIDTH outputs of them.
template <typename T>
void finish(const Shape& s, int64_t first, int64_t count, int64_t output, const T* shift, const T* sums, int64_t step,
            T* map) {
  constexpr int W = WIDTH<T>;
  const Numbers<T> zero = {};
  for (int64_t tile = 0; tile < count; ++tile) {
    const Place place(s, first + tile);
    T* cells[OUT * OUT];
    for (int i = 0; i < OUT * OUT; ++i) {
      const int64_t pixel = place.pixel(s, i / OUT, i % OUT);
      cells[i] = pixel < 0 ? nullptr : map + pixel * s.outputs + output;
    }
    for (int64_t o = 0; o < W && output + o < s.outputs; o += SIZE<T>) {
      Numbers<T> from[POINTS], result[OUT * OUT];
      for (int i = 0; i < POINTS; ++i) from[i] = vectors::load(sums + i * step + tile * W + o);
      BOTH_WAYS(output_line, IN, OUT, from, result);
      const Numbers<T> bias = shift ? vectors::load(shift + output + o) : zero;
      for (int i = 0; i < OUT * OUT; ++i) {
        if (!cells[i]) continue;
        const Numbers<T> y = result[i] + bias;
        vectors::store(cells[i] + o, s.relu ? (y < zero ? zero : y) : y);
      }
    }
  }
}

constexpr int64_t KEPT = 4 << 20;     // transformed weights of at most so many bytes are made once, and all are kept
constexpr int64_t IN_CORE = 450000;   // bytes of a block of transformed tiles, in the cache of a core
constexpr int64_t SHARED = 10 << 20;  // the same in the cache of all cores
constexpr int64_t BLOCK = 4 * gemm::ROWS, DEPTH = 128;  // tiles and channels of a product

// How many tiles of `size` bytes fit: a multiple of ROWS, at least ROWS.
inline int64_t fitting(int64_t bytes, int64_t size, int64_t tiles) {
  const int64_t rows = gemm::panels(least(bytes / size, tiles), gemm::ROWS);
  return (rows < 1 ? 1 : rows) * gemm::ROWS;
}

// Few weights: every thread takes blocks of tiles through all three phases.
template <typename T>
void convolve_by_tiles(const Shape& s, int threads, const T* map, const T* weights, const T* scale, const T* shift,
                       T* out) {
  constexpr int W = WIDTH<T>;
  const int64_t tiles = s.tiles(), out_panels = gemm::panels(s.outputs, W);
  const int64_t of_panel = POINTS * spread<T>(s.channels * W);
  const int64_t block = fitting(IN_CORE, Tiles<T>::bytes_of_tile(s.channels), tiles);
  const int64_t of_block = Tiles<T>{nullptr, s.channels, block}.size(), step = spread<T>(block * W);
  const int64_t own = of_block + POINTS * step;
  Scratch<T> scratch(out_panels * of_panel + threads * own);
  const int64_t some = s.channels / SOME;
  int64_t next = 0;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < out_panels * some; ++i) {
      const int64_t channel = i % some * SOME;
      T* const panel = scratch.start + i / some * of_panel;
      transform_weights(s, weights, scale, i / some * W, channel, panel, s.channels, channel);
    }
    int64_t number;
#pragma omp atomic capture
    number = next++;
    const Tiles<T> input{scratch.start + out_panels * of_panel + number * own, s.channels, block};
    T* const sums = input.data + of_block;
#pragma omp for schedule(dynamic, 1)
    for (int64_t first = 0; first < tiles; first += block) {
      const int64_t count = least(block, tiles - first);
      transform_tiles<T, IN>(s, map, first, first + count, input, 0);
      for (int64_t p = 0; p < out_panels; ++p) {
        multiply(input, 0, count, 0, s.channels, scratch.start + p * of_panel, sums, step);
        finish(s, first, count, p * W, shift, sums, step, out);
      }
    }
  }
}

// Many weights: as many tiles as the shared cache holds are transformed by all threads, then each takes panels of
// outputs, whose weights it transforms for itself.
template <typename T>
void convolve_by_weights(const Shape& s, int threads, const T* map, const T* weights, const T* scale, const T* shift,
                         T* out) {
  constexpr int W = WIDTH<T>;
  const int64_t tiles = s.tiles(), chunk = fitting(SHARED, Tiles<T>::bytes_of_tile(s.channels), tiles);
  const int64_t step = spread<T>(chunk * W), own = POINTS * (spread<T>(DEPTH * W) + step);
  const int64_t of_chunk = Tiles<T>{nullptr, s.channels, chunk}.size();
  Scratch<T> scratch(of_chunk + threads * own);
  const Tiles<T> input{scratch.start, s.channels, chunk};
  int64_t next = 0;
#pragma omp parallel num_threads(threads)
  {
    int64_t number;
#pragma omp atomic capture
    number = next++;
    T* const panels = scratch.start + of_chunk + number * own;
    T* const sums = panels + POINTS * spread<T>(DEPTH * W);
    for (int64_t begin = 0; begin < tiles; begin += chunk) {
      const int64_t all = least(chunk, tiles - begin);
#pragma omp for schedule(static)
      for (int64_t tile = 0; tile < all; ++tile) {
        transform_tiles<T, IN>(s, map, begin + tile, begin + tile + 1, input, tile);
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t o = 0; o < s.outputs; o += W) {
        for (int64_t c = 0; c < s.channels; c += DEPTH) {
          const int64_t depth = least(DEPTH, s.channels - c);
          for (int64_t line = 0; line < depth; line += SOME) {
            transform_weights(s, weights, scale, o, c + line, panels, depth, line);
          }
          for (int64_t at = 0; at < all; at += BLOCK) {
            multiply(input, at, least(BLOCK, all - at), c, depth, panels, sums + at * W, step);
          }
        }
        finish(s, begin, all, o, shift, sums, step, out);
      }
    }
  }
}

template <typename T>
void convolve(const Shape& s, int threads, const T* map, const T* weights, const T* scale, const T* shift, T* out) {
  const bool few = int64_t(POINTS * sizeof(T)) * s.channels * s.outputs <= KEPT;
  (few ? convolve_by_tiles<T> : convolve_by_weights<T>)(s, threads, map, weights, scale, shift, out);
}

// Gradient of WIDTH x WIDTH weights from `all` transformed tiles; added to what is there unless `begins`.
template <typename T>
void weight_block(const Shape& s, const Tiles<T>& input, const Tiles<T>& gradient, int64_t all, int64_t output,
                  int64_t channel, const T* scale, bool begins, T* sums, T* out) {
  constexpr int W = WIDTH<T>;
  const int64_t step = spread<T>(W * W);
  const int64_t outputs = least(W, s.outputs - output);
  for (int point = 0; point < POINTS; ++point) {
    const T* const from = gradient.panel(point, output / W);
    gemm::in_rows<T>(outputs, [&](int64_t row, auto& tile) {
      tile.zero();
      tile.multiply(from + row, 1, W, input.panel(point, channel / W), all);
      tile.store_to(sums + point * step + row * W, W);
    });
  }
  for (int64_t o = 0; o < outputs; ++o) {
    for (int64_t c = 0; c < W && channel + c < s.channels; c += SIZE<T>) {
      Numbers<T> from[POINTS], result[9];
      for (int i = 0; i < POINTS; ++i) from[i] = vectors::load(sums + i * step + o * W + c);
      BOTH_WAYS(weight_gradient_line, IN, 3, from, result);
      const T factor = scale[output + o];
      T* const target = out + (output + o) * s.weight_o + (channel + c) * s.weight_c;
      for (int tap = 0; tap < 9; ++tap) {
        T* const to = target + tap * s.weight_tap;
        const Numbers<T> value = factor * result[tap];
        if (s.weight_c == 1) {
          vectors::store(to, begins ? value : vectors::load(to) + value);
        } else {
          for (int i = 0; i < SIZE<T>; ++i) to[i * s.weight_c] = begins ? value[i] : to[i * s.weight_c] + value[i];
        }
      }
    }
  }
}

template <typename T>
void differentiate_weights(const Shape& s, int threads, const T* map, const T* gradient_map, const T* scale, T* out) {
  constexpr int W = WIDTH<T>;
  const int64_t of_tile = Tiles<T>::bytes_of_tile(s.channels) + Tiles<T>::bytes_of_tile(s.outputs);
  const int64_t tiles = s.tiles(), chunk = fitting(SHARED, of_tile, tiles), own = POINTS * spread<T>(W * W);
  Tiles<T> input{nullptr, s.channels, chunk}, gradient{nullptr, s.outputs, chunk};
  const int64_t shared = input.size() + gradient.size();
  Scratch<T> scratch(shared + threads * own);
  input.data = scratch.start;
  gradient.data = scratch.start + input.size();
  const int64_t channel_panels = gemm::panels(s.channels, W), out_panels = gemm::panels(s.outputs, W);
  int64_t next = 0;
#pragma omp parallel num_threads(threads)
  {
    int64_t number;
#pragma omp atomic capture
    number = next++;
    T* const sums = scratch.start + shared + number * own;
    for (int64_t begin = 0; begin < tiles; begin += chunk) {
      const int64_t all = least(chunk, tiles - begin);
#pragma omp for schedule(static)
      for (int64_t tile = 0; tile < all; ++tile) {
        transform_tiles<T, IN>(s, map, begin + tile, begin + tile + 1, input, tile);
        transform_tiles<T, OUT>(s, gradient_map, begin + tile, begin + tile + 1, gradient, tile);
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < channel_panels * out_panels; ++i) {
        const int64_t output = i / channel_panels * W, channel = i % channel_panels * W;
        weight_block(s, input, gradient, all, output, channel, scale, begin == 0, sums, out);
      }
    }
  }
}

}  // namespace

#define EXPORT_TYPE(NAME, T)                                                                                           \
  EXPORT void winograd_forward_##NAME(const Shape* shape, int threads, const T* map, const T* weights, const T* scale, \
                                      const T* shift, T* out) {                                                        \
    convolve(*shape, threads, map, weights, scale, shift, out);                                                        \
  }                                                                                                                    \
  EXPORT void winograd_weights_##NAME(const Shape* shape, int threads, const T* map, const T* gradient,                \
                                      const T* scale, T* out) {                                                        \
    differentiate_weights(*shape, threads, map, gradient, scale, out);                                                 \
  }

EXPORT_TYPE(float32, float)
EXPORT_TYPE(float64, double)
