// Multi-scale deformable attention on the CPU, forward and backward, float32 and float64.
//
// Knows nothing of PyTorch: C functions on plain pointers, called through ctypes. It therefore compiles in seconds with
// any C++17 compiler and outlives every change of PyTorch's own interface.
//
// Layouts, all contiguous: value (B, L, N, C); locations (B, Q, N, levels, points, xy) as fractions of a level's size;
// weights (B, Q, N, levels, points); output (B, Q, N, C). A point lies at location * size - 0.5 in cells and is
// interpolated between four cells; cells outside the map count as 0.
//
// No sum is shared between threads and no order depends on how many there are, so results are the same to the bit:
// forward splits the queries; backward splits batch x head x level, which no two tasks write to in common.

#include <cmath>
#include <cstdint>

#include "../export.h"
#include "../memory.h"

namespace {

struct Problem {
  const int64_t* sizes;  // height, width of each level
  int64_t batch, length, heads, channels, levels, queries, points;
  int threads;
};

Problem problem(const int64_t* sizes, const int64_t* dimensions, int threads) {
  const int64_t* d = dimensions;  // B, L, N, C, levels, Q, points
  const int64_t cells = d[0] * d[2] * d[3] * d[4] * d[5] * d[6];  // a quarter of the numbers that are read
  const int64_t worth = cells / 32768 + 1;  // for less, waking a thread takes longer than its share of the work
  return {sizes, d[0], d[1], d[2], d[3], d[4], d[5], d[6], int(worth < threads ? worth : threads)};
}

// The four cells around a point, top left first, and their shares of it. A cell outside the map has row -1.
template <typename T>
struct Sample {
  int64_t row[4];
  T share[4];
  T right, down;  // distance from the top left cell, in cells
  bool inside;    // all four cells exist
};

// location * size - 0.5, rounded as by PyTorch's grid_sample on this kind of CPU, which the published code takes there.
// At the published initialisation all points lie at cells' centres, where rounding decides between two gradients.
template <typename T>
inline T in_cells(T location, int64_t size) {
  const T place = (2 * location - 1) + 1;
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return std::fma(place, T(size) / 2, T(-0.5));
#else
  return place * (T(size) / 2) - T(0.5);
#endif
}

// False where the point touches no cell, also where its location is infinite or not a number. A point one cell before
// the first still has a gradient, as in grid_sample: on maps of 4, 8, ... cells the published points lie just there.
template <typename T>
inline bool locate(T x, T y, int64_t height, int64_t width, Sample<T>& sample) {
  x = in_cells(x, width);
  y = in_cells(y, height);
  if (!(x >= T(-1) && y >= T(-1) && x < T(width) && y < T(height))) return false;
  const T left = std::floor(x), top = std::floor(y);
  const int64_t column = int64_t(left), line = int64_t(top);
  const T right = x - left, down = y - top;
  const int64_t row = line * width + column;
  sample.right = right;
  sample.down = down;
  sample.share[0] = (1 - down) * (1 - right);
  sample.share[1] = (1 - down) * right;
  sample.share[2] = down * (1 - right);
  sample.share[3] = down * right;
  sample.row[0] = row;
  sample.row[1] = row + 1;
  sample.row[2] = row + width;
  sample.row[3] = row + width + 1;
  sample.inside = column >= 0 && line >= 0 && column < width - 1 && line < height - 1;
  if (!sample.inside) {
    if (column < 0) sample.row[0] = sample.row[2] = -1;
    if (line < 0) sample.row[0] = sample.row[1] = -1;
    if (column >= width - 1) sample.row[1] = sample.row[3] = -1;
    if (line >= height - 1) sample.row[2] = sample.row[3] = -1;
  }
  return true;
}

// `width` channels (at most WIDTH; equal to it where FULL) of one head of one query. `value` points to these channels
// of the head's first row, `stride` leads to the next row.
template <typename T, int WIDTH, bool FULL>
inline void gather(const Sample<T>* samples, int64_t count, const T* value, int64_t stride, int width, T* out) {
  const int end = FULL ? WIDTH : width;
  T sum[WIDTH] = {};
  for (int64_t i = 0; i < count; ++i) {
    const Sample<T>& s = samples[i];
    if (s.inside) {
      const T* a = value + s.row[0] * stride;
      const T* b = value + s.row[1] * stride;
      const T* c = value + s.row[2] * stride;
      const T* d = value + s.row[3] * stride;
      const T wa = s.share[0], wb = s.share[1], wc = s.share[2], wd = s.share[3];
#pragma omp simd
      for (int k = 0; k < end; ++k) sum[k] += wa * a[k] + wb * b[k] + wc * c[k] + wd * d[k];
    } else {
      for (int corner = 0; corner < 4; ++corner) {
        if (s.row[corner] < 0) continue;
        const T* a = value + s.row[corner] * stride;
        const T w = s.share[corner];
#pragma omp simd
        for (int k = 0; k < end; ++k) sum[k] += w * a[k];
      }
    }
  }
#pragma omp simd
  for (int k = 0; k < end; ++k) out[k] = sum[k];
}

template <typename T>
void forward(const Problem& p, const T* value, const T* locations, const T* weights, T* out) {
  const int64_t stride = p.heads * p.channels;
  const memory::Rooms<Sample<T>> rooms(p.threads, p.levels * p.points);
#pragma omp parallel num_threads(p.threads)
  {
    Sample<T>* const samples = rooms.mine().take(p.levels * p.points).get();
#pragma omp for schedule(dynamic, 64)
    for (int64_t bq = 0; bq < p.batch * p.queries; ++bq) {
      for (int64_t n = 0; n < p.heads; ++n) {
        const int64_t first = (bq * p.heads + n) * p.levels * p.points;
        int64_t count = 0, start = 0;
        for (int64_t level = 0; level < p.levels; ++level) {
          const int64_t height = p.sizes[2 * level], width = p.sizes[2 * level + 1];
          for (int64_t i = first + level * p.points; i < first + (level + 1) * p.points; ++i) {
            Sample<T>& s = samples[count];
            if (!locate(locations[2 * i], locations[2 * i + 1], height, width, s)) continue;
            for (int corner = 0; corner < 4; ++corner) {
              s.share[corner] *= weights[i];
              if (s.row[corner] >= 0) s.row[corner] += start;
            }
            ++count;
          }
          start += height * width;
        }
        const T* head = value + bq / p.queries * p.length * stride + n * p.channels;
        T* target = out + (bq * p.heads + n) * p.channels;
        int64_t c = 0;
        for (; c + 32 <= p.channels; c += 32) gather<T, 32, true>(samples, count, head + c, stride, 32, target + c);
        for (; c + 8 <= p.channels; c += 8) gather<T, 8, true>(samples, count, head + c, stride, 8, target + c);
        if (c < p.channels)
          gather<T, 8, false>(samples, count, head + c, stride, int(p.channels - c), target + c);
      }
    }
  }
}

// Adds share * g to the gradient of each cell, and g . value of each cell to dot.
template <typename T, int WIDTH, bool FULL>
inline void scatter(const Sample<T>& s, T weight, const T* g, const T* value, T* grad_value, int64_t stride, int width,
                    T dot[4]) {
  const int end = FULL ? WIDTH : width;
  if (s.inside) {
    const T *a = value + s.row[0] * stride, *b = value + s.row[1] * stride;
    const T *c = value + s.row[2] * stride, *d = value + s.row[3] * stride;
    T *ga = grad_value + s.row[0] * stride, *gb = grad_value + s.row[1] * stride;
    T *gc = grad_value + s.row[2] * stride, *gd = grad_value + s.row[3] * stride;
    const T wa = weight * s.share[0], wb = weight * s.share[1], wc = weight * s.share[2], wd = weight * s.share[3];
    T da = 0, db = 0, dc = 0, dd = 0;
#pragma omp simd reduction(+ : da, db, dc, dd)
    for (int k = 0; k < end; ++k) {
      da += g[k] * a[k];
      db += g[k] * b[k];
      dc += g[k] * c[k];
      dd += g[k] * d[k];
      ga[k] += wa * g[k];
      gb[k] += wb * g[k];
      gc[k] += wc * g[k];
      gd[k] += wd * g[k];
    }
    dot[0] += da;
    dot[1] += db;
    dot[2] += dc;
    dot[3] += dd;
    return;
  }
  for (int corner = 0; corner < 4; ++corner) {
    if (s.row[corner] < 0) continue;
    const T* a = value + s.row[corner] * stride;
    T* ga = grad_value + s.row[corner] * stride;
    const T w = weight * s.share[corner];
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int k = 0; k < end; ++k) {
      sum += g[k] * a[k];
      ga[k] += w * g[k];
    }
    dot[corner] += sum;
  }
}

