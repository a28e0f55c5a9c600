// The softmax of a row, block by block: its state, exponentials, entropy and top token.
#pragma once

#include <cmath>

#include "blocks.h"

#include "../core/divergences.h"
#include "../core/softmax_state.h"
#include "exponent.h"

namespace kd::KD_NAMESPACE {

// The first reference of a row is the largest of so many logits. A later one far above it is rare:
// then the row starts again, from the largest of all.
KD_INLINE int64_t sample_of(int64_t vocab) { return vocab < 512 ? vocab : 512; }

template <class Step>
KD_INLINE void for_blocks(int64_t vocab, Step step) {
  for (int64_t begin = 0; begin < vocab; begin += kBlock)
    step(begin, vocab - begin < kBlock ? (int)(vocab - begin) : kBlock);
}

// Float sums of a block are added up in parts, for rounding grows with their number of terms where
// those are alike, as of tokens that neither model tells apart.
KD_INLINE int end_of_part(int begin, int n) {
  constexpr int kPart = 8 * kPair;
  return begin + kPart < n ? begin + kPart : n;
}

// The largest of n logits, padded with -inf to whole pairs of vectors; NaN may be lost.
inline float block_max(const float* x, int n) {
  Vec even = splat<Vec>(-kInfinity), odd = even;
  for (int i = 0; i < n; i += kPair) {
    even = max(even, load(x + i));
    odd = max(odd, load(x + i + kLanes));
  }
  return largest(max(even, odd));
}

// A float sum that keeps what rounding takes from it: the ratio of two softmax sums enters every
// log q - log p, where it must not drown close logits.
struct CompensatedSum {
  Vec total = {}, lost = {};

  KD_INLINE void add(Vec term) {
    const Vec sum = total + term;
    lost += term - (sum - total);
    total = sum;
  }

  double value() const { return sum(total) + sum(lost); }
};

// The softmax of a row relative to `reference`, a logit near its largest.
class Softmax {
 public:
  Softmax() : Softmax(kLowestLogit, 1) {}

  // c = log2(e) / T.
  Softmax(float reference, float c)
      : reference_(larger(reference, kLowestLogit)), c_(c), exponent_(reference_, c) {}

  // Adds n logits, padded with -inf to whole pairs of vectors, and keeps their exponentials.
  // Fetches what comes next meanwhile. False where one is so far above the reference that its
  // exponential would lose digits: the row has to start again from its largest logit.
  template <class Source>
  bool push(Source x, int n, float* kept, Upcoming row, int64_t next) {
    const Exponent exponent = exponent_;
    CompensatedSum sums;
    int i = 0;
    if (exponent.is_fast()) {
      Exponent::Range range;
      for (; i + 2 * kPair <= n; i += 2 * kPair) {
        Vec terms[4];
        for (int k = 0; k < 4; k += 2) {
          const Pair y = x.pair(i + k * kLanes);
          terms[k] = exponent.fast(y.first, range);
          terms[k + 1] = exponent.fast(y.second, range);
        }
        for (int k = 0; k < 4; ++k) store(kept + i + k * kLanes, terms[k]);
        sums.add((terms[0] + terms[1]) + (terms[2] + terms[3]));
        row.fetch<1>(next + i, 2 * kPair);
      }
      if (range.was_left(sums.value())) {
        i = 0;
        sums = {};
        if constexpr (Exponent::kHasWide) {
          Exponent::Range wide;
          for (; i + kPair <= n; i += kPair) {
            const Pair y = x.pair(i);
            const Vec first = exponent.wide(y.first, wide), second = exponent.wide(y.second, wide);
            store(kept + i, first);
            store(kept + i + kLanes, second);
            sums.add(first + second);
          }
          if (wide.was_left(sums.value())) {
            i = 0;
            sums = {};
          }
        }
      }
    }
    // What is left of the block, and all of one that holds -inf, NaN or what left the range.
    Vec top = splat<Vec>(-kInfinity);
    for (; i < n; i += kPair) {
      const Pair y = x.pair(i);
      const Vec first = exponent(y.first), second = exponent(y.second);
      top = max(max(top, y.first), y.second);
      store(kept + i, first);
      store(kept + i + kLanes, second);
      sums.add(first + second);
    }
    sum_ += sums.value() * exponent.correction();
    // Exponents are rounded at their own size, but for fast ones with fused multiply-adds.
    constexpr float kHeadroom = 8;  // in powers of two
    if (!kFusedMultiplyAdd && sums.value() > 0x1p13) return false;
    return !((largest(top) - reference_) * c_ > kHeadroom);
  }

