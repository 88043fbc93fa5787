// Matrix products for kernels that work on blocks which stay in a core's caches: products whose operands were just made
// there, or whose results are used up there. Single-threaded; the callers share out the work.
//
// C = A B with A in rows (m x k) and B packed: panels of WIDTH columns, each k x WIDTH, zeros where B has no more
// columns. A tile of C, ROWS x WIDTH, stays in registers for all of k.
#pragma once

#include <cstdint>
#include <cstring>

#include "../vectors.h"

namespace gemm {

// Of a tile of C: with AVX-512 24 registers of sums and 2 of B, else 12 and 2 of 16.
constexpr int ROWS = vectors::REGISTER == 64 ? 12 : 6;

template <typename T>
constexpr int WIDTH = 2 * vectors::LANES<T>;

inline int64_t panels(int64_t columns, int64_t width) { return (columns + width - 1) / width; }

// Numbers that n columns of k rows take when they are packed.
template <typename T>
inline int64_t packed_size(int64_t k, int64_t n) {
  return panels(n, WIDTH<T>) * WIDTH<T> * k;
}

// One panel of B, whose element (row, column) is b[row * row_stride + column * column_stride]; `columns` exist.
template <typename T>
inline void pack_panel(const T* b, int64_t row_stride, int64_t column_stride, int64_t k, int64_t columns, T* packed) {
  constexpr int W = WIDTH<T>;
  if (column_stride == 1 && columns == W) {
    for (int64_t row = 0; row < k; ++row) std::memcpy(packed + row * W, b + row * row_stride, W * sizeof(T));
    return;
  }
  if (columns < W) std::memset(packed, 0, k * W * sizeof(T));
  if (row_stride == 1) {  // columns of B lie in rows of memory: read these, 16 numbers at a time
    for (int64_t first = 0; first < k; first += 16) {
      const int64_t last = first + 16 < k ? first + 16 : k;
      for (int64_t column = 0; column < columns; ++column) {
        for (int64_t row = first; row < last; ++row) packed[row * W + column] = b[row + column * column_stride];
      }
    }
    return;
  }
  for (int64_t row = 0; row < k; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      packed[row * W + column] = b[row * row_stride + column * column_stride];
    }
  }
}

template <typename T>
inline void pack(const T* b, int64_t row_stride, int64_t column_stride, int64_t k, int64_t n, T* packed) {
  for (int64_t column = 0; column < n; column += WIDTH<T>) {
    const int64_t columns = n - column < WIDTH<T> ? n - column : WIDTH<T>;
    pack_panel(b + column * column_stride, row_stride, column_stride, k, columns, packed + column * k);
  }
}

// Sums of M rows of A times one panel. `a` has element (row, i) at a[row * row_stride + i * step].
template <typename T, int M>
struct Tile {
  vectors::Vector<T> sums[M][2];

  inline void zero() {
#pragma GCC unroll 16
    for (int row = 0; row < M; ++row) sums[row][0] = sums[row][1] = vectors::Vector<T>{};
  }

  inline void load_from(const T* c, int64_t stride) {
#pragma GCC unroll 16
    for (int row = 0; row < M; ++row) {
      sums[row][0] = vectors::load(c + row * stride);
      sums[row][1] = vectors::load(c + row * stride + vectors::LANES<T>);
    }
  }

  inline void multiply(const T* a, int64_t row_stride, int64_t step, const T* panel, int64_t k) {
    for (int64_t i = 0; i < k; ++i) {
      const auto left = vectors::load(panel), right = vectors::load(panel + vectors::LANES<T>);
#pragma GCC unroll 16
      for (int row = 0; row < M; ++row) {
        const T factor = a[row * row_stride];
        sums[row][0] += factor * left;
        sums[row][1] += factor * right;
      }
      a += step;
      panel += WIDTH<T>;
    }
  }

  inline void store_to(T* c, int64_t stride) const {
#pragma GCC unroll 16
    for (int row = 0; row < M; ++row) {
      vectors::store(c + row * stride, sums[row][0]);
      vectors::store(c + row * stride + vectors::LANES<T>, sums[row][1]);
    }
  }

  inline void store_to(T* c, int64_t stride, int64_t columns) const {
    if (columns == WIDTH<T>) return store_to(c, stride);
    T row_of[WIDTH<T>];
    for (int row = 0; row < M; ++row) {
      vectors::store(row_of, sums[row][0]);
      vectors::store(row_of + vectors::LANES<T>, sums[row][1]);
      std::memcpy(c + row * stride, row_of, columns * sizeof(T));
    }
  }
};

// Calls `block(first_row, tile)` for the rows of A, ROWS at a time and fewer at the end. `Tile` is handed over with the
// number of rows as a constant, so that it lives in registers.
template <typename T, int M, typename Block>
inline void rows_left(int64_t first, int64_t left, const Block& block) {
  if constexpr (M > 0) {
    if (left == M) {
      Tile<T, M> tile;
      block(first, tile);
    } else {
      rows_left<T, M - 1>(first, left, block);
    }
  }
}

template <typename T, typename Block>
inline void in_rows(int64_t m, const Block& block) {
  int64_t row = 0;
  for (; row + ROWS <= m; row += ROWS) {
    Tile<T, ROWS> tile;
    block(row, tile);
  }
  rows_left<T, ROWS - 1>(row, m - row, block);
}

// C = A B, or C += A B: a panel of B at a time, which suits panels that fit into the first cache.
template <typename T>
inline void product(int64_t m, int64_t n, int64_t k, const T* a, int64_t row_stride, int64_t step, const T* packed,
                    T* c, int64_t stride, bool add) {
  for (int64_t column = 0; column < n; column += WIDTH<T>) {
    const int64_t columns = n - column < WIDTH<T> ? n - column : WIDTH<T>;
    in_rows<T>(m, [&](int64_t row, auto& tile) {
      T* target = c + row * stride + column;
      if (add && columns == WIDTH<T>) {
        tile.load_from(target, stride);
      } else {
        tile.zero();
      }
      tile.multiply(a + row * row_stride, row_stride, step, packed + column * k, k);
      if (add && columns < WIDTH<T>) {
        T sums[ROWS * WIDTH<T>];
        tile.store_to(sums, WIDTH<T>);
        for (int64_t r = 0; r < int64_t(sizeof(tile.sums) / sizeof(tile.sums[0])); ++r) {
          for (int64_t i = 0; i < columns; ++i) target[r * stride + i] += sums[r * WIDTH<T> + i];
        }
      } else {
        tile.store_to(target, stride, columns);
      }
    });
  }
}

}  // namespace gemm
