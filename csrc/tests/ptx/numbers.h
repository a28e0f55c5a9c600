// What the instructions of translated PTX do to numbers. Registers are those of C++'s types.
#pragma once

#include <type_traits>

#include "../emulator.h"

// For the time it takes to compile thousands of calls.
#define KD_CALL inline __attribute__((noinline))

struct float16 {
  uint16_t bits;
  operator float() const { return kd::cuda::from_float16(bits); }
};
struct bfloat16 {
  uint16_t bits;
  operator float() const { return kd::cuda::from_bfloat16(bits); }
};
struct float16x2 {
  float16 low, high;
};
struct bfloat16x2 {
  bfloat16 low, high;
};

template <size_t kSize>
using Unsigned = std::conditional_t<
    kSize == 1, uint8_t,
    std::conditional_t<kSize == 2, uint16_t, std::conditional_t<kSize == 4, uint32_t, uint64_t>>>;
template <class T>
using UnsignedOf = Unsigned<sizeof(T)>;

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// The lower bits of a register, or of a constant.
template <class T, class Register>
T as(Register x) {
  if constexpr (std::is_same_v<T, bool>)
    return x != 0;
  else if constexpr (std::is_pointer_v<Register>)
    return (T)(uint64_t)x;
  else if constexpr (std::is_floating_point_v<Register>)
    return as<T>(bit_cast<UnsignedOf<Register>>(x));
  else
    return bit_cast<T>((UnsignedOf<T>)x);
}

template <class Register, class T>
void set(Register& to, T x) {
  if constexpr (std::is_floating_point_v<Register>)
    to = as<Register>(x);
  else if constexpr (std::is_integral_v<T>)
    to = (Register)x;  // a signed number extends its sign
  else
    to = bit_cast<UnsignedOf<T>>(x);
}

template <class Part, class Register>
Part part(Register x, int which) {
  return (Part)(x >> (which * 8 * sizeof(Part)));
}
// The first part is the lowest.
template <class... Parts>
auto joined(Parts... parts) {
  using Whole = Unsigned<(sizeof(Parts) + ...)>;
  Whole whole = 0;
  unsigned at = 0;
  ((whole |= (Whole)((Whole)parts << at), at += 8 * sizeof(Parts)), ...);
  return whole;
}

inline float flush(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  return bit_cast<float>(bits & 0x7f800000 ? bits : bits & 0x80000000);
}

template <class T>
constexpr bool kIsFloat = !std::is_integral_v<T>;

template <class T>
T add_(T x, T y) {
  return x + y;
}
template <class T>
T and_(T x, T y) {
  return x & y;
}
template <class T>
T or_(T x, T y) {
  return x | y;
}
template <class T>
T xor_(T x, T y) {
  return x ^ y;
}
template <class T>
T not_(T x) {
  if constexpr (std::is_same_v<T, bool>)
    return !x;
  else
    return ~x;
}
template <class T>
T neg_(T x) {
  if constexpr (std::is_integral_v<T>)
    return (T) - (UnsignedOf<T>)x;
  else
    return -x;
}
template <class T>
T abs_(T x) {
  if constexpr (std::is_integral_v<T>)
    return x < 0 ? (T) - (UnsignedOf<T>)x : x;
  else
    return std::fabs(x);
}
// A NaN loses, and -0 is below 0.
template <class T>
T min_(T x, T y) {
  if constexpr (kIsFloat<T>) {
    if (x != x || y != y) return x != x ? y : x;
    if (x == y) return std::signbit(x) ? x : y;
  }
  return y < x ? y : x;
}
template <class T>
T max_(T x, T y) {
  if constexpr (kIsFloat<T>) {
    if (x != x || y != y) return x != x ? y : x;
    if (x == y) return std::signbit(x) ? y : x;
  }
  return x < y ? y : x;
}
template <class T>
T min_NaN(T x, T y) {
  return x != x ? x : y != y ? y : min_(x, y);
}
template <class T>
T max_NaN(T x, T y) {
  return x != x ? x : y != y ? y : max_(x, y);
}
KD_CALL float16x2 max_(float16x2 x, float16x2 y) {
  return bit_cast<float16x2>(kd::cuda::max_float16x2(bit_cast<uint32_t>(x), bit_cast<uint32_t>(y)));
}
KD_CALL bfloat16x2 max_(bfloat16x2 x, bfloat16x2 y) {
  return bit_cast<bfloat16x2>(
      kd::cuda::max_bfloat16x2(bit_cast<uint32_t>(x), bit_cast<uint32_t>(y)));
}

