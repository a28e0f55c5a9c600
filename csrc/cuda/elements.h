// Floats in a thread: the maths primitives of csrc/core for the device, and dtypes, scale and
// softcap where a block of a row is loaded or stored.
#pragma once

#ifndef KD_NAMESPACE
#define KD_NAMESPACE cuda
#endif
#define KD_OWN_MATH

#include <cfloat>
#include <cmath>
#include <cstring>

#include "ptx.h"

#include "../core/params.h"

namespace kd::cuda {

KD_INLINE float exp(float x) {
#if defined(__CUDA_ARCH__) || defined(KD_EMULATE)
  return exp2_approx(x * kLog2E);
#else
  return expf(x);  // nvcc compiles csrc/core for the host too, where nothing calls it
#endif
}

KD_INLINE float exp2(float x) {
#if defined(__CUDA_ARCH__) || defined(KD_EMULATE)
  return exp2_approx(x);
#else
  return exp2f(x);
#endif
}

KD_INLINE float log2(float x) {
#if defined(__CUDA_ARCH__) || defined(KD_EMULATE)
  return log2_approx(x);
#else
  return log2f(x);
#endif
}

// log(1 + x) for x >= 0, all that the divergences ask for, relative error below 6e-7.
KD_INLINE float log1p(float x) {
#if defined(__CUDA_ARCH__) || defined(KD_EMULATE)
  // Near-minimax polynomial of log(1 + x) / x on [0, 0.45].
  float series = 4.31090444e-2f * x - 1.19477667e-1f;
  series = series * x + 1.87308103e-1f;
  series = series * x - 2.48140410e-1f;
  series = series * x + 3.33199441e-1f;
  series = series * x - 4.99996305e-1f;
  series = series * x + 1.0f;
  return x < 0.45f ? series * x : (float)kNatsPerBit * log2_approx(1.0f + x);
#else
  return log1pf(x);
#endif
}

KD_INLINE float step(float x, float y) {
#if defined(__CUDA_ARCH__) || defined(KD_EMULATE)
  constexpr float kSteep = 0x1p60f;
  return fma_saturated(x, kSteep, fmaf(y, kSteep, 0.5f));
#else
  return x > -y ? 1.0f : x < -y ? 0.0f : 0.5f;
#endif
}

KD_INLINE float quotient(float x, float y) {
#if defined(__CUDA_ARCH__) || defined(KD_EMULATE)
  return x * reciprocal_approx(y);
#else
  return x / y;
#endif
}

}  // namespace kd::cuda

#include "../core/math.h"

