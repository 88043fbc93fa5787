// Attention on the CPU, forward and backward, float32 and float64: softmax(scale * query key^T + prior) value.
//
// A block of queries meets a block of keys at a time, so that logits never leave a core's caches; the softmax is kept
// running, and backward computes the logits again (FlashAttention, Dao et al., NeurIPS 2022; Rabe and Staats, 2021).
// The prior is the sum of a term of the key's row and one of its column on a map, and never a tensor of all pairs.
// Dropped weights are a function of a seed and their place, drawn again in backward.
//
// Layouts: query (B, N, Q, D), key (B, N or 1, L, D) and value (B, N, L, E) with strides, their last axis contiguous;
// contiguous are output and its gradient (B, Q, N, E), the logarithm of each softmax's sum (B, N, Q), rows
// (B, N or 1, Q, H), columns (B, N or 1, Q, W) and mask (B, L), which is added to the logits. One key may serve all
// heads, one prior, too.
//
// How work is shared out depends on shapes alone, and sums of several tasks are added in a fixed order: the same bits
// for any number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>

#include "../export.h"
#include "../memory.h"
#include "../vectors.h"
#include "dropping.h"
#include "exponential.h"
#include "gemm.h"

namespace {

using namespace vectors;

// With 256 channels a block of keys, in the two forms that backward reads, its gradient and a block of queries take
// two thirds of a MiB of float32.
constexpr int64_t QUERIES = 96, KEYS_FORWARD = 256, KEYS_BACKWARD = 96;
constexpr int64_t GROUPS = 8;  // of keys, at most, each with gradients of the queries of its own

int64_t blocks(int64_t number, int64_t size) { return (number + size - 1) / size; }

template <typename T>
struct Strided {
  const T* data;
  int64_t batch, head, row;
  const T* at(int64_t b, int64_t n, int64_t i) const { return data + b * batch + n * head + i * row; }
};

template <typename T>
struct Problem {
  int64_t batch, heads, queries, keys, depth, width;       // depth D of a query and key, width E of a value
  int64_t key_heads, height, columns_of_map, prior_heads;  // height is 0 without a prior
  Strided<T> query, key, value;
  const T *rows, *columns, *mask;  // or null
  T scale;
  dropping::Rule<T> drops;
  int threads;

  int64_t key_head(int64_t n) const { return key_heads > 1 ? n : 0; }
  int64_t prior_row(int64_t b, int64_t n, int64_t q) const {
    return (b * prior_heads + (prior_heads > 1 ? n : 0)) * queries + q;
  }
};

template <typename T>
std::unique_ptr<T[]> buffer(int64_t size) {
  return std::unique_ptr<T[]>(new T[size]);  // not set to anything
}

// The prior of one query at keys [first, first + count), plus the mask; null where there is neither. `room` has space
// for a vector more than that; values behind the last key may be anything.
template <typename T>
inline const T* bias_of(const Problem<T>& p, const T* mask, const T* row, const T* padded_columns, int64_t first,
                        int64_t count, T* room) {
  constexpr int S = LANES<T>;
  if (!row) return mask ? mask + first : nullptr;
  const int64_t width = p.columns_of_map;
  int64_t y = first / width, x = first % width;
  // Whole vectors: what is written beyond the end of a row is overwritten by the next one.
  for (int64_t done = 0; done < count; ++y, x = 0) {
    const int64_t length = std::min(width - x, count - done);
    const T of_row = row[y];
    for (int64_t i = 0; i < length; i += S) store(room + done + i, load(padded_columns + x + i) + of_row);
    done += length;
  }
  if (mask) {
    for (int64_t i = 0; i < count; i += S) store(room + i, load(room + i) + load(mask + first + i));
  }
  return room;
}

// The first `count` of a vector, zeros behind them.
template <typename T>
inline Vector<T> first_of(Vector<T> values, int64_t count) {
  for (int64_t i = count; i < LANES<T>; ++i) values[i] = 0;
  return values;
}

// All of K and V that forward or backward multiplies with, packed once; task by task, so that all threads help.
template <typename T>
struct Packed {
  std::unique_ptr<T[]> data;
  int64_t of_image_head, of_block, heads, size;

