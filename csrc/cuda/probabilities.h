// From the logits of a column to what a divergence is a function of.
#pragma once

#include "elements.h"

#include "../core/divergences.h"

namespace kd::cuda {

// From a pair of logits to probabilities; see csrc/cpu/rows.h for the origins.
struct Probabilities {
  float c, inverse_temperature;
  float s_shift, t_shift, s_inverse, t_inverse;
  float s_origin, t_origin, offset;
  float s_max, t_max, s_log_sum, t_log_sum;

  KD_DEVICE Point<float> operator()(float s, float t) const {
    Point<float> x;
    x.p = p(t);
    x.q = q(s);
    x.log_p = log_p(t);
    x.log_q = log_q(s);
    // NaN where both are -inf; a divergence never lets r past p = q = 0.
    x.r = fmaf((s - s_origin) - (t - t_origin), inverse_temperature, offset);
    return x;
  }

  KD_DEVICE float p(float t) const { return exp2_approx(fmaf(t, c, -t_shift)) * t_inverse; }
  KD_DEVICE float q(float s) const { return exp2_approx(fmaf(s, c, -s_shift)) * s_inverse; }
  KD_DEVICE float log_p(float t) const { return (t - t_max) * inverse_temperature - t_log_sum; }
  KD_DEVICE float log_q(float s) const { return (s - s_max) * inverse_temperature - s_log_sum; }

  KD_DEVICE Probabilities again() const {
    return {opaque(c),         opaque(inverse_temperature),
            opaque(s_shift),   opaque(t_shift),
            opaque(s_inverse), opaque(t_inverse),
            opaque(s_origin),  opaque(t_origin),
            opaque(offset),    opaque(s_max),
            opaque(t_max),     opaque(s_log_sum),
            opaque(t_log_sum)};
  }
};

}  // namespace kd::cuda
