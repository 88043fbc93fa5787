// RoIAlign, and bilinear sampling between its bins, on the CPU: forward and backward, float32 and float64.
//
// RoIAlign's weights separate: the weight of cell (y, x) in bin (p, q) is rows[p, y] * columns[q, x]. Few rows and
// columns of each bin have weight, and only these are visited. Sampled bins are never stored.
//
// Layouts: cells (B, H, W, C), each image contiguous, the images perhaps apart; all else contiguous. boxes (B, Q, 4),
// left, top, right, bottom in cells; rows (B, Q, bins, H); columns (B, Q, bins, W); pooled (B, Q, bins, bins, C), y
// before x; positions (B, Q, P, xy), in bins with 0 at the centre of the first, zeros beyond the bins; content
// (B, Q, P, C).
//
// No sum is shared between threads and no order depends on how many there are, so results are the same to the bit:
// what belongs to a query is split by queries, the gradient of the cells by rows of the map.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "../export.h"
#include "../memory.h"
#include "../vectors.h"

namespace {

using vectors::Vector;

// N registers of one type (V is T for the channels that fill none), spelt out so that compilers keep them in registers.
template <typename T, typename V, int N>
struct Block {
  static constexpr int LANES = sizeof(V) / sizeof(T);
  V part[N] = {};

  static V load(const T* from) {
    V value;
    std::memcpy(&value, from, sizeof value);
    return value;
  }
  template <int... I>
  void add(T weight, const T* from, std::integer_sequence<int, I...>) {
    ((part[I] += weight * load(from + I * LANES)), ...);
  }
  template <int... I>
  void add_to(T weight, T* to, std::integer_sequence<int, I...>) const {
    V sum[N] = {(load(to + I * LANES) + weight * part[I])...};
    std::memcpy(to, sum, sizeof sum);
  }
  void add(T weight, const T* from) { add(weight, from, std::make_integer_sequence<int, N>()); }
  void add_to(T weight, T* to) const { add_to(weight, to, std::make_integer_sequence<int, N>()); }
  void read(const T* from) { std::memcpy(part, from, sizeof part); }
  void write(T* to) const { std::memcpy(to, part, sizeof part); }
  T dot(const T* other) const {
    V sum{};
    for (int i = 0; i < N; ++i) sum += part[i] * load(other + i * LANES);
    T lanes[LANES], total = 0;
    std::memcpy(lanes, &sum, sizeof sum);
    for (T lane : lanes) total += lane;
    return total;
  }
};

// Calls work(Block, first channel) until all channels had their turn: blocks of MOST registers, of 4, of 1, the rest.
template <typename T, int MOST, typename Work>
inline void in_blocks(int64_t channels, Work work) {
  using V = Vector<T>;
  constexpr int LANES = vectors::LANES<T>;
  int64_t c = 0;
  for (; c + MOST * LANES <= channels; c += MOST * LANES) work(Block<T, V, MOST>(), c);
  for (; c + 4 * LANES <= channels; c += 4 * LANES) work(Block<T, V, 4>(), c);
  for (; c + LANES <= channels; c += LANES) work(Block<T, V, 1>(), c);
  for (; c < channels; ++c) work(Block<T, T, 1>(), c);
}

struct Problem {
  int64_t batch, height, width, channels;
  int64_t image;  // from one image's cells to the next's
  int64_t queries, bins, points;
  int threads;

  // For less than some ten thousand numbers a thread, waking it takes longer than its share of the work.
  int threads_for(int64_t numbers_of_a_query) const {
    return int(std::min<int64_t>(threads, batch * queries * numbers_of_a_query / 32768 + 1));
  }
};

// Cells begin .. end - 1 along one axis.
struct Span {
  int64_t begin = 0, end = 0;