  const T* at(int64_t b, int64_t n, int64_t block) const {
    return data.get() + (b * heads + n) * of_image_head + block * of_block;
  }
};

// Blocks of `size` rows of `source` (`length` x `depth`); transposed: as a matrix depth x rows, else rows x depth.
template <typename T>
Packed<T> pack_blocks(const Strided<T>& source, int64_t batch, int64_t heads, int64_t length, int64_t depth,
                      int64_t size, bool transposed, int threads) {
  const int64_t number = blocks(length, size);
  const int64_t of_block = transposed ? gemm::packed_size<T>(depth, size) : gemm::packed_size<T>(size, depth);
  Packed<T> packed{buffer<T>(batch * heads * number * of_block), number * of_block, of_block, heads, size};
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t task = 0; task < batch * heads * number; ++task) {
    const int64_t block = task % number, n = task / number % heads, b = task / number / heads;
    const int64_t first = block * size, rows = std::min(size, length - first);
    T* target = packed.data.get() + task * of_block;
    if (transposed) {
      gemm::pack(source.at(b, n, first), 1, source.row, depth, rows, target);
    } else {
      gemm::pack(source.at(b, n, first), source.row, 1, rows, depth, target);
    }
  }
  return packed;
}

// The mask with zeros behind each image's keys, so that whole vectors can be read; null where it hides nothing.
template <typename T>
std::unique_ptr<T[]> padded_mask(const Problem<T>& p, int64_t& stride) {
  stride = p.keys + LANES<T>;
  if (!p.mask || std::all_of(p.mask, p.mask + p.batch * p.keys, [](T x) { return x == 0; })) return nullptr;
  auto padded = buffer<T>(p.batch * stride);
  for (int64_t b = 0; b < p.batch; ++b) {
    std::copy_n(p.mask + b * p.keys, p.keys, padded.get() + b * stride);
    std::fill_n(padded.get() + b * stride + p.keys, LANES<T>, T(0));
  }
  return padded;
}

