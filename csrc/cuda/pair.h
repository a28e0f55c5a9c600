// The softmax states of a row pair and what gives its KL divergences, from one sweep.
#pragma once

#include "softmax.h"

#include "../core/divergences.h"

namespace kd::cuda {

// Sums over a row of exponentials e = 2^x, where x = logit c - shift as in State.
struct KLSums {
  double forward = 0, reverse = 0;  // e_t (x_s - x_t), e_s (x_s - x_t)
  double entropy = 0;               // e_t x_t
};

struct alignas(16) PairState {
  State student, teacher;
  KLSums sums;
  float label_logit = 0;  // see row_states.h

  // The same relative to larger maxima.
  KD_DEVICE void rise(float s_max, float t_max, float c) {
    const double s_fall = student.shift(c) - shift_of(s_max, c);
    const double t_fall = teacher.shift(c) - shift_of(t_max, c);
    sums.forward += teacher.sum * (s_fall - t_fall);
    sums.reverse += student.sum * (s_fall - t_fall);
    sums.entropy += teacher.sum * t_fall;
    const double s_factor = power_of_two((float)s_fall), t_factor = power_of_two((float)t_fall);
    sums.forward *= t_factor, sums.reverse *= s_factor, sums.entropy *= t_factor;
    student.sum *= s_factor, teacher.sum *= t_factor;
    student.max = s_max, teacher.max = t_max;
  }

  // Takes the larger maxima, before there are sums.
  KD_DEVICE void see(const PairState& other) {
    student.max = fmaxf(student.max, other.student.max);
    teacher.max = fmaxf(teacher.max, other.teacher.max);
  }

  KD_DEVICE void merge(PairState other, float c) {
    const float s_max = fmaxf(student.max, other.student.max);
    const float t_max = fmaxf(teacher.max, other.teacher.max);
    rise(s_max, t_max, c);
    add(other, c);
  }

  // Adds sums of maxima that are no larger.
  KD_DEVICE void add(PairState other, float c) {
    other.rise(student.max, teacher.max, c);
    student.sum += other.student.sum;
    teacher.sum += other.teacher.sum;
    sums.forward += other.sums.forward;
    sums.reverse += other.sums.reverse;
    sums.entropy += other.sums.entropy;
  }
};

// The largest logits of all lanes' states, in a state without sums.
KD_DEVICE PairState warp_maxima(const PairState& mine) {
  PairState all;
  all.student.max = warp_max(mine.student.max);
  all.teacher.max = warp_max(mine.teacher.max);
  return all;
}

// The sums of all lanes that the divergence asks for, of states with the same maxima.
template <class Divergence>
KD_DEVICE PairState warp_sums(const PairState& mine) {
  PairState all = mine;
  all.student.sum = warp_sum(mine.student.sum);
  all.teacher.sum = warp_sum(mine.teacher.sum);
  if constexpr (Divergence::kForward) all.sums.forward = warp_sum(mine.sums.forward);
  if constexpr (Divergence::kReverse) all.sums.reverse = warp_sum(mine.sums.reverse);
  if constexpr (Divergence::kAddsEntropy) all.sums.entropy = warp_sum(mine.sums.entropy);
  return all;
}

// The states of all lanes merged, the same in every lane.
template <class Divergence>
KD_DEVICE PairState warp_merge(PairState mine, float c) {
  const PairState largest = warp_maxima(mine);
  mine.rise(largest.student.max, largest.teacher.max, c);
  return warp_sums<Divergence>(mine);
}

// The state of the row pair's columns that a thread has seen.
template <class Divergence, class Total>
struct RunningPair {
  Running<Total> student, teacher;
  Total forward, reverse, entropy;

  KD_DEVICE explicit RunningPair(float c) : student(c), teacher(c) {}

  template <int n>
  KD_DEVICE void push(const float (&s)[n], const float (&t)[n]) {
    const float s_before = student.shift, t_before = teacher.shift;
    const float s_sum = student.sum.total, t_sum = teacher.sum.total;
    student.make_room(s);
    teacher.make_room(t);
    const float s_fall = s_before - student.shift, t_fall = t_before - teacher.shift;
    // Sums of 0 have nothing to move: a fall may be infinite.
    const auto move = [](Total& total, float factor, float by) {
      total.scale(factor);
      total.add(by);
    };
    const float s_factor = power_of_two(s_fall), t_factor = power_of_two(t_fall);
    const float apart = s_fall - t_fall;
    if constexpr (Divergence::kForward)
      move(forward, t_factor, times_or_zero(t_factor * t_sum, apart));
    if constexpr (Divergence::kReverse)
      move(reverse, s_factor, times_or_zero(s_factor * s_sum, apart));
    if constexpr (Divergence::kAddsEntropy)
      move(entropy, t_factor, times_or_zero(t_factor * t_sum, t_fall));
    add(s, t);
  }

  // Once both have risen to their largest logits.
  template <int n>
  KD_DEVICE void add(const float (&s)[n], const float (&t)[n]) {
    float s_x[n], t_x[n], s_e[n], t_e[n];
    student.add(s, s_x, s_e);
    teacher.add(t, t_x, t_e);
    float of_forward = 0, of_reverse = 0, of_entropy = 0;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const float gap = s_x[i] - t_x[i];
      if constexpr (Divergence::kForward) of_forward = fmaf(t_e[i], gap, of_forward);
      if constexpr (Divergence::kReverse) of_reverse = fmaf(s_e[i], gap, of_reverse);
      if constexpr (Divergence::kAddsEntropy) of_entropy = fmaf(t_e[i], t_x[i], of_entropy);
    }
    if constexpr (Divergence::kForward) forward.add(of_forward);
    if constexpr (Divergence::kReverse) reverse.add(of_reverse);
    if constexpr (Divergence::kAddsEntropy) entropy.add(of_entropy);
  }

  KD_DEVICE PairState state() const {
    return {student.state(), teacher.state(), {forward.value(), reverse.value(), entropy.value()}};
  }
};

// KL(p || q), KL(q || p) and the entropy of p, in bits, of a row pair without infinite logits; with
// some, they are infinite or NaN. Those that a divergence does not ask for are 0: all warps of a
// CTA wait for one that computes these.
struct KL {
  double forward = 0, reverse = 0, entropy = 0;
  double s_log, t_log;  // log2 q = x_s - s_log
  double offset;        // log2 q - log2 p = x_s - x_t + offset

  template <class Divergence>
  KD_DEVICE KL(const Divergence&, const PairState& pair, float c) {
    const double s_sum = pair.student.corrected_sum(c), t_sum = pair.teacher.corrected_sum(c);
    s_log = log2_of(s_sum);
    t_log = log2_of(t_sum);
    offset = kBitsPerNat * log_ratio(t_sum, s_sum);
    const double s_inverse = inverse(pair.student.sum), t_inverse = inverse(pair.teacher.sum);
    if constexpr (Divergence::kForward) forward = -(pair.sums.forward * t_inverse + offset);
    if constexpr (Divergence::kReverse) reverse = pair.sums.reverse * s_inverse + offset;
    if constexpr (Divergence::kAddsEntropy) entropy = t_log - pair.sums.entropy * t_inverse;
  }
};

}  // namespace kd::cuda