  bool valid() const { return is_valid_sum(sum_); }
  bool empty() const { return sum_ == 0; }

  // The sum of exp((x - reference) / T). set_total() makes it that of the whole vocabulary, of
  // which other processes have the rest.
  double total() const { return sum_; }
  void set_total(double sum) { sum_ = sum; }

  // What exponentials are relative to.
  float reference() const { return reference_; }
  float c() const { return c_; }

  // The factor that makes a kept exponential, or one of exponent(), a probability.
  double scale() const { return exponent_.correction() / sum_; }
  const Exponent& exponent() const { return exponent_; }

  // log(sum exp((x - reference) / T)).
  double log_sum() const { return ::log(sum_); }
  double log2_sum() const { return ::log2(sum_); }

  // The temperature that c stands for, which is not quite the one asked for, as c is rounded. Sums
  // belong to it.
  double temperature() const { return kBitsPerNat / c_; }

  // T log(sum exp(x / T)).
  double log_sum_exp() const { return (double)reference_ + temperature() * log_sum(); }

 private:
  float reference_;
  double sum_ = 0;
  float c_;
  Exponent exponent_;
};

// log p = (x - origin) / T - rest of a logit x.
class LogProbability {
 public:
  // What is large is subtracted before it costs digits.
  explicit LogProbability(const Softmax& softmax)
      : origin_((float)softmax.log_sum_exp()),
        scale_((float)(1 / softmax.temperature())),
        rest_((float)((softmax.log_sum_exp() - origin_) / softmax.temperature())) {}

  KD_INLINE Vec operator()(Vec x) const { return (x - origin_) * scale_ - rest_; }

 private:
  float origin_, scale_, rest_;
};

// The logarithm to base 2 of an exponential, from the same exponent, so that its rounding cancels
// in terms.
class LogExponential {
 public:
  explicit LogExponential(const Softmax& softmax)
      : reference_(softmax.reference()), c_(softmax.c()) {}

  KD_INLINE Vec operator()(Vec x) const { return (x - reference_) * c_; }

 private:
  float reference_, c_;
};

// log q - log p = gap / T + offset.
struct Gap {
  Shifts shifts;

  KD_INLINE Vec operator()(Vec s, Vec t) const {
    return (s - shifts.student) - (t - shifts.teacher);
  }

  double offset(const Softmax& student, const Softmax& teacher) const {
    const double t_apart = (double)teacher.reference() - shifts.teacher;
    const double s_apart = (double)student.reference() - shifts.student;
    return teacher.log_sum() - student.log_sum() + (t_apart - s_apart) / student.temperature();
  }
};

// What a sweep needs to turn a pair of logits and their exponentials into a point.
template <bool kFar>
struct Points {
  Points(const Softmax& student, const Softmax& teacher)
      : s_log(student),
        t_log(teacher),
        gap{shifts_between((float)student.log_sum_exp(), (float)teacher.log_sum_exp(), 2)},
        inverse_temperature((float)(1 / student.temperature())) {
    const double unit = kFar ? 1 / teacher.total() : 1;
    weights = {(float)(teacher.scale() / unit),
               (float)(student.scale() / unit),
               (float)unit,
               (float)-teacher.log2_sum(),
               (float)-student.log2_sum(),
               (float)gap.offset(student, teacher)};
  }