  bool empty() const { return begin >= end; }
  bool has(int64_t i) const { return begin <= i && i < end; }
  Span with(const Span& other) const {
    if (empty()) return other;
    if (other.empty()) return *this;
    return {std::min(begin, other.begin), std::max(end, other.end)};
  }
};

// Which cells have weight, for each of `count` vectors of weights.
template <typename T>
std::vector<Span> spans_of(const T* weights, int64_t count, int64_t length) {
  std::vector<Span> spans(count);
  for (int64_t i = 0; i < count; ++i, weights += length) {
    Span& span = spans[i];
    span.end = length;
    while (span.begin < span.end && weights[span.begin] == 0) ++span.begin;
    while (span.begin < span.end && weights[span.end - 1] == 0) --span.end;
  }
  return spans;
}

Span all_of(const Span* spans, int64_t bins) {
  Span all;
  for (int64_t i = 0; i < bins; ++i) all = all.with(spans[i]);
  return all;
}

// A row of bins with its weight at one row of cells.
template <typename T>
struct Share {
  int64_t bin;
  T weight;
};

// At most as many as there are bins, in the room of one thread.
template <typename T>
struct Shares {
  Share<T>* first;
  int64_t count = 0;

  const Share<T>* begin() const { return first; }
  const Share<T>* end() const { return first + count; }
  void find(int64_t y, const T* rows, const Span* spans, int64_t bins, int64_t height) {
    count = 0;
    for (int64_t p = 0; p < bins; ++p)
      if (spans[p].has(y)) first[count++] = {p, rows[p * height + y]};
  }
};

template <typename T>
void pool(const Problem& p, const T* cells, const T* rows, const T* columns, T* pooled) {
  const auto in_rows = spans_of(rows, p.batch * p.queries * p.bins, p.height);
  const auto in_columns = spans_of(columns, p.batch * p.queries * p.bins, p.width);
  const int64_t size = p.bins * p.bins * p.channels;
  const memory::Rooms<Share<T>> rooms(p.threads_for(size), p.bins);
#pragma omp parallel num_threads(p.threads_for(size))
  {
    Shares<T> shares{rooms.mine().take(p.bins).get()};
#pragma omp for schedule(dynamic, 8)
    for (int64_t bq = 0; bq < p.batch * p.queries; ++bq) {
      const T* map = cells + bq / p.queries * p.image;
      const T *along_y = rows + bq * p.bins * p.height, *along_x = columns + bq * p.bins * p.width;
      const Span *spans_y = &in_rows[bq * p.bins], *spans_x = &in_columns[bq * p.bins];
      T* out = pooled + bq * size;
      std::fill(out, out + size, T(0));
      const Span box = all_of(spans_y, p.bins);
      for (int64_t y = box.begin; y < box.end; ++y) {
        shares.find(y, along_y, spans_y, p.bins, p.height);
        const T* line = map + y * p.width * p.channels;
        in_blocks<T, 8>(p.channels, [&](auto block, int64_t c) {
          for (int64_t q = 0; q < p.bins; ++q) {
            if (spans_x[q].empty()) continue;
            auto sum = block;
            for (int64_t x = spans_x[q].begin; x < spans_x[q].end; ++x)
              sum.add(along_x[q * p.width + x], line + x * p.channels + c);
            for (const Share<T>& share : shares)
              sum.add_to(share.weight, out + (share.bin * p.bins + q) * p.channels + c);
          }
        });
      }
    }
  }
}

template <typename T>
void pool_backward(const Problem& p, const T* grad_pooled, const T* rows, const T* columns, T* grad_cells) {
  const auto in_rows = spans_of(rows, p.batch * p.queries * p.bins, p.height);
  const auto in_columns = spans_of(columns, p.batch * p.queries * p.bins, p.width);
  const int64_t size = p.bins * p.bins * p.channels;
  const memory::Rooms<Share<T>> rooms(p.threads_for(size), p.bins);
#pragma omp parallel num_threads(p.threads_for(size))
  {
    Shares<T> shares{rooms.mine().take(p.bins).get()};
#pragma omp for schedule(dynamic, 1)
    for (int64_t by = 0; by < p.batch * p.height; ++by) {
      const int64_t b = by / p.height, y = by % p.height;
      T* line = grad_cells + by * p.width * p.channels;
      std::fill(line, line + p.width * p.channels, T(0));
      for (int64_t bq = b * p.queries; bq < (b + 1) * p.queries; ++bq) {
        shares.find(y, rows + bq * p.bins * p.height, &in_rows[bq * p.bins], p.bins, p.height);
        if (!shares.count) continue;
        const T *given = grad_pooled + bq * size, *along_x = columns + bq * p.bins * p.width;
        const Span* spans_x = &in_columns[bq * p.bins];
        in_blocks<T, 8>(p.channels, [&](auto block, int64_t c) {
          for (int64_t q = 0; q < p.bins; ++q) {
            if (spans_x[q].empty()) continue;
            auto sum = block;
            for (const Share<T>& share : shares)
              sum.add(share.weight, given + (share.bin * p.bins + q) * p.channels + c);
            for (int64_t x = spans_x[q].begin; x < spans_x[q].end; ++x)
              sum.add_to(along_x[q * p.width + x], line + x * p.channels + c);
          }
        });
      }
    }
  }
}

// Where a point lies between two bins along one axis, and which cells it touches through them.
template <typename T>
struct Between {
  const T *first = nullptr, *second = nullptr;  // weights of the bins' cells; null beyond the bins
  T share = 0;                                  // of the second bin
  Span span;

