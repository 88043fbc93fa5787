// exp() of whole vectors.
#pragma once

#include <cstdint>

#include "../vectors.h"

namespace exponential {

template <typename T>
struct Constants;

template <>
struct Constants<float> {
  static constexpr int MANTISSA = 23, BIAS = 127, TERMS = 7;
  static constexpr float SHIFT = 12582912.0f;                                 // 1.5 * 2^23
  static constexpr float LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;  // ln 2, the first with zeros at its end
  static constexpr float LEAST = -88.0f;
};

template <>
struct Constants<double> {
  static constexpr int MANTISSA = 52, BIAS = 1023, TERMS = 13;
  static constexpr double SHIFT = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double LN2_HIGH = 6.93147180369123816490e-01, LN2_LOW = 1.90821492927058770002e-10;
  static constexpr double LEAST = -709.0;
};

constexpr double factorial(int n) { return n > 1 ? n * factorial(n - 1) : 1; }

// Of x up to 88 (709). Below LEAST, where a result would not be normal, it is 0; of NaN, NaN.
template <typename T>
inline vectors::Vector<T> exp(vectors::Vector<T> x) {
  typedef vectors::Vector<T> V;
  typedef Constants<T> C;
  typedef vectors::Integers<T> I;
  const V least = C::LEAST - V{};
  x = x < least ? least : x;
  // x = n ln 2 + r: adding SHIFT leaves n in the last bits.
  const V shifted = x * T(1.4426950408889634) + C::SHIFT, n = shifted - C::SHIFT;
  const V r = (x - n * C::LN2_HIGH) - n * C::LN2_LOW;
  V sum = T(1.0 / factorial(C::TERMS)) - V{};
#pragma GCC unroll 13
  for (int term = C::TERMS - 1; term >= 0; --term) sum = sum * r + T(1.0 / factorial(term));
  const I exponent = (I)shifted + vectors::Integer<T>(C::BIAS);  // SHIFT's own last bits are 0
  return sum * (V)(exponent << C::MANTISSA);
}

}  // namespace exponential
