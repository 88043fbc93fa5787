// Multi-scale deformable attention on the CPU from what its projections give: softmax and locations are computed for
// one query at a time, in a few kilobytes, and never written out. Forward and backward, float32 and float64.
//
// Layouts, all contiguous: value (B, L, N, C); padding (B, L), a byte each, or none; reference (B, Q, levels, 2 or 4);
// offsets (B, Q, N, levels, points, xy); logits (B, Q, N, levels, points); output (B, Q, N, C). A cell outside its map
// and a padded one count as 0.
//
// No sum is shared between threads and no order depends on how many there are, so results are the same to the bit:
// all is split by query, but for the gradient of the value, which is split by batch x head x level.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "exponential.h"
#include "export.h"
#include "problem.h"
#include "vectors.h"

namespace {

using namespace vectors;

// weights = softmax of each of `heads` rows of `points` logits. There must be room for whole registers.
template <typename T>
inline void softmax(const T* logits, int64_t heads, int64_t points, T* weights) {
  for (int64_t n = 0; n < heads; ++n) {
    const T* row = logits + n * points;
    T largest = row[0];
    for (int64_t i = 1; i < points; ++i) largest = row[i] > largest ? row[i] : largest;
    for (int64_t i = 0; i < points; ++i) weights[n * points + i] = row[i] - largest;
  }
  std::fill(weights + heads * points, weights + whole<T>(heads * points), T(0));
  for (int64_t i = 0; i < heads * points; i += LANES<T>) store(weights + i, exponential::exp<T>(load(weights + i)));
  for (int64_t n = 0; n < heads; ++n) {
    T* row = weights + n * points;
    T sum = 0;
    for (int64_t i = 0; i < points; ++i) sum += row[i];
    const T share = 1 / sum;
    for (int64_t i = 0; i < points; ++i) row[i] *= share;
  }
}

// A list of points: their places in cells of their maps, what they meet there, and what each cell counts.
template <typename T>
struct Points {
  explicit Points(int64_t count) : count(count) {
    for (auto* list : {&x, &y, &width, &height, &right, &down, &weight, &share[0], &share[1], &share[2], &share[3]})
      list->resize(whole<T>(count));
    for (auto* list : {&start, &row, &corners}) list->resize(whole<T>(count));
  }

  int64_t count;
  std::vector<T> x, y, width, height;  // 0 is the centre of the first cell
  std::vector<T> right, down;          // from the top left one of the four cells around, in cells
  std::vector<T> weight, share[4];     // of the point; of its cells, weight included
  std::vector<Integer<T>> start, row;  // of the map; of the top left cell
  std::vector<Integer<T>> corners;     // bit c: cell c exists; top left, top right, bottom left, bottom right

  // Fills in what follows from x, y, width, height, weight and start.
  void locate() {
    const Vector<T> zero = {};
    for (int64_t i = 0; i < count; i += LANES<T>) {
      const Vector<T> w = load(&width[i]), h = load(&height[i]), px = load(&x[i]), py = load(&y[i]);
      // Not so where a place is infinite or not a number.
      const Integers<T> near = (px > T(-1)) & (py > T(-1)) & (px < w) & (py < h);
      const Vector<T> across = near ? px : zero, along = near ? py : zero;
      const Integers<T> column = __builtin_convertvector(across, Integers<T>) + (across < zero);  // the floor
      const Integers<T> line = __builtin_convertvector(along, Integers<T>) + (along < zero);
      const Vector<T> r = across - __builtin_convertvector(column, Vector<T>);
      const Vector<T> d = along - __builtin_convertvector(line, Vector<T>);
      const Vector<T> lower = load(&weight[i]) * d, upper = load(&weight[i]) - lower;
      store(&right[i], r);
      store(&down[i], d);
      store(&share[0][i], upper - upper * r);
      store(&share[1][i], upper * r);
      store(&share[2][i], lower - lower * r);
      store(&share[3][i], lower * r);
      const Integers<T> columns = __builtin_convertvector(w, Integers<T>);
      const Integers<T> lines = __builtin_convertvector(h, Integers<T>);
      store(&row[i], load_integers<T>(&start[i]) + line * columns + column);
      const Integers<T> in_left = column >= 0, in_right = column < columns - 1, in_top = near & (line >= 0);
      const Integers<T> in_bottom = near & (line < lines - 1);
      store(&corners[i],
            (in_left & in_top & 1) | (in_right & in_top & 2) | (in_left & in_bottom & 4) | (in_right & in_bottom & 8));
    }
  }