namespace kd::cuda {

// Four or eight bytes of one type as another.
template <class To, class From>
KD_DEVICE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// Hides x, the same in every lane, from the compiler: a sweep that depends on it computes its terms
// again, rather than that a row's worth of them is kept in registers.
template <class T>
KD_DEVICE T opaque(T x) {
  return __shfl_sync(~0u, x, 0);
}

// A copy of what shared memory holds, hidden from the compiler likewise.
template <class T>
KD_DEVICE T read_anew(const T& shared) {
  constexpr int kWords = sizeof(T) / 4;
  static_assert(sizeof(T) == 4 * kWords);
  uint32_t words[kWords];
#pragma unroll
  for (int i = 0; i < kWords; ++i)
    words[i] = reinterpret_cast<const volatile uint32_t*>(&shared)[i];
  T copy;
  memcpy(&copy, words, sizeof copy);
  return copy;
}

// 1 / x, relative error below 2^-44: a division of doubles is a chain of twice as many operations.
KD_DEVICE double inverse(double x) {
  const double y = 1.0f / (float)x;
  return y + y * (1 - x * y);
}

// With one rounding to float.
KD_DEVICE float reciprocal(double x) { return (float)inverse(x); }

// log(x / y) of positive numbers, to full accuracy where they are close.
KD_DEVICE float log_ratio(double x, double y) {
  const float difference = (float)(x - y);
  return x > y ? log1pf(difference / (float)y) : -log1pf(-difference / (float)x);
}

// log2 of a positive number; off by some 2^-24 however large that is.
KD_DEVICE double log2_of(double x) {
  const uint32_t exponent = bits_as<uint32_t>((float)x * 1.41421356f) >> 23;
  const float unit = bits_as<float>((254u - exponent) << 23);  // x unit is about 1
  return ((int)exponent - 127) + kBitsPerNat * log_ratio(x * unit, 1);
}

// tanh to full relative accuracy.
KD_DEVICE float tanh(float x) {
  const float e = exponential(-2.0f * abs(x)).expm1;
  return copysignf(-e / (2.0f + e), x);
}

// A few floats, combined in pairs: a power of two of them.
template <int n, class Combine>
KD_DEVICE float fold(const float (&x)[n], Combine combine) {
  float pairs[n];
#pragma unroll
  for (int i = 0; i < n; ++i) pairs[i] = x[i];
#pragma unroll
  for (int width = n / 2; width > 0; width /= 2)
#pragma unroll
    for (int i = 0; i < width; ++i) pairs[i] = combine(pairs[i], pairs[i + width]);
  return pairs[0];
}

template <int n>
KD_DEVICE float sum_of(const float (&x)[n]) {
  return fold(x, [](float a, float b) { return a + b; });
}

// NaN is lost.
template <int n>
KD_DEVICE float max_of(const float (&x)[n]) {
  return fold(x, [](float a, float b) { return fmaxf(a, b); });
}

// A sum of many floats; what rounding takes from it is summed apart.
struct Sum {
  float total = 0, lost = 0;

  KD_DEVICE void add(float term) {
    const float sum = total + term;
    lost += term - (sum - total);
    total = sum;
  }

  KD_DEVICE void scale(float factor) { total *= factor, lost *= factor; }

  // Infinities have nothing to lose.
  KD_DEVICE double value() const {
    return abs(total) <= FLT_MAX ? (double)total + (double)lost : (double)total;
  }
};

// A sum of so few that rounding takes next to nothing.
struct ShortSum {
  float total = 0;

  KD_DEVICE void add(float term) { total += term; }
  KD_DEVICE void scale(float factor) { total *= factor; }
  KD_DEVICE double value() const { return total; }
};

// The largest of logits that come in 16 bytes each; NaN is lost. 16-bit ones are compared in pairs.
template <int kItem>
struct LargestOf {
  uint32_t largest;
  bool bfloat16;

  KD_DEVICE explicit LargestOf(bool bfloat16)
      : largest(bfloat16 ? 0xff80ff80u : 0xfc00fc00u), bfloat16(bfloat16) {}  // -inf

  KD_DEVICE uint32_t larger(uint32_t x, uint32_t y) const {
    return bfloat16 ? max_bfloat16x2(x, y) : max_float16x2(x, y);
  }
  KD_DEVICE void push(const uint4& x) {
    largest = larger(larger(larger(x.x, x.y), larger(x.z, x.w)), largest);
  }
  KD_DEVICE float value() const {
    const float2 pair = bfloat16 ? unpack_bfloat16x2(largest) : unpack_float16x2(largest);
    return fmaxf(pair.x, pair.y);
  }
};

template <>
struct LargestOf<4> {
  float largest = -INFINITY;

  KD_DEVICE explicit LargestOf(bool) {}
  KD_DEVICE void push(const uint4& x) {
    const float floats[] = {bits_as<float>(x.x), bits_as<float>(x.y), bits_as<float>(x.z),
                            bits_as<float>(x.w)};
    largest = fmaxf(largest, max_of(floats));
  }
  KD_DEVICE float value() const { return largest; }
};

// 16 bytes as 4 or 8 logits, and back.

template <int kItem>
constexpr int kLanes = 16 / kItem;

KD_INLINE constexpr int log2_lanes(DType dtype) { return dtype == DType::kFloat32 ? 2 : 3; }

template <int kItem>
KD_DEVICE void unpack(const uint4& packed, bool bfloat16, float (&x)[kLanes<kItem>]) {
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
  if constexpr (kItem == 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = bits_as<float>(words[i]);
  } else if (bfloat16) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack_bfloat16x2(words[i]);
      x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack_float16x2(words[i]);
      x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
    }
  }
}

