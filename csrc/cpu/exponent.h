// exp((x - reference) / T) over a row, the operation the CPU backend spends most of its time in.
#pragma once

#include <cmath>

#include "vec.h"

namespace kd::KD_NAMESPACE {

// Where one instruction looks up in registers, 2^f is a table entry times a short polynomial:
// multiply-adds, which read three registers, are the scarcest operation, and 32 entries save four.
#if defined(__AVX512F__)
constexpr int kTableBits = 5;
alignas(64) constexpr float kPowers[] = {
    1.0f,        1.0218972f,  1.04427373f, 1.06714046f, 1.09050775f, 1.1143868f,  1.13878858f,
    1.1637249f,  1.18920708f, 1.21524739f, 1.24185777f, 1.26905096f, 1.29683959f, 1.32523668f,
    1.35425556f, 1.38390994f, 1.41421354f, 1.44518077f, 1.47682619f, 1.50916445f, 1.54221082f,
    1.5759809f,  1.61049032f, 1.64575553f, 1.68179286f, 1.71861935f, 1.75625217f, 1.79470909f,
    1.8340081f,  1.87416768f, 1.91520655f, 1.95714414f};
#else
constexpr int kTableBits = 0;
#endif

// Exponentials come out as 2^(x c - shift), c = log2(e) / T, and so times one factor common to the
// row, `correction`. The shift is a whole number: x c is rounded only once, as a small fraction.
class Exponent {
 public:
  Exponent(float reference, float c) : c_(c) {
    const bool small = ::fabsf(reference * c) < 65536;
    const bool shifts = small && kFusedMultiplyAdd;
    origin_ = shifts ? 0 : reference;
    shift_ = shifts ? ::nearbyintf(reference * c) : 0;
    correction_ = shifts ? ::exp2((double)shift_ - (double)reference * c) : 1;
#if defined(__AVX512F__)
    is_fast_ = small && ::fabsf(shift_) < kMostShift;
    unshift_ = ::exp2f(is_fast_ ? -shift_ : 0);
    grid_ = kGrid;
#else
    is_fast_ = small || !kFusedMultiplyAdd;
    grid_ = kGrid + kBelow - shift_;
#endif
  }

  // For every x: 0 for -inf, NaN for NaN.
  KD_INLINE Vec operator()(Vec x) const { return exp2((x - origin_) * c_ - shift_); }

  // The same in fewer operations where is_fast(), for x within a range about the reference only.
  // left_range() tells from `marks` and the sum of the results whether one was outside.
  KD_INLINE Vec fast(Vec x, Bits& marks) const {
    if constexpr (!kFusedMultiplyAdd) x = x - origin_;
    // The low bits of `steps` count x c, in units of 2^-kTableBits.
    const Vec steps = x * c_ + grid_;
    const Vec rounded = steps - grid_;
    const Vec f = x * c_ - rounded;
    const Vec power = power_of_two(steps, marks);
    const Vec result = power * (polynomial(f) * f) + power;
#if defined(__AVX512F__)
    return (Vec)_mm512_scalef_ps((__m512)result, (__m512)rounded);  // by 2^floor(rounded)
#else
    return result;
#endif
  }

#if defined(__AVX512F__)
  // What is below underflows as it should; too large, infinite or NaN is what has no such result.
  static bool left_range(Bits, double sum) { return !(sum < 0x1p50); }
#else
  static bool left_range(Bits marks, double) { return any_bit(marks >> 7); }
#endif

  bool is_fast() const { return is_fast_; }
  double correction() const { return correction_; }

 private:
  static constexpr int kToExponent = 23 - kTableBits;
  // A float spaced by 2^-kTableBits whose low bits are 0.
  static constexpr float kGrid = 1.5f * (1 << kToExponent);

#if defined(__AVX512F__)
  static constexpr float kMostShift = 120;  // 2^-shift, which the table takes up, is a float

  // 2^-shift times the fraction's power: the lowest 5 bits look it up.
  KD_INLINE Vec power_of_two(Vec steps, Bits&) const {
    const Vec low = load(kPowers) * unshift_, high = load(kPowers + kLanes) * unshift_;
    return (Vec)_mm512_permutex2var_ps((__m512)low, (__m512i)steps, (__m512)high);
  }

  // (2^f - 1) / f for |f| <= 1/64, so that 2^f has a relative error of 5e-8.
  static KD_INLINE Vec polynomial(Vec f) { return horner(f, 2.40226492e-1f, 6.93157315e-1f); }

  float unshift_;
#else
  static constexpr int kBelow = 72;

  // 2^(rounded x c - shift). The range is [-kBelow, 128 - kBelow): there the high bits are those of
  // kGrid, and the low ones count from -kBelow.
  static KD_INLINE Vec power_of_two(Vec steps, Bits& marks) {
    marks |= (Bits)steps ^ (Bits)splat<Vec>(kGrid);
    return (Vec)(((Bits)steps << kToExponent) + ((127u - kBelow) << 23));
  }

  // (2^f - 1) / f for |f| <= 1/2, so that 2^f has a relative error of 2e-9.
  static KD_INLINE Vec polynomial(Vec f) {
    return horner(f, 1.5353362e-4f, 1.33988739e-3f, 9.61843692e-3f, 5.55033237e-2f, 2.40226477e-1f,
                  6.93147182e-1f);
  }
#endif

  float c_, origin_, shift_, grid_;
  double correction_;
  bool is_fast_;
};

}  // namespace kd::KD_NAMESPACE