  // Takes the padded ones from the cells that exist.
  void leave_out(const uint8_t* padding) {
    for (int64_t i = 0; i < count; ++i) {
      if (corners[i] == 15) {  // most often none is padded: two looks tell
        uint16_t upper, lower;
        std::memcpy(&upper, padding + row[i], sizeof upper);
        std::memcpy(&lower, padding + row[i] + int64_t(width[i]), sizeof lower);
        if ((upper | lower) == 0) continue;
      }
      int64_t cell[4];
      cells(i, cell);
      for (int c = 0; c < 4; ++c)
        if (corners[i] >> c & 1 && padding[cell[c]]) corners[i] &= ~(Integer<T>(1) << c);
    }
  }

  void cells(int64_t i, int64_t cell[4]) const {
    cell[0] = row[i];
    cell[1] = row[i] + 1;
    cell[2] = row[i] + int64_t(width[i]);
    cell[3] = cell[2] + 1;
  }
};

// How places follow from references and offsets: x = base + offset * scale, in cells.
template <typename T>
struct Places {
  T base[2], scale[2];

  Places(const T* reference, int columns, int64_t points, int64_t height, int64_t width) {
    const int64_t size[2] = {width, height};
    for (int axis = 0; axis < 2; ++axis) {
      base[axis] = reference[axis] * T(size[axis]) - T(0.5);
      scale[axis] = columns == 2 ? T(1) : reference[2 + axis] * T(0.5) / T(points) * T(size[axis]);
    }
  }
};

template <typename T>
struct Inputs {
  const T* value;
  const uint8_t* padding;  // or null
  const T *reference, *offsets, *logits;
  int columns;  // of the reference
};

// For each image its padding, null where it has none.
inline std::vector<const uint8_t*> paddings(const Problem& p, const uint8_t* padding) {
  std::vector<const uint8_t*> of_image(p.batch, nullptr);
  for (int64_t b = 0; b < p.batch && padding != nullptr; ++b) {
    uint8_t any = 0;
    for (int64_t i = 0; i < p.length; ++i) any |= padding[b * p.length + i];
    if (any) of_image[b] = padding + b * p.length;
  }
  return of_image;
}

// R registers of channels, summed over `count` points from `first` on. `value` has these channels of the first row.
template <typename T, int R>
inline void gather(const Points<T>& points, int64_t first, int64_t count, const T* value, int64_t stride, T* out) {
  Vector<T> sum[R] = {};
  for (int64_t i = first; i < first + count; ++i) {
    const T* a = value + points.row[i] * stride;
    const T* c = a + int64_t(points.width[i]) * stride;
    const int corners = int(points.corners[i]);
    if (corners == 15) {
      const T *b = a + stride, *d = c + stride;
      const T wa = points.share[0][i], wb = points.share[1][i], wc = points.share[2][i], wd = points.share[3][i];
      for (int r = 0; r < R; ++r) {
        const int k = r * LANES<T>;
        sum[r] += (wa * load(a + k) + wb * load(b + k)) + (wc * load(c + k) + wd * load(d + k));
      }
    } else if (corners != 0) {
      for (int corner = 0; corner < 4; ++corner) {
        if (!(corners >> corner & 1)) continue;
        const T* cell = (corner < 2 ? a : c) + (corner & 1) * stride;
        const T w = points.share[corner][i];
        for (int r = 0; r < R; ++r) sum[r] += w * load(cell + r * LANES<T>);
      }
    }
  }
  for (int r = 0; r < R; ++r) store(out + r * LANES<T>, sum[r]);
}

// The same for `width` channels, fewer than a register has.
template <typename T>
inline void gather_rest(const Points<T>& points, int64_t first, int64_t count, const T* value, int64_t stride,
                        int64_t width, T* out) {
  for (int64_t k = 0; k < width; ++k) out[k] = 0;
  for (int64_t i = first; i < first + count; ++i) {
    int64_t cell[4];
    points.cells(i, cell);
    for (int corner = 0; corner < 4; ++corner) {
      if (!(points.corners[i] >> corner & 1)) continue;
      const T* a = value + cell[corner] * stride;
      const T w = points.share[corner][i];
      for (int64_t k = 0; k < width; ++k) out[k] += w * a[k];
    }
  }
}

template <typename T>
void forward(const Problem& p, const Inputs<T>& in, T* out) {
  const int64_t stride = p.heads * p.channels, each = p.levels * p.points, all = p.heads * each;
  const std::vector<const uint8_t*> padding = paddings(p, in.padding);
#pragma omp parallel num_threads(p.threads)
  {
    Points<T> points(all);
    for (int64_t n = 0, i = 0; n < p.heads; ++n) {
      for (int64_t level = 0, start = 0; level < p.levels; ++level) {
        const int64_t height = p.sizes[2 * level], width = p.sizes[2 * level + 1];
        for (int64_t point = 0; point < p.points; ++point, ++i) {
          points.width[i] = T(width);
          points.height[i] = T(height);
          points.start[i] = Integer<T>(start);
        }
        start += height * width;
      }
    }
#pragma omp for schedule(dynamic, 64)
    for (int64_t bq = 0; bq < p.batch * p.queries; ++bq) {
      const T* offsets = in.offsets + bq * all * 2;
      for (int64_t level = 0; level < p.levels; ++level) {
        const T* reference = in.reference + (bq * p.levels + level) * in.columns;
        const Places<T> places(reference, in.columns, p.points, p.sizes[2 * level], p.sizes[2 * level + 1]);
        for (int64_t n = 0; n < p.heads; ++n) {
          const int64_t first = n * each + level * p.points;
          for (int64_t i = first; i < first + p.points; ++i) {
            points.x[i] = places.base[0] + offsets[2 * i] * places.scale[0];
            points.y[i] = places.base[1] + offsets[2 * i + 1] * places.scale[1];
          }
        }
      }
      softmax(in.logits + bq * all, p.heads, each, points.weight.data());
      points.locate();
      const int64_t b = bq / p.queries;
      if (padding[b] != nullptr) points.leave_out(padding[b]);
      for (int64_t n = 0; n < p.heads; ++n) {
        const T* head = in.value + b * p.length * stride + n * p.channels;
        T* target = out + (bq * p.heads + n) * p.channels;
        int64_t c = 0;
        for (; c + 2 * LANES<T> <= p.channels; c += 2 * LANES<T>)
          gather<T, 2>(points, n * each, each, head + c, stride, target + c);
        for (; c + LANES<T> <= p.channels; c += LANES<T>)
          gather<T, 1>(points, n * each, each, head + c, stride, target + c);
        if (c < p.channels) gather_rest(points, n * each, each, head + c, stride, p.channels - c, target + c);
      }
    }
  }
}

template <typename T>
struct Gradients {
  T *value, *reference, *offsets, *logits;  // all are overwritten
};

// Adds shares of g, R registers, to the gradients of a point's cells, and the products of g and the cells to `dots`.
template <typename T, int R>
inline void scatter(const Points<T>& points, int64_t i, const T* g, const T* map, T* grad_map, int64_t stride,
                    Vector<T> dots[4]) {
  Vector<T> given[R];
  for (int r = 0; r < R; ++r) given[r] = load(g + r * LANES<T>);
  const int64_t row = points.row[i] * stride, below = int64_t(points.width[i]) * stride;
  const int64_t cell[4] = {row, row + stride, row + below, row + below + stride};
  const int corners = int(points.corners[i]);
  for (int corner = 0; corner < 4; ++corner) {
    if (corners != 15 && !(corners >> corner & 1)) continue;
    const T w = points.share[corner][i];
    for (int r = 0; r < R; ++r) {
      const int64_t at = cell[corner] + r * LANES<T>;
      dots[corner] += given[r] * load(map + at);
      store(grad_map + at, load(grad_map + at) + w * given[r]);
    }
  }
}

// Of one head in one level of one image: the gradient of its part of the value; of offsets, in cells; and of softmax's
// weights, over which it writes them. It works on copies of map and gradient whose cells lie side by side: in `value`
// they are N * C numbers apart, so that few of them have room in a cache at a time, and each has a page to itself.
template <typename T>
struct HeadAndLevel {
  HeadAndLevel(const Problem& p, const Inputs<T>& in)
      : p(p), in(in), points(CHUNK * p.points), given(whole<T>(p.channels)) {}

