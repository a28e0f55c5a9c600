// Element maths shared by every kernel. A function is a template on F, which is float in a CUDA
// thread and a SIMD vector on the CPU. The primitives (select, abs, exp, exp2, log2, log1p) of a
// vector come from csrc/cpu/vec.h, included first: built-in types have no argument-dependent
// lookup.
#pragma once

#include <cmath>

#include "base.h"

namespace kd::KD_NAMESPACE {

KD_INLINE float select(bool condition, float yes, float no) { return condition ? yes : no; }
KD_INLINE float abs(float x) { return fabsf(x); }
#if !defined(KD_OWN_MATH)  // csrc/cuda brings its own, of approximate instructions
KD_INLINE float exp(float x) { return expf(x); }
KD_INLINE float exp2(float x) { return exp2f(x); }
KD_INLINE float log2(float x) { return log2f(x); }
KD_INLINE float log1p(float x) { return log1pf(x); }
#endif

// x / y for a y that is neither subnormal nor above 2^126; csrc/cuda has a faster one.
template <class F>
KD_INLINE F quotient(F x, F y) {
  return x / y;
}

// 1 where x + y > 0, 0 where it is < 0, 1/2 where x = y = 0; csrc/cuda has a faster one.
template <class F>
KD_INLINE F step(F x, float y) {
  const F zero = splat<F>(0.0f);
  return select(x > -y, splat<F>(1.0f), select(x < -y, zero, splat<F>(0.5f)));
}

// x y, and 0 where x is 0, whatever y is: a probability of 0 times an infinite logarithm.
template <class F>
KD_INLINE F times_or_zero(F x, F y) {
  return select(x == 0.0f, splat<F>(0.0f), x * y);
}

// Below this |x| the series of exp(x) - 1 - x replaces its closed form, which cancels there.
constexpr float kSeriesRadius = 0.5f;

// (exp(x) - 1 - x) / x for |x| < kSeriesRadius, relative error below 3e-8 (minimax polynomial).
template <class F>
KD_INLINE F phi_over_x(F x) {
  F polynomial = 1.98756199e-4f * x + 1.3981997e-3f;
  polynomial = polynomial * x + 8.33345205e-3f;
  polynomial = polynomial * x + 4.16657962e-2f;
  polynomial = polynomial * x + 1.66666657e-1f;
  polynomial = polynomial * x + 0.5f;
  return polynomial * x;
}

// phi = exp(x) - 1 - x and expm1 = exp(x) - 1, both to full relative accuracy for every x.
template <class F>
struct Exponential {
  F phi, expm1;
};

template <class F>
KD_INLINE Exponential<F> exponential(F x) {
  const auto small = abs(x) < kSeriesRadius;
  const F series = phi_over_x(x) * x;
  const F grown = exp(x) - 1.0f;
  return {select(small, series, grown - x), select(small, series + x, grown)};
}

// With m = p exp(u): excess = p (exp(u) - 1 - u) >= 0, the term of KL(p || m) made non-negative by
// adding m - p, whose sum is 0, and difference = m - p without cancellation. Both are right where
// p, m or both are 0 and u is infinite.
template <class F>
struct Bregman {
  F excess, difference;
};

template <class F>
KD_INLINE Bregman<F> bregman(F p, F m, F u) {
  const auto small = abs(u) < kSeriesRadius;
  const F pu = times_or_zero(p, u);
  const F series = phi_over_x(u) * pu;
  const F difference = m - p;
  return {select(small, series, difference - pu), select(small, series + pu, difference)};
}

}  // namespace kd::KD_NAMESPACE