template <typename T>
void forward(const Problem<T>& p, T* output, T* log_sums) {
  typedef Vector<T> V;
  constexpr int S = LANES<T>;
  const T infinity = std::numeric_limits<T>::infinity();
  const int64_t key_blocks = blocks(p.keys, KEYS_FORWARD), query_blocks = blocks(p.queries, QUERIES);
  const int64_t of_block = std::min(p.queries, blocks(blocks(p.queries, query_blocks), gemm::ROWS) * gemm::ROWS);
  const auto keys = pack_blocks(p.key, p.batch, p.key_heads, p.keys, p.depth, KEYS_FORWARD, true, p.threads);
  const auto values = pack_blocks(p.value, p.batch, p.heads, p.keys, p.width, KEYS_FORWARD, false, p.threads);
  int64_t mask_stride;
  const auto mask = padded_mask(p, mask_stride);
  const int64_t map_stride = p.columns_of_map + S;

  const int64_t size = of_block * (p.depth + KEYS_FORWARD + 2 + p.width + map_stride) + 2 * (KEYS_FORWARD + S);
  const memory::Rooms<T> rooms(p.threads, size, 8);

#pragma omp parallel num_threads(p.threads)
  {
    auto room = rooms.mine();
    const auto query = room.take(of_block * p.depth), logits = room.take(of_block * KEYS_FORWARD);
    const auto sums = room.take(of_block), most = room.take(of_block), sampled = room.take(of_block * p.width);
    const auto columns = room.take(of_block * map_stride), bias = room.take(KEYS_FORWARD + S);
    const auto kept = room.take(KEYS_FORWARD + S);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < p.batch * p.heads * query_blocks; ++task) {
      const int64_t first = task % query_blocks * of_block, n = task / query_blocks % p.heads;
      const int64_t b = task / query_blocks / p.heads, number = std::min(of_block, p.queries - first);
      if (number <= 0) continue;  // rounding to whole tiles left this block nothing
      const T* image_mask = mask ? mask.get() + b * mask_stride : nullptr;
      for (int64_t q = 0; q < number; ++q) {
        std::copy_n(p.query.at(b, n, first + q), p.depth, query.get() + q * p.depth);
        if (p.height) {
          const T* from = p.columns + p.prior_row(b, n, first + q) * p.columns_of_map;
          std::copy_n(from, p.columns_of_map, columns.get() + q * map_stride);
        }
        sums[q] = 0;
        most[q] = -infinity;
      }
      std::fill_n(sampled.get(), number * p.width, T(0));
      for (int64_t block = 0; block < key_blocks; ++block) {
        const int64_t start = block * KEYS_FORWARD, count = std::min(KEYS_FORWARD, p.keys - start);
        const int64_t whole = blocks(count, S) * S;
        gemm::product<T>(number, count, p.depth, query.get(), p.depth, 1, keys.at(b, p.key_head(n), block),
                         logits.get(), KEYS_FORWARD, false);
        for (int64_t q = 0; q < number; ++q) {
          T* row = logits.get() + q * KEYS_FORWARD;
          std::fill(row + count, row + whole, -infinity);
          V largest = -infinity - V{};
          const T* of_rows = p.height ? p.rows + p.prior_row(b, n, first + q) * p.height : nullptr;
          const T* added = bias_of(p, image_mask, of_rows, columns.get() + q * map_stride, start, count, bias.get());
          if (added) {
            for (int64_t i = 0; i < whole; i += S) {
              V x = load(row + i) * p.scale + load(added + i);
              if (i + S > count) {
                for (int64_t k = count - i; k < S; ++k) x[k] = -infinity;  // the bias may be anything there
              }
              largest = x > largest ? x : largest;
              store(row + i, x);
            }
          } else {
            for (int64_t i = 0; i < whole; i += S) {
              const V x = load(row + i) * p.scale;
              largest = x > largest ? x : largest;
              store(row + i, x);
            }
          }
          const T before = most[q], now = std::max(before, largest_of<T>(largest));
          most[q] = now;
          const T shift = now == -infinity ? T(0) : now;  // all keys so far are masked
          if (before != now && before != -infinity) {
            const T shrunk = std::exp(before - now);
            sums[q] *= shrunk;
            T* o = sampled.get() + q * p.width;
            for (int64_t e = 0; e < p.width; ++e) o[e] *= shrunk;
          }
          V sum = V{};
          for (int64_t i = 0; i < whole; i += S) {
            const V x = exponential::exp<T>(load(row + i) - shift);
            sum += x;
            store(row + i, x);
          }
          sums[q] += sum_of<T>(sum);
          if (p.drops.seed) {
            p.drops.draw((b * p.heads + n) * p.queries + first + q, start, whole, kept.get());
            for (int64_t i = 0; i < whole; i += S) store(row + i, load(row + i) * load(kept.get() + i));
          }
        }
        gemm::product<T>(number, p.width, count, logits.get(), KEYS_FORWARD, 1, values.at(b, n, block), sampled.get(),
                         p.width, true);
      }
      for (int64_t q = 0; q < number; ++q) {
        T* o = output + ((b * p.queries + first + q) * p.heads + n) * p.width;
        const T share = sums[q] == 0 ? T(0) : 1 / sums[q];  // all keys are masked: the output is 0, as PyTorch's
        for (int64_t e = 0; e < p.width; ++e) o[e] = sampled[q * p.width + e] * share;
        log_sums[(b * p.heads + n) * p.queries + first + q] = sums[q] == 0 ? infinity : most[q] + std::log(sums[q]);
      }
    }
  }
}

// Where backward leaves its results: of the query (B, Q, N, D), of the key (B, L, N or 1, D), of the value (B, L, N,
// E), of rows and columns as these are; the last two may be null.
template <typename T>
struct Gradients {
  T *query, *key, *value, *rows, *columns;
};