  void run(int64_t b, int64_t n, int64_t level, const uint8_t* padding, const T* grad_out, const Gradients<T>& out) {
    const int64_t height = p.sizes[2 * level], width = p.sizes[2 * level + 1], stride = whole<T>(p.channels);
    int64_t start = 0;
    for (int64_t i = 0; i < level; ++i) start += p.sizes[2 * i] * p.sizes[2 * i + 1];
    const int64_t cells = height * width, far = p.heads * p.channels;
    const T* value = in.value + (b * p.length + start) * far + n * p.channels;
    map.assign(cells * stride, 0);
    grad_map.assign(cells * stride, 0);
    for (int64_t cell = 0; cell < cells; ++cell)
      std::memcpy(map.data() + cell * stride, value + cell * far, p.channels * sizeof(T));
    for (int64_t i = 0; i < points.count; ++i) {
      points.width[i] = T(width);
      points.height[i] = T(height);
      points.weight[i] = points.x[i] = points.y[i] = 0;
    }

    for (int64_t from = 0; from < p.queries; from += CHUNK) {
      const int64_t count = p.queries - from < CHUNK ? p.queries - from : CHUNK;
      for (int64_t q = 0; q < count; ++q) {
        const int64_t bq = b * p.queries + from + q, first = ((bq * p.heads + n) * p.levels + level) * p.points;
        const T* reference = in.reference + (bq * p.levels + level) * in.columns;
        const Places<T> places(reference, in.columns, p.points, height, width);
        for (int64_t i = 0; i < p.points; ++i) {
          points.x[q * p.points + i] = places.base[0] + in.offsets[2 * (first + i)] * places.scale[0];
          points.y[q * p.points + i] = places.base[1] + in.offsets[2 * (first + i) + 1] * places.scale[1];
          points.weight[q * p.points + i] = out.logits[first + i];
        }
      }
      points.locate();
      if (padding != nullptr) points.leave_out(padding + start);
      for (int64_t q = 0; q < count; ++q) {
        const int64_t head = (b * p.queries + from + q) * p.heads + n, first = (head * p.levels + level) * p.points;
        const T* g = grad_out + head * p.channels;
        if (stride != p.channels) {
          std::copy_n(g, p.channels, given.data());
          g = given.data();
        }
        for (int64_t i = 0; i < p.points; ++i) {
          const int64_t at = q * p.points + i;
          Vector<T> dots[4] = {};
          int64_t c = 0;
          for (; c + 2 * LANES<T> <= stride; c += 2 * LANES<T>)
            scatter<T, 2>(points, at, g + c, map.data() + c, grad_map.data() + c, stride, dots);
          if (c < stride) scatter<T, 1>(points, at, g + c, map.data() + c, grad_map.data() + c, stride, dots);
          const T right = points.right[at], down = points.down[at], weight = points.weight[at];
          const T dot[4] = {sum_of<T>(dots[0]), sum_of<T>(dots[1]), sum_of<T>(dots[2]), sum_of<T>(dots[3])};
          const T upper = dot[0] + right * (dot[1] - dot[0]), lower = dot[2] + right * (dot[3] - dot[2]);
          out.logits[first + i] = upper + down * (lower - upper);
          out.offsets[2 * (first + i)] = weight * ((1 - down) * (dot[1] - dot[0]) + down * (dot[3] - dot[2]));
          out.offsets[2 * (first + i) + 1] = weight * ((1 - right) * (dot[2] - dot[0]) + right * (dot[3] - dot[1]));
        }
      }
    }
    T* grad_value = out.value + (b * p.length + start) * far + n * p.channels;
    for (int64_t cell = 0; cell < cells; ++cell)
      std::memcpy(grad_value + cell * far, grad_map.data() + cell * stride, p.channels * sizeof(T));
  }

