// Memory of a kernel for the time of a call.
#pragma once

#include <cstdint>
#include <memory>

// That of all threads in one piece, which starts with a line of the caches; nothing is in it.
template <typename T>
struct Scratch {
  static constexpr int64_t LINE = 64 / sizeof(T);
  std::unique_ptr<T[]> memory;
  T* start;

  explicit Scratch(int64_t size) : memory(new T[size + LINE]) {
    start = memory.get() + (LINE - reinterpret_cast<uintptr_t>(memory.get()) / sizeof(T) % LINE) % LINE;
  }
};
