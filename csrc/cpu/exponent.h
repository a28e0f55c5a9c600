// exp((x - reference) / T) over a row, the operation the CPU backend spends most of its time in.
#pragma once

#include <cmath>

#include "vec.h"

namespace kd::KD_NAMESPACE {

// A factor of all exponentials. With that of AVX2, every entry of its table is within 5e-9 of a
// float.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr float kUnit = 1.08771491f;
#else
constexpr float kUnit = 1;
#endif

// Exponentials come out as kUnit 2^(x c - shift) with c = log2(e) / T; times `correction`, a factor
// of the row, they are exp((x - reference) / T). The shift is a whole number: x c is rounded only
// once, as a small fraction.
class ExponentBase {
 public:
  // For every x: 0 for -inf, NaN for NaN.
  KD_INLINE Vec operator()(Vec x) const { return exp2((x - origin_) * c_ - shift_) * kUnit; }

  // Whether the derived class's fast(x, range) serves the row: the same in fewer operations, but
  // only for x near enough to the reference. The range remembers whether one was not.
  bool is_fast() const { return is_fast_; }
  double correction() const { return correction_; }

 protected:
  // A float spaced by 2^-bits whose low bits are 0.
  static constexpr float grid(int bits) { return 1.5f * (1 << (23 - bits)); }

  // A larger shift than `most_shift` is cut to that, as long as the exponential of the reference
  // stays within a factor of 2^40 of 1. Beyond, the row is not fast.
  ExponentBase(float reference, float c, float most_shift) : c_(c) {
    const float exponent = reference * c;
    const bool small = ::fabsf(exponent) < 65536;
    const bool shifts = small && kFusedMultiplyAdd;
    origin_ = shifts ? 0 : reference;
    shift_ = shifts ? ::nearbyintf(exponent) : 0;
    is_fast_ = small || !kFusedMultiplyAdd;
    if (::fabsf(shift_) > most_shift) {
      if (::fabsf(shift_) <= most_shift + 40)
        shift_ = ::copysignf(most_shift, shift_);
      else
        is_fast_ = false;
    }
    correction_ = (shifts ? ::exp2((double)shift_ - (double)reference * c) : 1) / kUnit;
  }

  float c_, origin_, shift_;

 private:
  double correction_;
  bool is_fast_;
};

#if defined(__AVX512F__)

// 2^f = kWidth ((f + kCentre)^2 + kRest) for |f| <= 1/64, with a relative error of 1.3e-7. The
// centre is a whole number of steps of 1/32, so that subtracting it costs nothing.
constexpr double kWidth = 0.24109941474;
constexpr float kCentre = 46 / 32.0f, kRest = 2.08125997f;

// kWidth 2^(j / 32), times 4 or 2: the floor of x - kCentre is 2 below that of x where the fraction
// of x is below 14/32, else 1.
struct Powers {
  constexpr Powers() : entries() {
    constexpr double step = 1.0218971486541166;  // 2^(1 / 32)
    double power = kWidth;
    for (int j = 0; j < 32; ++j, power *= step) entries[j] = (float)(power * (j < 14 ? 4 : 2));
  }

  alignas(64) float entries[32];
};

constexpr Powers kPowers;

// Where one instruction looks up in two registers, 2^x is a table entry times a parabola. What
// reads three registers costs most: this takes four such operations, a polynomial in f a fifth.
class Exponent : public ExponentBase {
 public:
  Exponent(float reference, float c)
      : ExponentBase(reference, c, 120), unshift_(is_fast() ? ::exp2f(-shift_) : 1) {}

  // What is far below the reference underflows, as it should. What is too far above shows in the
  // sum: it is infinite, NaN, or too large to become 1 by a float factor.
  struct Range {
    bool was_left(double sum) const { return !(sum < 0x1p50); }
  };

  static constexpr bool kHasWide = false;  // as fast() is
  KD_INLINE Vec wide(Vec x, Range& range) const { return fast(x, range); }

  KD_INLINE Vec fast(Vec x, Range&) const {
    // Its low bits count x c in units of 1/32.
    const Vec steps = multiply_add(x, c_, splat<Vec>(kGrid));
    const Vec rounded = steps - (kGrid + kCentre);
    const Vec f = multiply_add(x, c_, -rounded);
    const Vec low = load(kPowers.entries) * unshift_;
    const Vec high = load(kPowers.entries + kLanes) * unshift_;
    const Vec entry = (Vec)_mm512_permutex2var_ps((__m512)low, (__m512i)steps, (__m512)high);
    const Vec power = entry * (f * f + kRest);
    return (Vec)_mm512_scalef_ps((__m512)power, (__m512)rounded);  // by 2^floor(rounded)
  }