template <class T>
T fma_(T x, T y, T z) {
  return std::fma(x, y, z);
}
KD_CALL float fma_sat(float x, float y, float z) {
  return std::fmin(std::fmax(std::fma(x, y, z), 0.0f), 1.0f);
}
template <class T>
T copysign_(T sign, T size) {
  return std::copysign(size, sign);
}
template <class T>
T sqrt_(T x) {
  return std::sqrt(x);
}
// Rounds towards zero: back by one where rounding to nearest went away from the exact sum.
KD_CALL float add_rz(float x, float y) {
  const float sum = x + y, of_y = sum - x;
  const float rest = (x - (sum - of_y)) + (y - of_y);
  return rest != 0 && (rest < 0) == (sum > 0) ? std::nextafter(sum, 0.0f) : sum;
}

KD_CALL float ex2_approx(float x) { return kd::cuda::exp2_approx(x); }
KD_CALL float lg2_approx(float x) { return kd::cuda::log2_approx(x); }
KD_CALL float rcp_approx(float x) { return kd::cuda::reciprocal_approx(x); }
inline double rcp_approx(double x) {  // its upper half
  return bit_cast<double>(bit_cast<uint64_t>(1 / x) >> 32 << 32);
}
KD_CALL float sqrt_approx(float x) {
  return (float)(std::sqrt((double)x) * (1 + kd::cuda::allowed_error(x)));
}
KD_CALL float rsqrt_approx(float x) {
  return (float)(1 / std::sqrt((double)x) * (1 + kd::cuda::allowed_error(x)));
}
KD_CALL float tanh_approx(float x) {
  return (float)(std::tanh((double)x) * (1 + 0x1p11 * kd::cuda::allowed_error(x)));
}
// By the reciprocal, scaled as ptxas does where it or the number itself would be flushed.
KD_CALL float div_approx(float x, float y) {
  const float size = std::fabs(y), scale = size > 0x1p126f ? 0.25f : size < 0x1p-126f ? 0x1p24f : 1;
  return x * scale * rcp_approx(y * scale);
}
template <class T>
T div_(T x, T y) {
  return x / y;
}
template <class T>
T rem_(T x, T y) {
  return x % y;
}

template <class T>
T multiply_lo(T x, T y) {
  return (T)((uint64_t)x * (uint64_t)y);
}
template <class T>
auto multiply_wide(T x, T y) {
  if constexpr (std::is_signed_v<T>)
    return (std::make_signed_t<Unsigned<2 * sizeof(T)>>)((int64_t)x * y);
  else
    return (Unsigned<2 * sizeof(T)>)((uint64_t)x * y);
}
template <class T>
T multiply_hi(T x, T y) {
  return (T)((unsigned __int128)((__int128)x * (__int128)y) >> (8 * sizeof(T)));
}
template <class T, class Register>
T sum_with(T product, Register x) {
  return add_(product, as<T>(x));
}

template <class T>
T shift_left(T x, uint32_t by) {
  return by >= 8 * sizeof(T) ? 0 : (T)((UnsignedOf<T>)x << by);
}
template <class T>
T shift_right(T x, uint32_t by) {
  if (by >= 8 * sizeof(T)) return x < 0 ? (T)-1 : 0;
  return x >> by;
}
template <class T>
uint32_t leading_zeros(T x) {
  return x ? __builtin_clzll(x) - (64 - 8 * sizeof(T)) : 8 * sizeof(T);
}
template <class T>
uint32_t ones(T x) {
  return __builtin_popcountll((UnsignedOf<T>)x);
}
inline uint32_t funnel_l(uint32_t low, uint32_t high, uint32_t by) {
  return (uint32_t)(((uint64_t)high << 32 | low) << (by & 31) >> 32);
}
inline uint32_t funnel_r(uint32_t low, uint32_t high, uint32_t by) {
  return (uint32_t)(((uint64_t)high << 32 | low) >> (by & 31));
}
KD_CALL uint32_t permute(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = (uint64_t)high << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t which = selector >> (4 * i) & 15;
    uint32_t byte = (uint32_t)(bytes >> (8 * (which & 7))) & 255;
    if (which & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << (8 * i);
  }
  return result;
}
KD_CALL uint32_t logic(uint32_t x, uint32_t y, uint32_t z, uint32_t table) {
  uint32_t result = 0;
  for (int i = 0; i < 8; ++i)
    if (table >> i & 1) result |= (i & 4 ? x : ~x) & (i & 2 ? y : ~y) & (i & 1 ? z : ~z);
  return result;
}
template <class T>
T extract(T x, uint32_t at, uint32_t count) {
  const unsigned bits = 8 * sizeof(T);
  at &= 255;
  count &= 255;
  if (count == 0) return 0;
  if (at >= bits) return std::is_signed_v<T> && x < 0 ? (T)-1 : 0;
  const unsigned unused = at + count < bits ? bits - at - count : 0;
  return (T)((T)((UnsignedOf<T>)x << unused)) >> (unused + at);
}