  Between(T position, const T* weights, const Span* spans, int64_t bins, int64_t length) {
    if (!(position >= T(-1) && position < T(bins))) return;  // also where it is no number
    const T floor = std::floor(position);
    const int64_t bin = int64_t(floor);
    share = position - floor;
    if (bin >= 0) {
      first = weights + bin * length;
      span = spans[bin];
    }
    if (bin + 1 < bins) {
      second = weights + (bin + 1) * length;
      span = span.with(spans[bin + 1]);
    }
  }
  T weight(int64_t i) const { return (first ? (1 - share) * first[i] : T(0)) + (second ? share * second[i] : T(0)); }
  T slope(int64_t i) const { return (second ? second[i] : T(0)) - (first ? first[i] : T(0)); }
};

// Everything about the points that does not depend on the channels.
template <typename T>
struct Points {
  const Problem& p;
  const T *rows, *columns, *positions;
  std::vector<Span> in_rows, in_columns;

  Points(const Problem& p, const T* rows, const T* columns, const T* positions)
      : p(p),
        rows(rows),
        columns(columns),
        positions(positions),
        in_rows(spans_of(rows, p.batch * p.queries * p.bins, p.height)),
        in_columns(spans_of(columns, p.batch * p.queries * p.bins, p.width)) {}