 private:
  static constexpr float kGrid = grid(5);

  float unshift_;  // 2^-shift
};

#else

constexpr int kBelow = 72;

#if defined(__AVX2__)
constexpr int kSteps = 3;

// kUnit 2^(j / 8 - kBelow), less what the bits of j add.
struct Powers {
  constexpr Powers() : entries() {
    constexpr double step = 1.0905077326652577;  // 2^(1 / 8)
    double power = kUnit;
    for (int j = 0; j < 8; ++j, power *= step) entries[j] = (float)((power - j / 8.0) * 0x1p-72);
  }

  alignas(32) float entries[8];
};

constexpr Powers kPowers;

// Where one instruction looks up in a register, a polynomial of half the degree will do.
KD_INLINE Bits unit(Vec steps) {
  const Vec powers = load(kPowers.entries);
  return (Bits)_mm256_permutevar8x32_ps((__m256)powers, (__m256i)steps);
}

// (2^f - 1) / f for |f| <= 1/16, so that 2^f has a relative error of 2.7e-8.
KD_INLINE Vec growth(Vec f) { return horner(f, 5.5496223e-2f, 2.4025764e-1f, 6.9314724e-1f); }
#else
constexpr int kSteps = 0;

KD_INLINE Bits unit(Vec) { return Bits{} + ((127u - kBelow) << 23); }

// (2^f - 1) / f for |f| <= 1/2, so that 2^f has a relative error of 2e-9.
KD_INLINE Vec growth(Vec f) {
  return horner(f, 1.5353362e-4f, 1.33988739e-3f, 9.61843692e-3f, 5.55033237e-2f, 2.40226477e-1f,
                6.93147182e-1f);
}
#endif

class Exponent : public ExponentBase {
 public:
  Exponent(float reference, float c)
      : ExponentBase(reference, c, __builtin_inff()),
        grid_(kGrid + kBelow - shift_),
        low_((shift_ - kBelow + 4) / c),
        bottom_((shift_ - kBelow + 4 - 64) / c) {}

  // Exponents in [-kBelow, 128 - kBelow): there the high bits of `steps` are those of kGrid.
  struct Range {
    Bits marks = {};
    bool was_left(double) const { return any_bit(marks >> (7 + kSteps)); }
  };

  KD_INLINE Vec fast(Vec x, Range& range) const {
    if constexpr (!kFusedMultiplyAdd) x = x - origin_;
    // Its low bits count x c from -kBelow, in units of 2^-kSteps.
    const Vec steps = multiply_add(x, c_, splat<Vec>(grid_));
    range.marks |= (Bits)steps ^ (Bits)splat<Vec>(kGrid);
    const Vec f = multiply_add(x, c_, grid_ - steps);
    const Vec power = (Vec)(((Bits)steps << (23 - kSteps)) + unit(steps));
    return power * (growth(f) * f) + power;
  }

  // fast() for what is far below the reference too, -inf included.
  static constexpr bool kHasWide = true;
  KD_INLINE Vec wide(Vec x, Range& range) const {
    if constexpr (!kFusedMultiplyAdd) x = x - origin_;
    const auto low = x < low_, none = x < bottom_;
    x = max(splat<Vec>(bottom_), x);
    const Vec grid = select(low, splat<Vec>(grid_ + 64), splat<Vec>(grid_));
    const Vec steps = multiply_add(x, c_, grid);
    range.marks |= (Bits)steps ^ (Bits)splat<Vec>(kGrid);
    const Vec f = multiply_add(x, c_, grid - steps);
    const Vec power = (Vec)(((Bits)steps << (23 - kSteps)) + unit(steps));
    const Vec unit_of = select(none, Vec{}, select(low, splat<Vec>(0x1p-64f), splat<Vec>(1)));
    return (power * (growth(f) * f) + power) * unit_of;
  }

 private:
  static constexpr float kGrid = grid(kSteps);

  float grid_;
  float low_, bottom_;  // where wide() changes its unit, and where it ends
};

#endif

}  // namespace kd::KD_NAMESPACE