// ---- Comparisons: those with u are true of a NaN ----

struct Both {
  bool first, second;
};
#define KD_COMPARE(name, condition)                                                      \
  template <class T>                                                                     \
  bool compare_##name(T x, T y) {                                                        \
    [[maybe_unused]] const bool nan = x != x || y != y;                                  \
    return condition;                                                                    \
  }                                                                                      \
  inline Both compare_##name(float16x2 x, float16x2 y) {                                 \
    return {compare_##name<float>(x.low, y.low), compare_##name<float>(x.high, y.high)}; \
  }                                                                                      \
  inline Both compare_##name(bfloat16x2 x, bfloat16x2 y) {                               \
    return {compare_##name<float>(x.low, y.low), compare_##name<float>(x.high, y.high)}; \
  }
KD_COMPARE(eq, x == y)
KD_COMPARE(ne, !nan && x != y)
KD_COMPARE(lt, x < y)
KD_COMPARE(le, x <= y)
KD_COMPARE(gt, x > y)
KD_COMPARE(ge, x >= y)
KD_COMPARE(lo, x < y)
KD_COMPARE(ls, x <= y)
KD_COMPARE(hi, x > y)
KD_COMPARE(hs, x >= y)
KD_COMPARE(equ, nan || x == y)
KD_COMPARE(neu, nan || x != y)
KD_COMPARE(ltu, nan || x < y)
KD_COMPARE(leu, nan || x <= y)
KD_COMPARE(gtu, nan || x > y)
KD_COMPARE(geu, nan || x >= y)
KD_COMPARE(num, !nan)
KD_COMPARE(nan, nan)
#undef KD_COMPARE

// ---- Conversions ----

enum Rounding { kRound_rn, kRound_rz, kRound_rni, kRound_rzi, kRound_rmi, kRound_rpi };

template <Rounding kHow, class T>
T whole(T x) {
  if constexpr (kHow == kRound_rzi) return std::trunc(x);
  if constexpr (kHow == kRound_rmi) return std::floor(x);
  if constexpr (kHow == kRound_rpi) return std::ceil(x);
  return std::nearbyint(x);
}

template <class To, Rounding kHow, class From>
To convert(From x) {
  static_assert(kHow != kRound_rz, "only floats that are made whole are cut off");
  if constexpr (std::is_integral_v<To> && std::is_integral_v<From>) {
    return (To)x;
  } else if constexpr (std::is_integral_v<To>) {  // saturates; of a NaN, 0
    static_assert(kHow != kRound_rn);
    const double rounded = whole<kHow>((double)x), limit = std::ldexp(1.0, 8 * sizeof(To) - 1);
    const double low = std::is_signed_v<To> ? -limit : 0;
    const double end = std::is_signed_v<To> ? limit : 2 * limit;
    if (rounded != rounded) return 0;
    if (rounded < low) return (To)low;
    return rounded >= end ? (To) ~(std::is_signed_v<To> ? (To)low : 0) : (To)rounded;
  } else if constexpr (std::is_same_v<To, float16>) {
    static_assert(!std::is_same_v<From, double>);
    return {(uint16_t)kd::cuda::to_float16((float)x)};
  } else if constexpr (std::is_same_v<To, bfloat16>) {
    static_assert(!std::is_same_v<From, double>);
    return {(uint16_t)kd::cuda::to_bfloat16((float)x)};
  } else if constexpr (kHow != kRound_rn) {
    return (To)whole<kHow>((To)x);
  } else {
    return (To)x;
  }
}

template <class To>
To pack(float low, float high) {
  if constexpr (std::is_same_v<To, float16x2>)
    return bit_cast<To>(kd::cuda::pack_float16x2(low, high));
  else
    return bit_cast<To>(kd::cuda::pack_bfloat16x2(low, high));
}
