// From the logits of a column to what a divergence is a function of.
#pragma once

#include "pair.h"

namespace kd::cuda {

// From a pair of logits to probabilities.
struct Probabilities {
  float c, inverse_temperature;
  float s_shift, t_shift, s_inverse, t_inverse;
  float offset;
  Shifts shifts;
  float s_max, t_max, s_log_sum, t_log_sum;

  KD_DEVICE Probabilities(float c, float inverse_temperature, const State& student,
                          const State& teacher)
      : c(c),
        inverse_temperature(inverse_temperature),
        s_shift(student.shift(c)),
        t_shift(teacher.shift(c)),
        s_inverse(reciprocal(student.sum)),
        t_inverse(reciprocal(teacher.sum)),
        s_max(student.max),
        t_max(teacher.max),
        s_log_sum(student.log_sum(c)),
        t_log_sum(teacher.log_sum(c)) {
    shifts = shifts_between(s_max, t_max, 2);
    const double apart = ((double)t_max - shifts.teacher) - ((double)s_max - shifts.student);
    const double excess = student.excess(c) - teacher.excess(c);
    offset = (float)(apart * inverse_temperature + kNatsPerBit * excess +
                     log_ratio(teacher.corrected_sum(c), student.corrected_sum(c)));
  }

  KD_DEVICE Point<float> operator()(float s, float t) const {
    Point<float> x;
    x.p = p_of(t);
    x.q = q_of(s);
    x.log_p = log_p(t);
    x.log_q = log_q(s);
    // NaN where both are -inf; a divergence never lets r past p = q = 0.
    x.r = fmaf((s - shifts.student) - (t - shifts.teacher), inverse_temperature, offset);
    return x;
  }

  KD_DEVICE float p_of(float t) const { return exp2_approx(fmaf(t, c, -t_shift)) * t_inverse; }
  KD_DEVICE float q_of(float s) const { return exp2_approx(fmaf(s, c, -s_shift)) * s_inverse; }
  // 1 over the sum of all q_of(): 1 but for the rounding of s_inverse.
  KD_DEVICE double inverse_of_total(double s_sum) const { return 2 - s_inverse * s_sum; }
  KD_DEVICE float log_p(float t) const { return (t - t_max) * inverse_temperature - t_log_sum; }
  KD_DEVICE float log_q(float s) const { return (s - s_max) * inverse_temperature - s_log_sum; }

  KD_DEVICE Probabilities again() const {
    Probabilities x = *this;
    x.c = opaque(c), x.inverse_temperature = opaque(inverse_temperature);
    x.s_shift = opaque(s_shift), x.t_shift = opaque(t_shift);
    x.s_inverse = opaque(s_inverse), x.t_inverse = opaque(t_inverse);
    x.shifts = {opaque(shifts.student), opaque(shifts.teacher)}, x.offset = opaque(offset);
    x.s_max = opaque(s_max), x.t_max = opaque(t_max);
    x.s_log_sum = opaque(s_log_sum), x.t_log_sum = opaque(t_log_sum);
    return x;
  }
};

// The same for a far row, whose exponentials weigh 1 for the teacher.
struct FarProbabilities {
  float c, s_shift, t_shift, s_log, t_log, offset;
  float q, unit;  // as in Weights

  FarProbabilities() = default;
  KD_DEVICE FarProbabilities(float c, const PairState& pair, const KL& kl)
      : c(c),
        s_shift(pair.student.shift(c)),
        t_shift(pair.teacher.shift(c)),
        s_log((float)kl.s_log),
        t_log((float)kl.t_log),
        offset((float)kl.offset),
        q((float)(pair.teacher.sum * inverse(pair.student.sum))),
        unit(reciprocal(pair.teacher.sum)) {}

  KD_DEVICE Point<float> operator()(float s, float t) const {
    const float s_x = fmaf(s, c, -s_shift), t_x = fmaf(t, c, -t_shift);
    return {exp2_approx(t_x), exp2_approx(s_x), t_x, s_x, s_x - t_x};
  }

  KD_DEVICE Weights weights() const { return {1, q, unit, -t_log, -s_log, offset}; }

  KD_DEVICE float q_of(float s) const { return exp2_approx(fmaf(s, c, -s_shift)); }
  KD_DEVICE double inverse_of_total(double s_sum) const {
    const double approximately = q * unit;
    return approximately * (2 - approximately * s_sum);
  }

  // Where `factor` is above 1/2, multiplies the exponentials of both, which slopes over q do not
  // feel, by its power of two. Returns what is left of it: no logarithm, which may be as large as a
  // float, makes that overflow.
  KD_DEVICE float take_power_of_two(float factor) {
    const int exponent = (int)(bits_as<uint32_t>(factor) >> 23 & 0xff) - 125;
    const int power = exponent < 0 ? 0 : exponent > 126 ? 126 : exponent;
    s_shift -= power, t_shift -= power;
    return factor * bits_as<float>((uint32_t)(127 - power) << 23);
  }
};

struct FarRow {
  FarProbabilities points;
  Rounding rounding;

  FarRow() = default;
  KD_DEVICE FarRow(float c, const PairState& pair, const KL& kl) : points(c, pair, kl) {
    // The logarithms are those of a sum whose largest term is exact, as exponentials are not.
    const double t_inverse = inverse(pair.teacher.sum);
    const double exceeds = 1 - pair.teacher.corrected_sum(c) * t_inverse;
    rounding.p = (float)exceeds;
    rounding.q = (float)(exceeds + (points.q * pair.student.sum * t_inverse - 1));
    rounding.offset = kl.offset;
  }
};

// The gradient of a far row by a KL divergence, up to a factor:
// forward (q - p) + reverse q (log q - log p - KL(q || p)).
struct KLGradient {
  float c, s_shift, t_shift, of_p, of_q, of_gap;
  float reverse_kl;  // times reverse, in nats

  KLGradient() = default;
  KD_DEVICE KLGradient(float c, const PairState& pair, const KL& kl, float forward, float reverse)
      : c(c),
        s_shift(pair.student.shift(c)),
        t_shift(pair.teacher.shift(c)),
        of_p(forward * reciprocal(pair.teacher.sum)),
        of_gap((float)kNatsPerBit * reverse),
        reverse_kl((float)(kl.reverse * kNatsPerBit) * reverse) {
    const float s_inverse = reciprocal(pair.student.sum);
    of_gap *= s_inverse;
    of_q = forward * s_inverse + (float)(kl.offset - kl.reverse) * of_gap;
  }

  KD_DEVICE void scale(float factor) { of_p *= factor, of_q *= factor, of_gap *= factor; }

  template <class Divergence>
  KD_DEVICE float operator()(const Divergence&, float s, float t) const {
    const float s_x = fmaf(s, c, -s_shift), t_x = fmaf(t, c, -t_shift);
    const float s_e = exp2_approx(s_x);
    float gradient = s_e * of_q;
    // Not (gap of_gap + of_q) s_e: where s_e is 0 the gap may be as large as a float.
    if constexpr (Divergence::kReverse) gradient = fmaf(s_x - t_x, s_e * of_gap, gradient);
    return Divergence::kForward ? fmaf(-exp2_approx(t_x), of_p, gradient) : gradient;
  }
};

}  // namespace kd::cuda