// grad_value must hold zeros; the other two are overwritten.
template <typename T>
void backward(const Problem& p, const T* grad_out, const T* value, const T* locations, const T* weights, T* grad_value,
              T* grad_locations, T* grad_weights) {
  const int64_t stride = p.heads * p.channels;
#pragma omp parallel for num_threads(p.threads) schedule(dynamic, 1)
  for (int64_t task = 0; task < p.batch * p.heads * p.levels; ++task) {
    const int64_t b = task / (p.heads * p.levels), n = task / p.levels % p.heads, level = task % p.levels;
    const int64_t height = p.sizes[2 * level], width = p.sizes[2 * level + 1];
    int64_t start = 0;
    for (int64_t i = 0; i < level; ++i) start += p.sizes[2 * i] * p.sizes[2 * i + 1];
    const int64_t offset = (b * p.length + start) * stride + n * p.channels;
    const T* map = value + offset;
    T* grad_map = grad_value + offset;

    for (int64_t q = 0; q < p.queries; ++q) {
      const int64_t row = (b * p.queries + q) * p.heads + n;
      const T* g = grad_out + row * p.channels;
      for (int64_t i = (row * p.levels + level) * p.points; i < (row * p.levels + level + 1) * p.points; ++i) {
        Sample<T> s;
        if (!locate(locations[2 * i], locations[2 * i + 1], height, width, s)) {
          grad_locations[2 * i] = grad_locations[2 * i + 1] = grad_weights[i] = 0;
          continue;
        }
        const T weight = weights[i];
        T dot[4] = {};
        int64_t c = 0;
        for (; c + 32 <= p.channels; c += 32)
          scatter<T, 32, true>(s, weight, g + c, map + c, grad_map + c, stride, 32, dot);
        for (; c + 8 <= p.channels; c += 8)
          scatter<T, 8, true>(s, weight, g + c, map + c, grad_map + c, stride, 8, dot);
        if (c < p.channels)
          scatter<T, 8, false>(s, weight, g + c, map + c, grad_map + c, stride, int(p.channels - c), dot);
        grad_weights[i] = s.share[0] * dot[0] + s.share[1] * dot[1] + s.share[2] * dot[2] + s.share[3] * dot[3];
        const T along_x = (1 - s.down) * (dot[1] - dot[0]) + s.down * (dot[3] - dot[2]);
        const T along_y = (1 - s.right) * (dot[2] - dot[0]) + s.right * (dot[3] - dot[1]);
        grad_locations[2 * i] = weight * T(width) * along_x;
        grad_locations[2 * i + 1] = weight * T(height) * along_y;
      }
    }
  }
}

}  // namespace

#define EXPORT_FOR(T, NAME)                                                                                          \
  EXPORT int ms_deform_attn_forward_##NAME(const int64_t* sizes, const int64_t* dimensions, int threads,             \
                                           const T* value, const T* locations, const T* weights, T* out) {           \
    return memory::status_of(                                                                                        \
        [&] { forward<T>(problem(sizes, dimensions, threads), value, locations, weights, out); });                   \
  }                                                                                                                  \
  EXPORT int ms_deform_attn_backward_##NAME(const int64_t* sizes, const int64_t* dimensions, int threads,            \
                                            const T* grad_out, const T* value, const T* locations, const T* weights, \
                                            T* grad_value, T* grad_locations, T* grad_weights) {                     \
    return memory::status_of([&] {                                                                                   \
      backward<T>(problem(sizes, dimensions, threads), grad_out, value, locations, weights, grad_value,              \
                  grad_locations, grad_weights);                                                                     \
    });                                                                                                              \
  }

EXPORT_FOR(float, float32)
EXPORT_FOR(double, float64)