template <int kItem>
KD_DEVICE uint4 pack(const float (&x)[kLanes<kItem>], bool bfloat16) {
  uint32_t words[4];
  if constexpr (kItem == 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = bits_as<uint32_t>(x[i]);
  } else if (bfloat16) {
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = pack_bfloat16x2(x[2 * i], x[2 * i + 1]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = pack_float16x2(x[2 * i], x[2 * i + 1]);
  }
  return {words[0], words[1], words[2], words[3]};
}

// Rows::row for at most kMaxRows rows, in bytes. The host divides, so that a kernel multiplies
// only: the address of its row is what every load waits for.
struct RowPlaces {
  char* data = nullptr;
  int64_t stride = 0;  // between rows
  int64_t jump = 0;    // more, after each inner_size rows
  uint64_t share = 0;  // 2^64 / inner_size, rounded up; 0: no jumps

  RowPlaces() = default;
  explicit RowPlaces(const Rows& rows) : data(rows.data) {
    if (!data) return;
    const int64_t bytes = item_size(rows.dtype);
    stride = bytes * (rows.inner_size == 1 ? rows.outer_stride : rows.inner_stride);
    jump = bytes * rows.outer_stride - stride * rows.inner_size;
    if (jump != 0) share = ~(uint64_t)0 / rows.inner_size + 1;
  }

  // Whether all lie alike, modulo 16 bytes.
  bool alike() const { return stride % 16 == 0 && jump % 16 == 0; }

  // Exact, as both are below 2^32: what rounding adds to the quotient is less than 2^-32.
  KD_DEVICE char* operator[](uint32_t row) const {
    return data + row * stride + (uint32_t)__umul64hi(share, row) * jump;
  }
};

// One element of a row.

KD_DEVICE float load_1(const char* row, int64_t index, DType dtype) {
  if (dtype == DType::kFloat32) return ((const float*)row)[index];
  const uint32_t bits = ((const uint16_t*)row)[index];
  return dtype == DType::kBFloat16 ? unpack_bfloat16x2(bits).x : unpack_float16x2(bits).x;
}

KD_DEVICE void store_1(char* row, int64_t index, DType dtype, float x) {
  if (dtype == DType::kFloat32)
    ((float*)row)[index] = x;
  else
    ((uint16_t*)row)[index] =
        (uint16_t)(dtype == DType::kBFloat16 ? pack_bfloat16x2(x, 0) : pack_float16x2(x, 0));
}

// Scale and softcap; -inf stays -inf.
template <int n>
KD_DEVICE void apply(const Transform& transform, float (&x)[n]) {
  const float scale = transform.scale, cap = transform.softcap;
  if (cap > 0) {
    const float ratio = scale / cap;
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] = x[i] == -INFINITY ? x[i] : cap * tanh(x[i] * ratio);
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] *= scale;
  }
}

// gradient *= d transformed / d raw, for a softcap: scale / cosh(scale x / cap)^2. Without one the
// factor is `scale`, which the caller folds into its weight.
template <int n>
KD_DEVICE void chain_softcap(const Transform& transform, const float (&raw)[n],
                             float (&gradient)[n]) {
  const float ratio = transform.scale / transform.softcap;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const float e = exp(-2.0f * abs(raw[i] * ratio));
    const float derivative = (4.0f * transform.scale) * e / ((1.0f + e) * (1.0f + e));
    gradient[i] = times_or_zero(derivative, gradient[i]);
  }
}

}  // namespace kd::cuda
