// Memory of the kernels, whose lack Python learns of: no exception may pass through a C function, nor leave a parallel
// region, in which therefore nothing is allocated.
#pragma once

#include <cstdint>
#include <memory>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace memory {

// What `work` returns to Python: 0, or 1 if it ran out of memory.
template <typename Work>
int status_of(Work work) noexcept {
  try {
    work();
    return 0;
  } catch (...) {  // std::bad_alloc, or std::length_error for sizes that no memory has
    return 1;
  }
}

// A part of a room.
template <typename T>
struct Part {
  T* data;
  T* get() const { return data; }
  T& operator[](int64_t i) const { return data[i]; }
};

// Room for each thread of a parallel region that follows, `size` elements in `parts` parts; not set to anything.
template <typename T>
class Rooms {
  static constexpr int64_t LINE = 64 / sizeof(T) ? 64 / sizeof(T) : 1;  // no two threads write into one line of a cache
  int64_t size_;
  std::unique_ptr<T[]> data_;

 public:
  Rooms(int threads, int64_t size, int parts = 1)
      : size_((size / LINE + 1 + parts) * LINE), data_(new T[threads * size_]) {}

  class Room {
    T* next_;

   public:
    explicit Room(T* first) : next_(first) {}
    Part<T> take(int64_t size) {
      Part<T> part{next_};
      next_ += (size + LINE - 1) / LINE * LINE;
      return part;
    }
  };

  // Of the thread that asks.
  Room mine() const {
#ifdef _OPENMP
    return Room(data_.get() + omp_get_thread_num() * size_);
#else
    return Room(data_.get());
#endif
  }
};

}  // namespace memory
