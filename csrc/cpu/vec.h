// One SIMD vector of floats, as wide as the instruction set this file is compiled for. GCC and
// Clang vector extensions carry the arithmetic; intrinsics only where they do not reach.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(KD_X86_64)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "../core/base.h"

namespace kd::KD_NAMESPACE {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

#if defined(__FMA__) || defined(__aarch64__)
constexpr bool kFusedMultiplyAdd = true;
#else
constexpr bool kFusedMultiplyAdd = false;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t Mask __attribute__((vector_size(4 * kLanes)));  // a lane is 0 or -1
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Half __attribute__((vector_size(2 * kLanes)));

KD_INLINE Vec load(const float* from) {
  Vec x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

KD_INLINE void store(float* to, Vec x) { std::memcpy(to, &x, sizeof x); }

// Stores past the caches, which reads nothing into them; `to` is aligned to vectors. Whoever
// streams calls fence() once before others read.
KD_INLINE void stream(void* to, Vec x) {
#if defined(__AVX512F__)
  _mm512_stream_ps((float*)to, (__m512)x);
#elif defined(__AVX2__)
  _mm256_stream_ps((float*)to, (__m256)x);
#elif defined(KD_X86_64)
  _mm_stream_ps((float*)to, (__m128)x);
#else
  std::memcpy(to, &x, sizeof x);
#endif
}

// n bytes to any address, past the caches except for parts of a vector at either end.
inline void stream_bytes(char* to, const void* from, int64_t n) {
  constexpr int64_t kStep = sizeof(Vec);
  const char* const bytes = (const char*)from;
  const int64_t head = -(uintptr_t)to % kStep;
  int64_t i = head < n ? head : n;
  std::memcpy(to, bytes, i);
  for (; i + kStep <= n; i += kStep) {
    Vec x;
    std::memcpy(&x, bytes + i, sizeof x);
    stream(to + i, x);
  }
  std::memcpy(to + i, bytes + i, n - i);
}

KD_INLINE void fence() {
#if defined(KD_X86_64)
  _mm_sfence();
#endif
}

// 16-bit lanes to 32-bit ones and back.
KD_INLINE Bits widen(Half x) {
#if defined(__AVX512F__)
  return (Bits)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(__AVX2__)
  return (Bits)_mm256_cvtepu16_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, Bits);
#endif
}

KD_INLINE Half narrow(Bits x) {
#if defined(__AVX512F__)
  return (Half)_mm512_cvtepi32_epi16((__m512i)x);
#else
  return __builtin_convertvector(x, Half);
#endif
}

KD_INLINE Vec select(Mask condition, Vec yes, Vec no) { return condition ? yes : no; }

KD_INLINE Vec abs(Vec x) { return (Vec)((Bits)x & 0x7fffffffu); }

// a b + c, rounded once where kFusedMultiplyAdd. Clang fuses no product that two sums share.
KD_INLINE Vec multiply_add(Vec a, float b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)splat<Vec>(b), (__m512)c);
#elif defined(__FMA__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)splat<Vec>(b), (__m256)c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, splat<Vec>(b));
#else
  return a * b + c;
#endif
}

// Keeps a product from being fused into the sum it is added to, which compilers do unless it is
// stored as well.
KD_INLINE Vec rounded(Vec x) {
#if defined(KD_X86_64)
  asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

// The larger of a and x; x where either is NaN.
KD_INLINE Vec max(Vec a, Vec x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)x);
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)x);
#else
  return select(a > x, a, x);
#endif
}

// Horizontal folds are intrinsics: going through an array makes GCC keep the accumulator of the
// loop before it in memory.

// The sum of the lanes in double: a float would round the last, largest partial sums.
KD_INLINE double sum(Vec x) {
#if defined(__AVX512F__)
  const __m256 low = (__m256)_mm512_castpd512_pd256((__m512d)x);
  const __m256 high = (__m256)_mm512_extractf64x4_pd((__m512d)x, 1);
  const __m512d pairs = _mm512_cvtps_pd(low) + _mm512_cvtps_pd(high);
  const __m256d fours = _mm512_castpd512_pd256(pairs) + _mm512_extractf64x4_pd(pairs, 1);
#elif defined(__AVX2__)
  const __m256d fours = _mm256_cvtps_pd(_mm256_castps256_ps128((__m256)x)) +
                        _mm256_cvtps_pd(_mm256_extractf128_ps((__m256)x, 1));
#else
  const double fours[] = {x[0], x[1], x[2], x[3]};
#endif
  return (fours[0] + fours[1]) + (fours[2] + fours[3]);
}