template <typename T>
void backward(const Problem<T>& p, const T* output, const T* log_sums, const T* of_output, const Gradients<T>& of) {
  typedef Vector<T> V;
  constexpr int S = LANES<T>;
  const int64_t key_blocks = blocks(p.keys, KEYS_BACKWARD), groups = std::min(GROUPS, key_blocks);
  const int64_t query_blocks = blocks(p.queries, QUERIES);
  const int64_t stride = p.heads * p.width;
  const Strided<T> of_out{of_output, p.queries * stride, p.width, stride};
  const auto keys = pack_blocks(p.key, p.batch, p.key_heads, p.keys, p.depth, KEYS_BACKWARD, true, p.threads);
  const auto key_rows = pack_blocks(p.key, p.batch, p.key_heads, p.keys, p.depth, KEYS_BACKWARD, false, p.threads);
  const auto values = pack_blocks(p.value, p.batch, p.heads, p.keys, p.width, KEYS_BACKWARD, true, p.threads);
  const auto query_rows = pack_blocks(p.query, p.batch, p.heads, p.queries, p.depth, QUERIES, false, p.threads);
  const auto of_out_rows = pack_blocks(of_out, p.batch, p.heads, p.queries, p.width, QUERIES, false, p.threads);
  int64_t mask_stride;
  const auto mask = padded_mask(p, mask_stride);
  const int64_t map_stride = p.columns_of_map + S;
  const int64_t pairs = p.batch * p.heads * p.queries, priors = p.batch * p.prior_heads * p.queries;

  // What each query's gradient loses to the softmax: the sum of output times its gradient.
  const auto lost = buffer<T>(pairs);
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t bq = 0; bq < p.batch * p.queries; ++bq) {
    for (int64_t n = 0; n < p.heads; ++n) {
      const int64_t at = bq * stride + n * p.width;
      T sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t e = 0; e < p.width; ++e) sum += output[at + e] * of_output[at + e];
      lost[(bq / p.queries * p.heads + n) * p.queries + bq % p.queries] = sum;
    }
  }

  // Each group of keys adds up its share of what queries and prior get; the first one's is the result itself.
  const int64_t of_queries = pairs * p.depth, of_rows = priors * p.height, of_columns = priors * p.columns_of_map;
  const bool with_prior = of.rows != nullptr;
  const auto shares = buffer<T>((groups - 1) * of_queries);
  const auto row_shares = buffer<T>(with_prior ? (groups - 1) * of_rows : 0);
  const auto column_shares = buffer<T>(with_prior ? (groups - 1) * of_columns : 0);

  const int64_t size = 2 * QUERIES * KEYS_BACKWARD + S + KEYS_BACKWARD * (p.key_heads * p.depth + p.width) +
                       2 * (KEYS_BACKWARD + S) + 2 * map_stride + QUERIES * p.depth;
  const memory::Rooms<T> rooms(p.threads, size, 9);

