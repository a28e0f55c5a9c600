// exp((x - reference) / T) over a row, the operation the CPU backend spends most of its time in.
#pragma once

#include <cmath>

#include "vec.h"

namespace kd::KD_NAMESPACE {

// 2^x for x in [0, 1) is a table entry, where one instruction looks up in registers, times a
// polynomial. Multiply-adds are the scarcest operation, and 32 entries save four.
#if defined(__AVX512F__)
constexpr int kTableBits = 5;
constexpr float kPowers[] = {
    1.0f,        1.0218972f,  1.04427373f, 1.06714046f, 1.09050775f, 1.1143868f,  1.13878858f,
    1.1637249f,  1.18920708f, 1.21524739f, 1.24185777f, 1.26905096f, 1.29683959f, 1.32523668f,
    1.35425556f, 1.38390994f, 1.41421354f, 1.44518077f, 1.47682619f, 1.50916445f, 1.54221082f,
    1.5759809f,  1.61049032f, 1.64575553f, 1.68179286f, 1.71861935f, 1.75625217f, 1.79470909f,
    1.8340081f,  1.87416768f, 1.91520655f, 1.95714414f};
#else
constexpr int kTableBits = 0;
constexpr float kPowers[] = {1.0f};
#endif

// Exponentials come out as 2^(x c - shift), c = log2(e) / T, and so times one factor common to the
// row, `correction`. The shift is a whole number: x c is rounded only once, as a small fraction.
class Exponent {
 public:
  Exponent(float reference, float c) : c_(c) {
    const bool small = ::fabsf(reference * c) < 65536;
    is_fast_ = small || !kFusedMultiplyAdd;
    const bool shifts = small && kFusedMultiplyAdd;
    origin_ = shifts ? 0 : reference;
    shift_ = shifts ? ::nearbyintf(reference * c) : 0;
    correction_ = shifts ? ::exp2((double)shift_ - (double)reference * c) : 1;
    grid_ = kGrid + kBelow - shift_;
  }

  // For every x: 0 for -inf, NaN for NaN.
  KD_INLINE Vec operator()(Vec x) const { return exp2((x - origin_) * c_ - shift_); }

  // The same in fewer operations where is_fast(), for exponents in [-kBelow, 128 - kBelow) only;
  // others leave their mark in `outside`.
  KD_INLINE Vec fast(Vec x, Bits& outside) const {
    if constexpr (!kFusedMultiplyAdd) x = x - origin_;
    // The low bits of `steps` count in units of 2^-kTableBits from -kBelow. The high bits are those
    // of kGrid for exponents within the range.
    const Vec steps = x * c_ + grid_;
    outside |= (Bits)steps ^ (Bits)splat<Vec>(kGrid);
    const Vec f = x * c_ - (steps - grid_);
    const Vec power = (Vec)(table_entry(steps) + ((Bits)steps << kToExponent));
    return power * (polynomial(f) * f) + power;
  }

  static bool any_outside(Bits outside) { return any_bit(outside >> (7 + kTableBits)); }

  bool is_fast() const { return is_fast_; }
  double correction() const { return correction_; }

 private:
  static constexpr int kBelow = 72;
  static constexpr int kToExponent = 23 - kTableBits;
  // A float spaced by 2^-kTableBits whose low bits are 0.
  static constexpr float kGrid = 1.5f * (1 << kToExponent);

  // The bits of a power of two in [1, 2), less what the count itself adds to its place.
  static constexpr uint32_t entry(uint32_t j) {
    return __builtin_bit_cast(uint32_t, kPowers[j]) - (j << kToExponent) - (kBelow << 23);
  }

#if defined(__AVX512F__)
  // Of the lowest 5 bits.
  static KD_INLINE Bits table_entry(Vec steps) {
    constexpr auto half = [](uint32_t first) {
      return Bits{entry(first),      entry(first + 1),  entry(first + 2),  entry(first + 3),
                  entry(first + 4),  entry(first + 5),  entry(first + 6),  entry(first + 7),
                  entry(first + 8),  entry(first + 9),  entry(first + 10), entry(first + 11),
                  entry(first + 12), entry(first + 13), entry(first + 14), entry(first + 15)};
    };
    return (Bits)_mm512_permutex2var_epi32((__m512i)half(0), (__m512i)steps, (__m512i)half(16));
  }

  // (2^f - 1) / f for |f| <= 1/64, so that 2^f has a relative error of 5e-8.
  static KD_INLINE Vec polynomial(Vec f) { return horner(f, 2.40226492e-1f, 6.93157315e-1f); }
#else
  static KD_INLINE Bits table_entry(Vec) { return Bits{} + entry(0); }

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