KD_INLINE bool any_bit(Bits x) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)x, (__m512i)x) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)x, (__m256i)x);
#else
  return ((x[0] | x[1]) | (x[2] | x[3])) != 0;
#endif
}

KD_INLINE bool all(Mask condition) { return !any_bit(~(Bits)condition); }

template <class T>
KD_INLINE T larger(T a, T b) {
  return a > b ? a : b;
}

KD_INLINE float largest(Vec x) {
#if defined(__AVX512F__)
  const __m256 half = larger((__m256)_mm512_castpd512_pd256((__m512d)x),
                             (__m256)_mm512_extractf64x4_pd((__m512d)x, 1));
#elif defined(__AVX2__)
  const __m256 half = (__m256)x;
#endif
#if defined(__AVX2__)
  const __m128 fours = larger(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#else
  const Vec fours = x;
#endif
  return larger(larger(fours[0], fours[1]), larger(fours[2], fours[3]));
}

// A polynomial by Horner's rule, from the highest power down.
template <class... Coefficients>
KD_INLINE Vec horner(Vec x, float first, Coefficients... rest) {
  Vec result = splat<Vec>(first);
  ((result = result * x + rest), ...);
  return result;
}

// 2^x for any x, NaN for NaN; relative error below 1.5e-7.
KD_INLINE Vec exp2(Vec x) {
#if defined(__AVX512DQ__)
  // x - floor(x), and 0 for infinities; scalef multiplies by 2^floor(x).
  const Vec f = (Vec)_mm512_reduce_ps((__m512)x, 1);
  const Vec power = horner(f, 2.17022491e-4f, 1.24396896e-3f, 9.67884064e-3f, 5.54833412e-2f,
                           2.4022983e-1f, 6.93147004e-1f, 1.0f);
  return (Vec)_mm512_scalef_ps((__m512)power, (__m512)x);
#else
  x = max(splat<Vec>(-160.0f), x);  // keeps x - round(x) finite
  x = select(x > 160.0f, splat<Vec>(160.0f), x);
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
  const Vec shifted = x + 12582912.0f;
  const Vec f = x - (shifted - 12582912.0f);
  const Vec power = horner(f, 1.53458081e-4f, 1.33999309e-3f, 9.61848907e-3f, 5.55032864e-2f,
                           2.40226462e-1f, 6.93147182e-1f, 1.0f);
  // Two factors, since 2^-160 and 2^160 are no floats of their own.
  const Mask n = (Mask)shifted - 0x4b400000;
  const Mask half = n >> 1;
  return power * (Vec)((half + 127) << 23) * (Vec)((n - half + 127) << 23);
#endif
}

KD_INLINE Vec exp(Vec x) { return exp2(x * kLog2E); }

#if defined(__AVX512F__)

// With x = 2^n mantissa and mantissa = 1 + j / 32 + ..., a table's reciprocal of the middle of that
// interval, or of its start where j = 0, makes the mantissa 1 + f.
alignas(64) constexpr float kReciprocals[] = {
    1.0f,        0.95522386f, 0.92753625f, 0.90140843f, 0.8767123f,  0.85333335f, 0.83116883f,
    0.8101266f,  0.79012346f, 0.7710843f,  0.7529412f,  0.7356322f,  0.71910113f, 0.7032967f,
    0.68817204f, 0.67368424f, 0.6597938f,  0.64646465f, 0.63366336f, 0.6213592f,  0.60952383f,
    0.5981308f,  0.58715594f, 0.5765766f,  0.5663717f,  0.5565217f,  0.5470086f,  0.53781515f,
    0.5289256f,  0.5203252f,  0.512f,      0.503937f};

struct Octave {
  Vec n, mantissa;
  __m512i j;

  KD_INLINE explicit Octave(Vec x)
      : n((Vec)_mm512_getexp_ps((__m512)x)),
        mantissa((Vec)_mm512_getmant_ps((__m512)x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src)),
        j((__m512i)((Bits)x >> 18)) {}

  KD_INLINE Vec entry(const float (&table)[32]) const {
    return (Vec)_mm512_permutex2var_ps((__m512)load(table), j, (__m512)load(table + 16));
  }
};

#endif

// log2(x) for a normal x > 0, absolute error below 1e-7 beside that of rounding once.
KD_INLINE Vec log2(Vec x) {
#if defined(__AVX512F__)
  alignas(64) static constexpr float kLogs[] = {
      0.0f,        0.06608922f, 0.10852443f, 0.14974715f, 0.18982457f, 0.22881866f, 0.26678655f,
      0.3037807f,  0.33984998f, 0.3750395f,  0.4093909f,  0.4429435f,  0.47573343f, 0.5077946f,
      0.5391588f,  0.5698556f,  0.5999129f,  0.6293566f,  0.6582115f,  0.6865005f,  0.71424544f,
      0.74146706f, 0.76818436f, 0.79441583f, 0.820179f,   0.8454901f,  0.87036467f, 0.8948177f,
      0.9188633f,  0.94251454f, 0.9657842f,  0.9886847f};
  const Octave octave(x);
  const Vec f = octave.mantissa * octave.entry(kReciprocals) - 1.0f;
  return octave.n +
         (f * horner(f, -0.3504458f, 0.48092583f, -0.72135f, 1.442695f) + octave.entry(kLogs));
#else
  // x = mantissa 2^n with the mantissa in [sqrt(1/2), sqrt(2)).
  const Mask n = ((Mask)x - 0x3f3504f3) >> 23;
  const Vec f = (Vec)((Mask)x - (n << 23)) - 1.0f;
  // Minimax polynomial of log2(1 + f) / f on that interval.
  return __builtin_convertvector(n, Vec) + f * horner(f, 0.12555973f, -0.21017416f, 0.21724966f,
                                                      -0.23853607f, 0.2876764f, -0.36072063f,
                                                      0.48092154f, -0.72134715f, 1.4426949f);
#endif
}

// log(1 + x) for x >= 0; relative error below 1.6e-7.
KD_INLINE Vec log1p(Vec x) {
  const Vec w = 1.0f + x;
#if defined(__AVX512F__)
  // Below w = 2, f comes from x, which w has rounded.
  alignas(64) static constexpr float kLogs[] = {
      0.0f,         0.0458095595f, 0.0752234012f, 0.10379681f,  0.131576359f, 0.158605009f,
      0.184922338f, 0.210564747f,  0.235566065f,  0.259957552f, 0.283768147f, 0.307025045f,
      0.32975328f,  0.351976395f,  0.373716414f,  0.394993752f, 0.41582793f,  0.436236769f,
      0.456237435f, 0.475845903f,  0.495077223f,  0.513945758f, 0.532464862f, 0.55064708f,
      0.568504751f, 0.58604908f,   0.603290796f,  0.620240331f, 0.636907518f, 0.653301299f,
      0.669430614f, 0.685303986f};
  const Octave octave(w);
  const Vec reciprocal = octave.entry(kReciprocals);
  const Vec f =
      select(w < 2.0f, x * reciprocal + (reciprocal - 1.0f), octave.mantissa * reciprocal - 1.0f);
  return (octave.n * 6.93147181e-1f + octave.entry(kLogs)) +
         (f * f * horner(f, -2.43980423e-1f, 3.33366334e-1f, -5.00001192e-1f) + f);
#else
  const Vec lost = x - (w - 1.0f);  // what rounding took from w
  // w = mantissa 2^n with the mantissa in [sqrt(1/2), sqrt(2)).
  const Mask n = ((Mask)w - 0x3f3504f3) >> 23;
  const Vec mantissa = (Vec)((Mask)w - (n << 23));
  const Vec f = (mantissa - 1.0f) + lost * (Vec)((127 - n) << 23);
  // Minimax polynomial of (log(1 + f) - f + f^2 / 2) / f^3 on that interval.
  const Vec polynomial = horner(f, 8.70035961e-2f, -1.42674759e-1f, 1.49147868e-1f, -1.65775865e-1f,
                                1.99630618e-1f, -2.50013381e-1f, 3.33339095e-1f);
  const Vec exponent = __builtin_convertvector(n, Vec);
  return exponent * 6.93147181e-1f + (f + f * f * (polynomial * f - 0.5f));
#endif
}

}  // namespace kd::KD_NAMESPACE