  KD_INLINE Point<Vec> operator()(Vec s, Vec t, Vec s_exponential, Vec t_exponential) const {
    // r is NaN where both are -inf; a divergence never lets it past p = q = 0.
    const Vec r = gap(s, t) * inverse_temperature;
    if constexpr (kFar) return {t_exponential, s_exponential, t_log(t), s_log(s), r};
    return {t_exponential * weights.p, s_exponential * weights.q, t_log(t), s_log(s),
            r + weights.offset};
  }

  Weights weights;  // of exponentials
  std::conditional_t<kFar, LogExponential, LogProbability> s_log, t_log;
  Gap gap;
  float inverse_temperature;
};

// What rounding of its weights did to a far row.
inline Rounding rounding_of(const Weights& weights, const Softmax& student,
                            const Softmax& teacher) {
  return {(float)(weights.p / (teacher.scale() * teacher.total()) - 1),
          (float)(weights.q / (student.scale() * teacher.total()) - 1),
          teacher.log2_sum() - student.log2_sum()};
}

// Sums over a row, by kept exponentials e.
struct KLSums {
  double forward = 0, reverse = 0;  // e_t gap, e_s gap
  double entropy = 0;               // e_t (t - t_reference)
};

// A KL divergence is a sum of two numbers; where one is more than 32 times the result, too few
// digits are left and the row counts as near. As in kdkernels/constants.py.
constexpr double kMostCancelled = 32;

// KL(p || q), KL(q || p) and the entropy of p, in nats, of a row pair without infinite logits; with
// some, they are infinite or NaN.
struct KL {
  double forward = NAN, reverse = NAN, entropy = NAN;
  double offset = NAN;

  KL() = default;
  KL(const KLSums& sums, Gap gap, const Softmax& student, const Softmax& teacher) {
    const double s_factor = student.scale() / student.temperature();
    const double t_factor = teacher.scale() / teacher.temperature();
    offset = gap.offset(student, teacher);
    forward = -(sums.forward * t_factor + offset);
    reverse = sums.reverse * s_factor + offset;
    entropy = teacher.log_sum() - sums.entropy * t_factor;
  }
};

// -sum p log p over a block of logits.
inline double entropy_block(const float* x, int n, const LogProbability& log_p) {
  Vec total = {};
  for (int i = 0; i < n;) {
    const int end = end_of_part(i, n);
    Vec part = {};
    for (; i < end; i += kLanes) {
      const Vec y = log_p(load(x + i));
      part += times_or_zero(exp(y), y);
    }
    total += part;
  }
  return -sum(total);
}

inline float largest_logit(const Reader& reader, int64_t n, float* buffer) {
  float result = -kInfinity;
  for_blocks(n, [&](int64_t begin, int count) {
    result = larger(result, block_max(reader.block(begin, count, buffer), count));
  });
  return result;
}

// The largest of the first `sample` logits or, where all of these are -inf, of the next block that
// holds another.
inline float first_reference(const Reader& reader, int64_t sample, int64_t vocab, float* buffer) {
  float result = largest_logit(reader, sample, buffer);
  for (int64_t begin = sample; result == -kInfinity && begin < vocab; begin += kBlock) {
    const int n = vocab - begin < kBlock ? (int)(vocab - begin) : kBlock;
    result = block_max(reader.block(begin, n, buffer), n);
  }
  return result;
}

// The position of the first largest raw logit.
inline int64_t top_token(const Reader& reader, int64_t vocab, float* buffer) {
  int64_t top = 0;
  float top_logit = -kInfinity;
  for_blocks(vocab, [&](int64_t begin, int n) {
    const float* x = reader.raw(begin, n, buffer);
    const float block_top = block_max(x, n);
    if (!(block_top > top_logit)) return;
    top_logit = block_top;
    for (top = begin; x[top - begin] != block_top && top < begin + n - 1;) ++top;
  });
  return top;
}

}  // namespace kd::KD_NAMESPACE