#pragma omp parallel num_threads(p.threads)
  {
    auto room = rooms.mine();
    const auto logits = room.take(QUERIES * KEYS_BACKWARD);
    const auto of_weights = room.take(QUERIES * KEYS_BACKWARD + S);  // read in whole vectors from any place in a row on
    const auto of_key = room.take(p.key_heads * KEYS_BACKWARD * p.depth), bias = room.take(KEYS_BACKWARD + S);
    const auto of_value = room.take(KEYS_BACKWARD * p.width), kept = room.take(KEYS_BACKWARD + S);
    const auto padded_columns = room.take(map_stride), padded_gradient = room.take(map_stride);
    const auto query = room.take(QUERIES * p.depth);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < p.batch * groups; ++task) {
      const int64_t b = task / groups, group = task % groups;
      T* query_share = (group ? shares.get() + (group - 1) * of_queries : of.query) + b * p.queries * p.heads * p.depth;
      const int64_t image_priors = b * p.prior_heads * p.queries;
      T *row_share = nullptr, *column_share = nullptr;
      if (with_prior) {
        row_share = (group ? row_shares.get() + (group - 1) * of_rows : of.rows) + image_priors * p.height;
        column_share =
            (group ? column_shares.get() + (group - 1) * of_columns : of.columns) + image_priors * p.columns_of_map;
        std::fill_n(row_share, p.prior_heads * p.queries * p.height, T(0));
        std::fill_n(column_share, p.prior_heads * p.queries * p.columns_of_map, T(0));
      }
      std::fill_n(query_share, p.queries * p.heads * p.depth, T(0));
      const T* image_mask = mask ? mask.get() + b * mask_stride : nullptr;
      for (int64_t block = group * key_blocks / groups; block < (group + 1) * key_blocks / groups; ++block) {
        const int64_t start = block * KEYS_BACKWARD, count = std::min(KEYS_BACKWARD, p.keys - start);
        const int64_t whole = blocks(count, S) * S;
        std::fill_n(of_key.get(), p.key_heads * KEYS_BACKWARD * p.depth, T(0));
        for (int64_t n = 0; n < p.heads; ++n) {
          T* key_gradient = of_key.get() + p.key_head(n) * KEYS_BACKWARD * p.depth;
          std::fill_n(of_value.get(), KEYS_BACKWARD * p.width, T(0));
          for (int64_t query_block = 0; query_block < query_blocks; ++query_block) {
            const int64_t first = query_block * QUERIES, number = std::min(QUERIES, p.queries - first);
            for (int64_t q = 0; q < number; ++q) {
              std::copy_n(p.query.at(b, n, first + q), p.depth, query.get() + q * p.depth);
            }
            gemm::product<T>(number, count, p.depth, query.get(), p.depth, 1, keys.at(b, p.key_head(n), block),
                             logits.get(), KEYS_BACKWARD, false);
            gemm::product<T>(number, count, p.width, of_out.at(b, n, first), of_out.row, 1, values.at(b, n, block),
                             of_weights.get(), KEYS_BACKWARD, false);
            // logits become the weights that met the values; of_weights, the gradient of the logits.
            for (int64_t q = 0; q < number; ++q) {
              T *x = logits.get() + q * KEYS_BACKWARD, *g = of_weights.get() + q * KEYS_BACKWARD;
              const int64_t prior = p.prior_row(0, n, first + q), pair = (b * p.heads + n) * p.queries + first + q;
              const T log_sum = log_sums[pair], loss = lost[pair];
              const T* of_rows = nullptr;
              if (p.height) {
                of_rows = p.rows + (image_priors + prior) * p.height;
                std::copy_n(p.columns + (image_priors + prior) * p.columns_of_map, p.columns_of_map,
                            padded_columns.get());
              }
              const T* added = bias_of(p, image_mask, of_rows, padded_columns.get(), start, count, bias.get());
              if (p.drops.seed) p.drops.draw(pair, start, whole, kept.get());
              for (int64_t i = 0; i < whole; i += S) {
                V logit = load(x + i) * p.scale;
                if (added) logit += load(added + i);
                V weight = exponential::exp<T>(logit - log_sum), gradient = load(g + i), used = weight;
                if (p.drops.seed) {
                  const V factor = load(kept.get() + i);
                  gradient *= factor;
                  used *= factor;
                }
                gradient = weight * (gradient - loss);
                if (i + S > count) gradient = first_of<T>(gradient, count - i);
                store(x + i, used);
                store(g + i, gradient);
              }
              if (with_prior) {
                T* of_row = row_share + prior * p.height;
                T* of_column = column_share + prior * p.columns_of_map;
                std::copy_n(of_column, p.columns_of_map, padded_gradient.get());
                const int64_t width = p.columns_of_map;
                int64_t y = start / width, column = start % width;
                for (int64_t done = 0; done < count; ++y, column = 0) {
                  const int64_t length = std::min(width - column, count - done);
                  V sum = V{};
                  for (int64_t i = 0; i < length; i += S) {
                    V part = load(g + done + i);
                    if (i + S > length) part = first_of<T>(part, length - i);
                    sum += part;
                    store(padded_gradient.get() + column + i, load(padded_gradient.get() + column + i) + part);
                  }
                  of_row[y] += sum_of<T>(sum);
                  done += length;
                }
                std::copy_n(padded_gradient.get(), width, of_column);
              }
            }
            gemm::product<T>(count, p.width, number, logits.get(), 1, KEYS_BACKWARD, of_out_rows.at(b, n, query_block),
                             of_value.get(), p.width, true);
            gemm::product<T>(count, p.depth, number, of_weights.get(), 1, KEYS_BACKWARD,
                             query_rows.at(b, n, query_block), key_gradient, p.depth, true);
            gemm::product<T>(number, p.depth, count, of_weights.get(), KEYS_BACKWARD, 1,
                             key_rows.at(b, p.key_head(n), block), query_share + (first * p.heads + n) * p.depth,
                             p.heads * p.depth, true);
          }
          for (int64_t l = 0; l < count; ++l) {
            std::copy_n(of_value.get() + l * p.width, p.width,
                        of.value + ((b * p.keys + start + l) * p.heads + n) * p.width);
          }
        }
        for (int64_t l = 0; l < count; ++l) {
          for (int64_t n = 0; n < p.key_heads; ++n) {
            const T* from = of_key.get() + (n * KEYS_BACKWARD + l) * p.depth;
            T* to = of.key + ((b * p.keys + start + l) * p.key_heads + n) * p.depth;
            for (int64_t d = 0; d < p.depth; ++d) to[d] = from[d] * p.scale;
          }
        }
      }
    }
