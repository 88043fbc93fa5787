// Whole registers of numbers, in the vector extension of GCC and Clang: where there is no such register, the compiler
// takes several smaller ones.
#pragma once

#include <cstdint>
#include <cstring>

namespace vectors {

#if defined(__AVX512F__)
constexpr int REGISTER = 64;
#elif defined(__AVX__)
constexpr int REGISTER = 32;
#else
constexpr int REGISTER = 16;
#endif

template <typename T>
struct Lanes;

template <>
struct Lanes<float> {
  typedef float Vector __attribute__((vector_size(REGISTER)));
  typedef int32_t Integer;  // as wide
};

template <>
struct Lanes<double> {
  typedef double Vector __attribute__((vector_size(REGISTER)));
  typedef int64_t Integer;
};

template <typename T>
using Vector = typename Lanes<T>::Vector;

template <typename T>
using Integer = typename Lanes<T>::Integer;

// As many integers: what a comparison of two vectors gives, -1 where it holds and else 0.
template <typename T>
using Integers = decltype(Vector<T>() < Vector<T>());

template <typename T>
constexpr int LANES = REGISTER / int(sizeof(T));

// The next multiple of a register's numbers.
template <typename T>
constexpr int64_t whole(int64_t count) {
  return (count + LANES<T> - 1) / LANES<T> * LANES<T>;
}

// From and to any address: nothing that arrives here is aligned to a register.
template <typename T>
inline Vector<T> load(const T* from) {
  Vector<T> vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

template <typename T>
inline Integers<T> load_integers(const Integer<T>* from) {
  Integers<T> vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

template <typename T, typename V>
inline void store(T* to, V vector) {
  static_assert(sizeof vector == REGISTER, "a whole register");
  std::memcpy(to, &vector, sizeof vector);
}

// In halves: one lane after the other, as a loop is compiled, each addition waits for the one before.
template <typename T, int COUNT = LANES<T>, typename V>
inline T sum_of(const V& vector) {
  if constexpr (COUNT == 2) {
    return vector[0] + vector[1];
  } else {
    typedef T Half __attribute__((vector_size(COUNT / 2 * sizeof(T))));
    Half halves[2];
    std::memcpy(halves, &vector, sizeof halves);
    return sum_of<T, COUNT / 2>(halves[0] + halves[1]);
  }
}

template <typename T>
inline T largest_of(const Vector<T>& vector) {
  T most = vector[0];
  for (int k = 1; k < LANES<T>; ++k) most = vector[k] > most ? vector[k] : most;
  return most;
}

}  // namespace vectors
