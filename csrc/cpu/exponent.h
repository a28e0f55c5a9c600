// exp((x - reference) / T) over a row, the operation the CPU backend spends most of its time in.
#pragma once

#include <cmath>

#include "vec.h"

namespace kd::KD_NAMESPACE {

#if defined(__AVX512F__)
// Where one instruction looks up in two registers, 2^x is a table entry times a parabola. What
// reads three registers costs most: this takes four such operations, a polynomial in f a fifth.
constexpr int kTableBits = 5;

// 2^f = kWidth ((f + kCentre)^2 + kRest) for |f| <= 1/64, with a relative error of 1.3e-7. The
// centre is a whole number of steps, so that subtracting it costs nothing.
constexpr float kCentre = 46 / 32.0f, kRest = 2.08125997f;
constexpr double kWidth = 0.24109941474;

struct Powers {
  // kWidth 2^(j / 32), and what floor(x - kCentre) lacks to the floor of x.
  constexpr Powers() : entries() {
    double power = kWidth;
    for (int j = 0; j < 1 << kTableBits; ++j) {
      entries[j] = (float)(power * (j / 32.0 < kCentre - 1 ? 4 : 2));
      power *= 1.0218971486541166;
    }
  }

  alignas(64) float entries[1 << kTableBits];
};

constexpr Powers kPowers;
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
#else
    is_fast_ = small || !kFusedMultiplyAdd;
    grid_ = kGrid + kBelow - shift_;
#endif
  }

  // For every x: 0 for -inf, NaN for NaN.
  KD_INLINE Vec operator()(Vec x) const { return exp2((x - origin_) * c_ - shift_); }

  // The same in fewer operations where is_fast(), for x within a range about the reference only.
  // left_range() tells from `marks` and the sum of the results whether one was outside.
#if defined(__AVX512F__)
  KD_INLINE Vec fast(Vec x, Bits&) const {
    const Vec steps = x * c_ + kGrid;
    const Vec rounded = steps - (kGrid + kCentre);
    const Vec f = x * c_ - rounded;
    const Vec power = table_entry(steps) * (f * f + kRest);
    return (Vec)_mm512_scalef_ps((__m512)power, (__m512)rounded);  // by 2^floor(rounded)
  }
#else
  KD_INLINE Vec fast(Vec x, Bits& marks) const {
    if constexpr (!kFusedMultiplyAdd) x = x - origin_;
    // Within [-kBelow, 128 - kBelow) the high bits are those of kGrid, the low ones count from
    // -kBelow.
    const Vec steps = x * c_ + grid_;
    marks |= (Bits)steps ^ (Bits)splat<Vec>(kGrid);
    const Vec f = x * c_ - (steps - grid_);
    const Vec power = (Vec)(((Bits)steps << kToExponent) + ((127u - kBelow) << 23));
    return power * (polynomial(f) * f) + power;
  }
#endif

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

  // That of the lowest bits of `steps`, times 2^-shift.
  KD_INLINE Vec table_entry(Vec steps) const {
    const Vec low = load(kPowers.entries) * unshift_;
    const Vec high = load(kPowers.entries + kLanes) * unshift_;
    return (Vec)_mm512_permutex2var_ps((__m512)low, (__m512i)steps, (__m512)high);
  }

  float unshift_;
#else
  static constexpr int kBelow = 72;

  // (2^f - 1) / f for |f| <= 1/2, so that 2^f has a relative error of 2e-9.
  static KD_INLINE Vec polynomial(Vec f) {
    return horner(f, 1.5353362e-4f, 1.33988739e-3f, 9.61843692e-3f, 5.55033237e-2f, 2.40226477e-1f,
                  6.93147182e-1f);
  }

  float grid_;
#endif

  float c_, origin_, shift_;
  double correction_;
  bool is_fast_;
};

}  // namespace kd::KD_NAMESPACE