#pragma omp for schedule(static)
    for (int64_t pair = 0; pair < pairs; ++pair) {
      T* to = of.query + pair * p.depth;
      for (int64_t group = 1; group < groups; ++group) {
        const T* from = shares.get() + (group - 1) * of_queries + pair * p.depth;
        for (int64_t d = 0; d < p.depth; ++d) to[d] += from[d];
      }
      for (int64_t d = 0; d < p.depth; ++d) to[d] *= p.scale;
    }
    if (with_prior) {
#pragma omp for schedule(static)
      for (int64_t prior = 0; prior < priors; ++prior) {
        for (int64_t group = 1; group < groups; ++group) {
          const T* from = row_shares.get() + (group - 1) * of_rows + prior * p.height;
          for (int64_t y = 0; y < p.height; ++y) of.rows[prior * p.height + y] += from[y];
          from = column_shares.get() + (group - 1) * of_columns + prior * p.columns_of_map;
          for (int64_t x = 0; x < p.columns_of_map; ++x) of.columns[prior * p.columns_of_map + x] += from[x];
        }
      }
    }
  }
}

template <typename T>
Problem<T> problem(const int64_t* d, int threads, const T* query, const T* key, const T* value, const T* rows,
                   const T* columns, const T* mask, const int64_t* seed, double dropout) {
  Problem<T> p{d[0],
               d[1],
               d[2],
               d[3],
               d[4],
               d[5],
               d[6],
               d[7],
               d[8],
               d[9],
               {query, d[10], d[11], d[12]},
               {key, d[13], d[14], d[15]},
               {value, d[16], d[17], d[18]},
               rows,
               columns,
               mask,
               T(1 / std::sqrt(double(d[4]))),
               dropping::Rule<T>(seed, dropout),
               threads};
  const int64_t worth = p.batch * p.heads * p.queries * p.keys * (p.depth + p.width) / (1 << 20) + 1;
  p.threads = int(std::min<int64_t>(threads, worth));  // for less, waking a thread takes longer than its share
  return p;
}

}  // namespace

// dimensions: B, N, Q, L, D, E, heads of the key, H, W (0 without a prior), heads of the prior, and the strides along
// batch, heads and rows of query, key and value.
#define EXPORT_FOR(T, NAME)                                                                                           \
  EXPORT int prior_attention_forward_##NAME(const int64_t* dimensions, int threads, double dropout, const T* query,   \
                                            const T* key, const T* value, const T* rows, const T* columns,            \
                                            const T* mask, const int64_t* seed, T* output, T* log_sums) {             \
    return memory::status_of([&] {                                                                                    \
      forward<T>(problem<T>(dimensions, threads, query, key, value, rows, columns, mask, seed, dropout), output,      \
                 log_sums);                                                                                           \
    });                                                                                                               \
  }                                                                                                                   \
  EXPORT int prior_attention_backward_##NAME(const int64_t* dimensions, int threads, double dropout, const T* query,  \
                                             const T* key, const T* value, const T* rows, const T* columns,           \
                                             const T* mask, const int64_t* seed, const T* output, const T* log_sums,  \
                                             const T* of_output, T* of_query, T* of_key, T* of_value, T* of_rows,     \
                                             T* of_columns) {                                                         \
    return memory::status_of([&] {                                                                                    \
      backward<T>(problem<T>(dimensions, threads, query, key, value, rows, columns, mask, seed, dropout), output,     \
                  log_sums, of_output, Gradients<T>{of_query, of_key, of_value, of_rows, of_columns});                \
    });                                                                                                               \
  }

EXPORT_FOR(float, float32)
EXPORT_FOR(double, float64)
