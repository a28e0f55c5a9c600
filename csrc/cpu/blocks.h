// Blocks of a row between typed memory and float arrays in the first-level cache. This is the only
// place of the CPU backend that knows dtypes, scale and softcap; the maths sees floats.
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

KD_INLINE Half to_bfloat16(Vec x) {
#if defined(__AVX512BF16__)
  return (Half)_mm512_cvtneps_pbh((__m512)x);
#else
  const Bits bits = (Bits)x;
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  return narrow(x == x ? rounded : 0x7fc0u + Bits{});
#endif
}

KD_INLINE Vec from_float16(Half x) {
  const Bits bits = widen(x);
  const Bits magnitude = bits & 0x7fffu;
  // The exponent's bias differs by 112; multiplying serves normal and subnormal values alike.
  const Vec finite = (Vec)(magnitude << 13) * 0x1p112f;
  const Bits special = magnitude << 13 | 0x7f800000u;  // inf and NaN
  const Bits value = magnitude >= 0x7c00u ? special : (Bits)finite;
  return (Vec)(value | (bits & 0x8000u) << 16);
}

// To nearest, ties to even.
KD_INLINE Half to_float16(Vec x) {
  const Vec magnitude = abs(x);
  const Bits bits = (Bits)magnitude;
  const Bits normal = (bits + 0xfffu + ((bits >> 13) & 1u) - 0x38000000u) >> 13;
  // The spacing of floats in [1/2, 1) is that of subnormal halves.
  const Bits subnormal = (Bits)(magnitude + 0.5f) - 0x3f000000u;
  Bits half = bits < 0x38800000u ? subnormal : normal;
  half = magnitude >= 65520.0f ? 0x7c00u + Bits{} : half;
  half = x == x ? half : 0x7e00u + Bits{};
  return narrow(half | ((Bits)x >> 16 & 0x8000u));
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

// Two vectors that lie side by side: kernels go through a row in pairs.
struct Pair {
  Vec first, second;
};

constexpr int kPair = 2 * kLanes;

// Values of a row as vectors of floats, straight from memory and to it.
template <DType dtype>
struct View {
  char* data;

  KD_INLINE Vec operator()(int index) const { return load_as_float<dtype>(data, index); }

  KD_INLINE Pair pair(int index) const {
#if defined(__AVX512BW__)
    if constexpr (dtype == DType::kBFloat16) {
      // One shuffle a vector puts 16 bits into the high halves of zeroed lanes.
      constexpr auto high_halves = [](uint32_t first) {
        Bits which = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        return (__m512i)((which + first) << 16);
      };
      const __m512i x = _mm512_loadu_si512((const uint16_t*)data + index);
      return {(Vec)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, high_halves(0), x),
              (Vec)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, high_halves(16), x)};
    }
#endif
    return {(*this)(index), (*this)(index + kLanes)};
  }

  KD_INLINE void store(int index, Pair x) const {
#if defined(__AVX512BF16__)
    if constexpr (dtype == DType::kBFloat16) {
      const auto both = _mm512_cvtne2ps_pbh((__m512)x.second, (__m512)x.first);
      std::memcpy((uint16_t*)data + index, &both, sizeof both);
      return;
    }
#endif
    store_from_float<dtype>(data, index, x.first);
    store_from_float<dtype>(data, index + kLanes, x.second);
  }
};

// Widens n values into `to`, padded with -inf to whole pairs of vectors: -inf in both models is a
// term of 0 in every divergence.
template <DType dtype>
void read_block(const char* from, int n, float* to) {
  const int whole = n / kLanes * kLanes;
  for (int i = 0; i < whole; i += kLanes) store(to + i, load_as_float<dtype>(from, i));
  if (n % kPair == 0) return;
  char tail[kLanes * sizeof(float)] = {};
  std::memcpy(tail, from + whole * item_size(dtype), (n - whole) * item_size(dtype));
  store(to + whole, load_as_float<dtype>(tail, 0));
  for (int i = n; i % kPair != 0; ++i) to[i] = -kInfinity;
}

template <DType dtype>
void write_block(const float* from, int n, char* to) {
  const int whole = n / kLanes * kLanes;
  for (int i = 0; i < whole; i += kLanes) store_from_float<dtype>(to, i, load(from + i));
  if (whole == n) return;
  char tail[kLanes * sizeof(float)];
  store_from_float<dtype>(tail, 0, load(from + whole));
  std::memcpy(to + whole * item_size(dtype), tail, (n - whole) * item_size(dtype));
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
  int item_size;

  Upcoming(const Rows& rows, int64_t row)
      : data(rows.row(row)), item_size((int)kd::item_size(rows.dtype)) {}

  // Brings logits [begin, begin + n) into the cache of that level.
  template <int kLevel>
  KD_INLINE void fetch(int64_t begin, int n) const {
    for (int byte = 0; byte < n * item_size; byte += 64)
      __builtin_prefetch(data + begin * item_size + byte, 0, 4 - kLevel);
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

  // Whether logits [begin, begin + n) need no more than widening.
  bool is_plain(DType dtype, int n) const {
    return dtype_ == dtype && transform_.scale == 1 && transform_.softcap == 0 && n % kPair == 0;
  }

  template <DType dtype>
  View<dtype> plain(int64_t begin) const {
    return {const_cast<char*>(data_) + begin * item_size(dtype)};
  }

  // Calls use(view) with a View of the transformed logits [begin, begin + n), padded with -inf;
  // skips the buffer where there is nothing to do on the way.
  template <class Use>
  void view(int64_t begin, int n, float* buffer, Use use) const {
    if (is_plain(DType::kBFloat16, n)) return use(plain<DType::kBFloat16>(begin));
    use(View<DType::kFloat32>{(char*)block(begin, n, buffer)});
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

// One row of the gradient, written as blocks of floats.
class Writer {
 public:
  Writer(const Rows& rows, int64_t row)
      : data_(rows.row(row)), dtype_(rows.dtype), width_(rows.width) {}

  // Where a float32 block of n can be written without passing through a buffer, else null.
  float* direct(int64_t begin, int n) const {
    return dtype_ == DType::kFloat32 && n % kPair == 0 ? (float*)data_ + begin : nullptr;
  }

  template <DType dtype>
  View<dtype> plain(int64_t begin) const {
    return {data_ + begin * item_size(dtype)};
  }

  void write(int64_t begin, int n, const float* from) const {
    char* to = data_ + begin * item_size(dtype_);
    switch (dtype_) {
      case DType::kFloat32:
        return write_block<DType::kFloat32>(from, n, to);
      case DType::kBFloat16:
        return write_block<DType::kBFloat16>(from, n, to);
      case DType::kFloat16:
        return write_block<DType::kFloat16>(from, n, to);
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

 private:
  char* data_;
  DType dtype_;
  int64_t width_;
};

}  // namespace kd::KD_NAMESPACE