  static constexpr int64_t CHUNK = 64;  // queries
  const Problem& p;
  const Inputs<T>& in;
  Points<T> points;
  std::vector<T> given, map, grad_map;
};

// What is left for one query when all heads and levels have been there: from the gradients of places in cells to those
// of offsets and reference, from those of weights to those of logits.
template <typename T>
inline void finish(const Problem& p, const Inputs<T>& in, int64_t bq, T* weights, const Gradients<T>& out) {
  const int64_t each = p.levels * p.points, all = p.heads * each;
  softmax(in.logits + bq * all, p.heads, each, weights);
  for (int64_t n = 0; n < p.heads; ++n) {
    T* grad = out.logits + bq * all + n * each;
    T mean = 0;
    for (int64_t i = 0; i < each; ++i) mean += weights[n * each + i] * grad[i];
    for (int64_t i = 0; i < each; ++i) grad[i] = weights[n * each + i] * (grad[i] - mean);
  }
  for (int64_t level = 0; level < p.levels; ++level) {
    const int64_t height = p.sizes[2 * level], width = p.sizes[2 * level + 1];
    const int64_t place = (bq * p.levels + level) * in.columns;
    const Places<T> places(in.reference + place, in.columns, p.points, height, width);
    T moved[2] = {}, widened[2] = {};
    for (int64_t n = 0; n < p.heads; ++n) {
      for (int64_t i = 0; i < p.points; ++i) {
        const int64_t at = 2 * (bq * all + n * each + level * p.points + i);
        for (int axis = 0; axis < 2; ++axis) {
          const T grad = out.offsets[at + axis];
          moved[axis] += grad;
          widened[axis] += grad * in.offsets[at + axis];
          out.offsets[at + axis] = grad * places.scale[axis];
        }
      }
    }
    const int64_t size[2] = {width, height};
    for (int axis = 0; axis < 2; ++axis) {
      out.reference[place + axis] = moved[axis] * T(size[axis]);
      if (in.columns == 4) out.reference[place + 2 + axis] = widened[axis] * T(0.5) / T(p.points) * T(size[axis]);
    }
  }
}

template <typename T>
void backward(const Problem& p, const Inputs<T>& in, const T* grad_out, const Gradients<T>& out) {
  const int64_t each = p.levels * p.points, all = p.heads * each;
  const std::vector<const uint8_t*> padding = paddings(p, in.padding);
#pragma omp parallel num_threads(p.threads)
  {
    std::vector<T> weights(whole<T>(all));
#pragma omp for schedule(static)
    for (int64_t bq = 0; bq < p.batch * p.queries; ++bq) {
      softmax(in.logits + bq * all, p.heads, each, weights.data());
      std::memcpy(out.logits + bq * all, weights.data(), all * sizeof(T));
    }
    HeadAndLevel<T> work(p, in);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < p.batch * p.heads * p.levels; ++task) {
      const int64_t b = task / (p.heads * p.levels), n = task / p.levels % p.heads, level = task % p.levels;
      work.run(b, n, level, padding[b], grad_out, out);
    }
#pragma omp for schedule(static)
    for (int64_t bq = 0; bq < p.batch * p.queries; ++bq) finish(p, in, bq, weights.data(), out);
  }
}

}  // namespace

#define EXPORT_FOR(T, NAME)                                                                                            \
  EXPORT void ms_deform_attn_fused_forward_##NAME(const int64_t* sizes, const int64_t* dimensions, int columns,        \
                                                  int threads, const T* value, const uint8_t* padding,                 \
                                                  const T* reference, const T* offsets, const T* logits, T* out) {     \
    forward<T>(problem(sizes, dimensions, threads), {value, padding, reference, offsets, logits, columns}, out);       \
  }                                                                                                                    \
  EXPORT void ms_deform_attn_fused_backward_##NAME(                                                                    \
      const int64_t* sizes, const int64_t* dimensions, int columns, int threads, const T* value,                       \
      const uint8_t* padding, const T* reference, const T* offsets, const T* logits, const T* grad_out, T* grad_value, \
      T* grad_reference, T* grad_offsets, T* grad_logits) {                                                            \
    backward<T>(problem(sizes, dimensions, threads), {value, padding, reference, offsets, logits, columns}, grad_out,  \
                {grad_value, grad_reference, grad_offsets, grad_logits});                                              \
  }

EXPORT_FOR(float, float32)
EXPORT_FOR(double, float64)
