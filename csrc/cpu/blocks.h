// Rows between typed memory and float vectors: dtypes, scale and softcap, block by block in the
// first-level cache.
#pragma once

#include "vec.h"

#include "../core/math.h"
#include "../core/params.h"

namespace kd::KD_NAMESPACE {

constexpr int kBlock = 2048;  // three float blocks fit a 32 KiB first-level cache
constexpr float kInfinity = __builtin_inff();

KD_INLINE Half load_half(const uint16_t* from) {
  Half x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

KD_INLINE Vec from_bfloat16(Half x) { return (Vec)(widen(x) << 16); }

// To nearest, ties to even, in the high half of each lane; the low half is of no meaning.
KD_INLINE Bits rounded_to_bfloat16(Vec x) {
  const Bits bits = (Bits)x;
  return x == x ? bits + 0x7fffu + ((bits >> 16) & 1u) : 0x7fc00000u + Bits{};
}

KD_INLINE Half to_bfloat16(Vec x) {
#if defined(__AVX512BF16__)
  return (Half)_mm512_cvtneps_pbh((__m512)x);
#else
  return narrow(rounded_to_bfloat16(x) >> 16);
#endif
}

KD_INLINE Vec from_float16(Half x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps((__m256i)x);
#elif defined(__F16C__)
  return (Vec)_mm256_cvtph_ps((__m128i)x);
#elif defined(__aarch64__)
  return vcvt_f32_f16((float16x4_t)x);
#else
  const Bits bits = widen(x);
  const Bits magnitude = bits & 0x7fffu;
  // The exponent's bias differs by 112; multiplying serves normal and subnormal values alike.
  const Vec finite = (Vec)(magnitude << 13) * 0x1p112f;
  const Bits special = magnitude << 13 | 0x7f800000u;  // inf and NaN
  const Bits value = magnitude >= 0x7c00u ? special : (Bits)finite;
  return (Vec)(value | (bits & 0x8000u) << 16);
#endif
}

// To nearest, ties to even.
KD_INLINE Half to_float16(Vec x) {
#if defined(__AVX512F__)
  return (Half)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  return (Half)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
  return (Half)vcvt_f16_f32(x);
#else
  const Vec magnitude = abs(x);
  const Bits bits = (Bits)magnitude;
  const Bits normal = (bits + 0xfffu + ((bits >> 13) & 1u) - 0x38000000u) >> 13;
  // The spacing of floats in [1/2, 1) is that of subnormal halves.
  const Bits subnormal = (Bits)(magnitude + 0.5f) - 0x3f000000u;
  Bits half = bits < 0x38800000u ? subnormal : normal;
  half = magnitude >= 65520.0f ? 0x7c00u + Bits{} : half;
  half = x == x ? half : 0x7e00u + Bits{};
  return narrow(half | ((Bits)x >> 16 & 0x8000u));
#endif
}

template <DType dtype>
KD_INLINE Vec load_as_float(const char* from, int index) {
  if constexpr (dtype == DType::kFloat32) return load((const float*)from + index);
  const Half x = load_half((const uint16_t*)from + index);
  return dtype == DType::kBFloat16 ? from_bfloat16(x) : from_float16(x);
}

template <DType dtype>
KD_INLINE void store_from_float(char* to, int index, Vec x) {
  if constexpr (dtype == DType::kFloat32) {
    store((float*)to + index, x);
  } else {
    const Half half = dtype == DType::kBFloat16 ? to_bfloat16(x) : to_float16(x);
    std::memcpy((uint16_t*)to + index, &half, sizeof half);
  }
}

// The first `count` lanes, fewer than all; the others are -inf. Not through memory where there are
// masks: loading a vector waits for stores of its parts, which shows in short rows.
template <DType dtype>
KD_INLINE Vec load_some(const char* from, int index, int count) {
  from += index * item_size(dtype);
#if defined(__AVX512F__)
  const auto lanes = (__mmask16)((1u << count) - 1);
  Vec x;
  if constexpr (dtype == DType::kFloat32) {
    x = (Vec)_mm512_maskz_loadu_ps(lanes, from);
  } else {
    const Half half = (Half)_mm256_maskz_loadu_epi16(lanes, from);
    x = dtype == DType::kBFloat16 ? from_bfloat16(half) : from_float16(half);
  }
#else
  char some[kLanes * sizeof(float)] = {};
  std::memcpy(some, from, count * item_size(dtype));
  const Vec x = load_as_float<dtype>(some, 0);
#endif
  constexpr float ordinals[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return select(load(ordinals) < (float)count, x, splat<Vec>(-kInfinity));
}

template <DType dtype>
KD_INLINE void store_some(char* to, int index, Vec x, int count) {
  to += index * item_size(dtype);
#if defined(__AVX512F__)
  const auto lanes = (__mmask16)((1u << count) - 1);
  if constexpr (dtype == DType::kFloat32) return _mm512_mask_storeu_ps(to, lanes, (__m512)x);
  const Half half = dtype == DType::kBFloat16 ? to_bfloat16(x) : to_float16(x);
  _mm256_mask_storeu_epi16(to, lanes, (__m256i)half);
#else
  char some[kLanes * sizeof(float)];
  store_from_float<dtype>(some, 0, x);
  std::memcpy(to, some, count * item_size(dtype));
#endif
}

// The values of 2 kLanes columns: one half and the other, or for bfloat16 even and odd ones, which
// takes no shuffle. Kernels go through a row in pairs and do not depend on the order.
struct Pair {
  Vec first, second;
};

constexpr int kPair = 2 * kLanes;

// Values of a row as float vectors, loaded straight from its memory and stored there, past the
// caches where it streams.
template <DType dtype>
struct View;

template <>
struct View<DType::kFloat32> {
  float* data;
  bool streams = false;

  KD_INLINE Pair pair(int index) const { return {load(data + index), load(data + index + kLanes)}; }

  KD_INLINE void store(int index, Pair x) const {
    if (streams) {
      stream(data + index, x.first);
      stream(data + index + kLanes, x.second);
    } else {
      KD_NAMESPACE::store(data + index, x.first);
      KD_NAMESPACE::store(data + index + kLanes, x.second);
    }
  }
};

template <>
struct View<DType::kBFloat16> {
  uint16_t* data;
  bool streams = false;

  KD_INLINE Pair pair(int index) const {
    Bits both;
    std::memcpy(&both, data + index, sizeof both);
    return {(Vec)(both << 16), (Vec)(both & 0xffff0000u)};
  }

  KD_INLINE void store(int index, Pair x) const {
#if defined(__AVX512BF16__)
    constexpr auto alternate = [] {
      Bits lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
      return (__m512i)(lanes | (lanes + 16) << 16);
    };
    const auto halves = _mm512_cvtne2ps_pbh((__m512)x.second, (__m512)x.first);
    const auto both = _mm512_permutexvar_epi16(alternate(), (__m512i)halves);
#else
    const Bits both =
        rounded_to_bfloat16(x.first) >> 16 | (rounded_to_bfloat16(x.second) & 0xffff0000u);
#endif
    if (streams)
      stream(data + index, (Vec)both);
    else
      std::memcpy(data + index, &both, sizeof both);
  }
};

// Widens n values into `to`, padded with -inf to whole pairs of vectors: -inf in both models is a
// term of 0 in every divergence.
template <DType dtype>
void read_block(const char* from, int n, float* to) {
  const int whole = n / kLanes * kLanes;
  for (int i = 0; i < whole; i += kLanes) store(to + i, load_as_float<dtype>(from, i));
  if (n % kPair == 0) return;
  store(to + whole, load_some<dtype>(from, whole, n - whole));
  if (n % kPair < kLanes) store(to + whole + kLanes, splat<Vec>(-kInfinity));
}

template <DType dtype>
void write_block(const float* from, int n, char* to) {
  const int whole = n / kLanes * kLanes;
  for (int i = 0; i < whole; i += kLanes) store_from_float<dtype>(to, i, load(from + i));
  if (whole == n) return;
  store_some<dtype>(to, whole, load(from + whole), n - whole);
}

// tanh to full relative accuracy.
KD_INLINE Vec tanh(Vec x) {
  const Vec e = exponential(-2.0f * abs(x)).expm1;
  const Vec magnitude = -e / (2.0f + e);
  return (Vec)((Bits)magnitude | ((Bits)x & 0x80000000u));
}

// Logits that will be read soon.
struct Upcoming {
  const char* data;
  int64_t item_size;

  Upcoming(const Rows& rows, int64_t row)
      : data(rows.row(row)), item_size(kd::item_size(rows.dtype)) {}

  // Brings logits [begin, begin + n) into the cache of that level, 16 at a time: a line of floats,
  // and of 16-bit logits each line twice, which costs less than a loop over their lines.
  template <int kLevel>
  KD_INLINE void fetch(int64_t begin, int n) const {
    const char* const from = data + begin * item_size;
    for (int i = 0; i < n; i += 16) __builtin_prefetch(from + i * item_size, 0, 4 - kLevel);
  }
};

// One row of logits as blocks of floats.
class Reader {
 public:
  Reader(const Rows& rows, int64_t row, const Transform& transform)
      : data_(rows.row(row)), dtype_(rows.dtype), transform_(transform) {}

  // Logits [begin, begin + n) as stored, padded with -inf to whole pairs of vectors; either in
  // `buffer` or in place.
  const float* raw(int64_t begin, int n, float* buffer) const {
    const char* from = data_ + begin * item_size(dtype_);
    switch (dtype_) {
      case DType::kFloat32:
        if (n % kPair == 0) return (const float*)from;
        read_block<DType::kFloat32>(from, n, buffer);
        break;
      case DType::kBFloat16:
        read_block<DType::kBFloat16>(from, n, buffer);
        break;
      case DType::kFloat16:
        read_block<DType::kFloat16>(from, n, buffer);
        break;
    }
    return buffer;
  }

  // The same after scale and softcap.
  const float* block(int64_t begin, int n, float* buffer) const {
    const float* from = raw(begin, n, buffer);
    const float scale = transform_.scale, cap = transform_.softcap;
    if (cap > 0) {
      for (int i = 0; i < n; i += kLanes) {
        const Vec x = load(from + i);
        store(buffer + i, select(x == -kInfinity, x, cap * tanh(x * (scale / cap))));
      }
      return buffer;
    }
    if (scale != 1) {
      for (int i = 0; i < n; i += kLanes) store(buffer + i, load(from + i) * scale);
      return buffer;
    }
    return from;
  }

  // Whether the logits are bfloat16 that need no more than widening.
  bool is_plain_bfloat16() const {
    return dtype_ == DType::kBFloat16 && transform_.scale == 1 && transform_.softcap == 0;
  }

  View<DType::kBFloat16> plain(int64_t begin) const {
    return {(uint16_t*)const_cast<char*>(data_) + begin};
  }

  float at(int64_t index) const {
    float buffer[kPair];
    return block(index, 1, buffer)[0];
  }

  // gradient *= d transformed / d raw, for a softcap: scale / cosh(scale x / cap)^2. Without one
  // the factor is `scale`, which the caller folds into its weight.
  void chain_softcap(int64_t begin, int n, float* buffer, float* gradient) const {
    const float* from = raw(begin, n, buffer);
    const float ratio = transform_.scale / transform_.softcap;
    for (int i = 0; i < n; i += kLanes) {
      const Vec e = exp(-2.0f * abs(load(from + i) * ratio));
      const Vec derivative = (4.0f * transform_.scale) * e / ((1.0f + e) * (1.0f + e));
      store(gradient + i, times_or_zero(derivative, load(gradient + i)));
    }
  }

  bool has_softcap() const { return transform_.softcap > 0; }

 private:
  const char* data_;
  DType dtype_;
  Transform transform_;
};

// One row of the gradient, written as blocks of floats. One that streams, but is not aligned to
// vectors, is computed in a buffer, block by block, and copied past the caches.
class Writer {
 public:
  Writer(const Rows& rows, int64_t row, bool streams = false)
      : data_(rows.row(row)),
        dtype_(rows.dtype),
        width_(rows.width),
        streams_(streams),
        copies_(streams && (uintptr_t)data_ % sizeof(Vec) != 0) {}

  // Where a float32 block of n can be written without passing through a buffer, else null.
  float* direct(int64_t begin, int n) const {
    const bool is_direct = dtype_ == DType::kFloat32 && n % kPair == 0 && !copies_;
    return is_direct ? (float*)data_ + begin : nullptr;
  }

  // A block of bfloat16, or the buffer that flush() copies to it.
  View<DType::kBFloat16> plain(int64_t begin, float* buffer) const {
    if (copies_) return {(uint16_t*)buffer};
    return {(uint16_t*)data_ + begin, streams_};
  }

  void flush(int64_t begin, int n, const float* buffer) const {
    if (copies_) stream_bytes(data_ + begin * 2, buffer, n * 2);
  }

  void write(int64_t begin, int n, const float* from) const {
    char* to = data_ + begin * item_size(dtype_);
    if (!streams_) return convert(from, n, to);
    if (dtype_ == DType::kFloat32) return stream_bytes(to, from, n * sizeof(float));
    alignas(64) char converted[kBlock * sizeof(uint16_t)];
    convert(from, n, converted);
    stream_bytes(to, converted, n * sizeof(uint16_t));
  }

  // values[i] goes to columns[i].
  void scatter(const int64_t* columns, const float* values, int64_t n) const {
    constexpr int kMost = 64;
    const int64_t size = item_size(dtype_);
    float some[kMost + kLanes];  // read by whole vectors
    char stored[kMost * sizeof(float)];
    const Writer staged(Rows{stored, dtype_, kMost}, 0);
    for (; n > 0; n -= kMost, columns += kMost, values += kMost) {
      const int count = n < kMost ? (int)n : kMost;
      std::memcpy(some, values, count * sizeof(float));
      for (int i = count; i % kLanes != 0; ++i) some[i] = 0;
      staged.write(0, count, some);
      for (int i = 0; i < count; ++i) {
        if (size == 4)
          std::memcpy(data_ + columns[i] * 4, stored + i * 4, 4);
        else
          std::memcpy(data_ + columns[i] * 2, stored + i * 2, 2);
      }
    }
  }

  // Columns [begin, end) become `value`, in blocks.
  void fill(int64_t begin, int64_t end, float value) const {
    alignas(64) float block[256];
    for (int i = 0; i < 256; i += kLanes) store(block + i, splat<Vec>(value));
    for (; begin < end; begin += 256)
      write(begin, end - begin < 256 ? (int)(end - begin) : 256, block);
  }

  int64_t width() const { return width_; }
  bool streams() const { return streams_; }

 private:
  void convert(const float* from, int n, char* to) const {
    switch (dtype_) {
      case DType::kFloat32:
        return write_block<DType::kFloat32>(from, n, to);
      case DType::kBFloat16:
        return write_block<DType::kBFloat16>(from, n, to);
      case DType::kFloat16:
        return write_block<DType::kFloat16>(from, n, to);
    }
  }

  char* data_;
  DType dtype_;
  int64_t width_;
  bool streams_;
  bool copies_;
};

}  // namespace kd::KD_NAMESPACE