  Between<T> along_x(int64_t point) const {
    const int64_t box = point / p.points * p.bins;
    return {positions[2 * point], columns + box * p.width, &in_columns[box], p.bins, p.width};
  }
  Between<T> along_y(int64_t point) const {
    const int64_t box = point / p.points * p.bins;
    return {positions[2 * point + 1], rows + box * p.height, &in_rows[box], p.bins, p.height};
  }
};

template <typename T>
void sample(const Problem& p, const T* cells, const T* rows, const T* columns, const T* positions, T* content) {
  const Points<T> points(p, rows, columns, positions);
  const int threads = p.threads_for(4 * p.points * p.channels);
  const memory::Rooms<T> rooms(threads, p.width);
#pragma omp parallel num_threads(threads)
  {
    const auto weights = rooms.mine().take(p.width);
#pragma omp for schedule(dynamic, 8)
    for (int64_t bq = 0; bq < p.batch * p.queries; ++bq) {
      const T* map = cells + bq / p.queries * p.image;
      for (int64_t i = bq * p.points; i < (bq + 1) * p.points; ++i) {
        const Between<T> in_x = points.along_x(i), in_y = points.along_y(i);
        for (int64_t x = in_x.span.begin; x < in_x.span.end; ++x) weights[x] = in_x.weight(x);
        in_blocks<T, 16>(p.channels, [&](auto sum, int64_t c) {
          for (int64_t y = in_y.span.begin; y < in_y.span.end; ++y) {
            const T weight = in_y.weight(y);
            const T* line = map + y * p.width * p.channels + c;
            for (int64_t x = in_x.span.begin; x < in_x.span.end; ++x)
              sum.add(weight * weights[x], line + x * p.channels);
          }
          sum.write(content + i * p.channels + c);
        });
      }
    }
  }
}

template <typename T>
void sample_backward_cells(const Problem& p, const T* grad_content, const T* rows, const T* columns, const T* positions,
                           T* grad_cells) {
  const Points<T> points(p, rows, columns, positions);
  std::vector<Between<T>> along_y;
  for (int64_t i = 0; i < p.batch * p.queries * p.points; ++i) along_y.push_back(points.along_y(i));
#pragma omp parallel for num_threads(p.threads_for(4 * p.points * p.channels)) schedule(dynamic, 1)
  for (int64_t by = 0; by < p.batch * p.height; ++by) {
    const int64_t b = by / p.height, y = by % p.height, number = p.queries * p.points;
    T* line = grad_cells + by * p.width * p.channels;
    std::fill(line, line + p.width * p.channels, T(0));
    for (int64_t i = b * number; i < (b + 1) * number; ++i) {
      if (!along_y[i].span.has(y)) continue;
      const T weight = along_y[i].weight(y);
      const Between<T> in_x = points.along_x(i);
      in_blocks<T, 16>(p.channels, [&](auto given, int64_t c) {
        given.read(grad_content + i * p.channels + c);
        for (int64_t x = in_x.span.begin; x < in_x.span.end; ++x)
          given.add_to(weight * in_x.weight(x), line + x * p.channels + c);
      });
    }
  }
}

// Where a point lies at the centre of a bin, it counts as a part of what comes after it, as in grid_sample.
template <typename T>
void sample_backward_positions(const Problem& p, const T* grad_content, const T* cells, const T* rows, const T* columns,
                               const T* positions, T* grad_positions) {
  const Points<T> points(p, rows, columns, positions);
  const int threads = p.threads_for(4 * p.points * p.channels);
  const memory::Rooms<T> rooms(threads, 2 * p.width, 2);
#pragma omp parallel num_threads(threads)
  {
    auto room = rooms.mine();
    const auto weights = room.take(p.width), slopes = room.take(p.width);
#pragma omp for schedule(dynamic, 8)
    for (int64_t bq = 0; bq < p.batch * p.queries; ++bq) {
      const T* map = cells + bq / p.queries * p.image;
      for (int64_t i = bq * p.points; i < (bq + 1) * p.points; ++i) {
        const Between<T> in_x = points.along_x(i), in_y = points.along_y(i);
        for (int64_t x = in_x.span.begin; x < in_x.span.end; ++x) {
          weights[x] = in_x.weight(x);
          slopes[x] = in_x.slope(x);
        }
        T of_x = 0, of_y = 0;
        in_blocks<T, 8>(p.channels, [&](auto block, int64_t c) {
          auto step_x = block, step_y = block;  // what a step of one bin to the right or down adds to the content
          for (int64_t y = in_y.span.begin; y < in_y.span.end; ++y) {
            const T weight = in_y.weight(y), slope = in_y.slope(y);
            const T* line = map + y * p.width * p.channels + c;
            for (int64_t x = in_x.span.begin; x < in_x.span.end; ++x) {
              step_x.add(weight * slopes[x], line + x * p.channels);
              step_y.add(slope * weights[x], line + x * p.channels);
            }
          }
          of_x += step_x.dot(grad_content + i * p.channels + c);
          of_y += step_y.dot(grad_content + i * p.channels + c);
        });
        grad_positions[2 * i] = of_x;
        grad_positions[2 * i + 1] = of_y;
      }
    }
  }
}

// The weights of every cell along one axis in every bin of every box: (B, Q, bins, length). A bin takes ceil(its
// length) samples, one more than a box as long as the map needs at most. `boxes` points to the first box's lower edge
// along this axis. Single-threaded: waking other threads takes longer.
template <typename T>
std::vector<T> weights_of(const Problem& p, const T* boxes, int64_t length) {
  const int64_t bins = p.bins;
  std::vector<T> weights(p.batch * p.queries * bins * length);
  const int64_t most = length / bins + 1;
  for (int64_t i = 0; i < p.batch * p.queries; ++i) {
    const T low = boxes[4 * i], high = boxes[4 * i + 2];
    T* bin = weights.data() + i * bins * length;
    if (!std::isfinite(low) || !std::isfinite(high)) {
      std::fill(bin, bin + bins * length, T(NAN));
      continue;
    }
    const T bin_length = (high - low) / T(bins);
    const T samples = std::ceil(bin_length), divisor = std::max(samples, T(1));
    const T last = T(length - 1);
    for (int64_t p = 0; p < bins; ++p, bin += length) {
      for (int64_t s = 0; s < most && T(s) < samples; ++s) {
        const T position = low - T(0.5) + (T(p) + (T(s) + T(0.5)) / divisor) * bin_length;
        if (!(position >= T(-1) && position <= T(length))) continue;
        const T inside = std::min(std::max(position, T(0)), last);
        const int64_t cell = int64_t(inside);
        const T right = inside - T(cell);
        bin[cell] += (1 - right) / divisor;
        if (right > 0) bin[cell + 1] += right / divisor;
      }
    }
  }
  return weights;
}

// Without positions, all bins of the boxes; else samples between them.
template <typename T>
void forward(const Problem& p, const T* cells, const T* boxes, const T* positions, T* out) {
  const std::vector<T> rows = weights_of(p, boxes + 1, p.height), columns = weights_of(p, boxes, p.width);
  if (positions) {
    sample(p, cells, rows.data(), columns.data(), positions, out);
  } else {
    pool(p, cells, rows.data(), columns.data(), out);
  }
}

// Gradients that are null are not wanted.
template <typename T>
void backward(const Problem& p, const T* given, const T* cells, const T* boxes, const T* positions, T* of_cells,
              T* of_positions) {
  const std::vector<T> rows = weights_of(p, boxes + 1, p.height), columns = weights_of(p, boxes, p.width);
  if (of_cells && positions) sample_backward_cells(p, given, rows.data(), columns.data(), positions, of_cells);
  if (of_cells && !positions) pool_backward(p, given, rows.data(), columns.data(), of_cells);
  if (of_positions) {
    sample_backward_positions(p, given, cells, rows.data(), columns.data(), positions, of_positions);
  }
}

// dimensions: B, H, W, C, from image to image, Q, bins, P.
Problem problem(const int64_t* d, int threads) { return {d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7], threads}; }

}  // namespace

#define EXPORT_FOR(T, NAME)                                                                                         \
  EXPORT int roi_sampling_forward_##NAME(const int64_t* dimensions, int threads, const T* cells, const T* boxes,    \
                                         const T* positions, T* out) {                                              \
    return memory::status_of([&] { forward<T>(problem(dimensions, threads), cells, boxes, positions, out); });      \
  }                                                                                                                 \
  EXPORT int roi_sampling_backward_##NAME(const int64_t* dimensions, int threads, const T* given, const T* cells,   \
                                          const T* boxes, const T* positions, T* of_cells, T* of_positions) {       \
    return memory::status_of(                                                                                       \
        [&] { backward<T>(problem(dimensions, threads), given, cells, boxes, positions, of_cells, of_positions); }); \
  }

EXPORT_FOR(float, float32)
EXPORT_FOR(double, float64)
