// The divergences from a mixture of teacher and student: JSD and the skew divergences.
#pragma once

#include "point.h"

namespace kd::KD_NAMESPACE {

// p_weight KL(p || m) + q_weight KL(q || m), where m = share p + rest q and share + rest = 1.
//
// Near the teacher, where q - p has few digits, everything is a power series in r:
//   slope / q = q_weight log(q / m) + rest (p_weight rest - q_weight share) g,  g = (q - p) / m
//   d log(q / m) / dr = share (1 - rest g)
//   d (value / p) / dr = exp(r) slope / q
struct Mixture : Defaults {
  static constexpr bool kHasClose = true;
  static constexpr bool kFarOverQ = true;
  static constexpr float close_radius = 0.75f;  // of |r|, for the polynomials below
  static constexpr int kDegree = 7;
  float share, rest;
  float of_slope[kDegree + 1];  // slope / (q r)
  float of_value[kDegree + 1];  // value / (p r^2)

  // Takes doubles: rounded to float, coefficients would lose the few digits that do not cancel near
  // the teacher.
  Mixture(double share, double rest, double p_weight, double q_weight)
      : share((float)share), rest((float)rest) {
    double exponential[kTerms + 1] = {1}, g[kTerms + 1], slope[kTerms], value[kTerms];
    const double g_weight = rest * (p_weight * rest - q_weight * share);
    for (int n = 1; n <= kTerms; ++n) {
      exponential[n] = exponential[n - 1] / n;
      // From g m / p = exp(r) - 1: a small share takes no digits from it, nor from the logarithm.
      g[n] = exponential[n];
      for (int k = 1; k < n; ++k) g[n] -= rest * g[k] * exponential[n - k];
      const double log_q_over_m = n == 1 ? share : -share * rest * g[n - 1] / n;
      slope[n - 1] = q_weight * log_q_over_m + g_weight * g[n];
      value[n - 1] = 0;
      for (int k = 1; k <= n; ++k) value[n - 1] += slope[k - 1] * exponential[n - k] / (n + 1);
    }
    economize(slope, of_slope);
    economize(value, of_value);
  }

  // Whether its rows may be far.
  KD_INLINE bool has_far() const { return share >= kLeastShare && rest >= kLeastShare; }

  // m, but never 0: where p and q are 0, so is what is divided by it.
  template <class F>
  KD_INLINE F of(const Point<F>& x) const {
    return share * x.p + (rest * x.q + FLT_MIN);
  }

  // Next to nothing beside a far row's exponentials, whose largest is about 1 while m may be as
  // large as their number: what it is added to is no subnormal float, nor are quotients of it.
  static constexpr float kNegligible = 1e-30f;

  template <class F>
  KD_INLINE F far_of(const Point<F>& x, Weights weights) const {
    return (share * weights.p) * x.p + ((rest * weights.q) * x.q + kNegligible);
  }

  // p / m or q / m of a far row's point, never 0. The error of its logarithm is relative to that,
  // not to the logarithms of p and m, which may be large.
  template <class F>
  KD_INLINE F over_m(F exponential, float weight, const Point<F>& x, Weights weights) const {
    return quotient(weight * exponential + kNegligible, far_of(x, weights));
  }

  // log(m / own) away from the teacher, given m - own: small where m has little of the other one.
  template <class F>
  static KD_INLINE F log_over(F own, F m, F difference) {
    const F growth = log1p(quotient(abs(difference), select(own < m, own, m) + FLT_MIN));
    return select(difference < 0.0f, -growth, growth);
  }

  // Whether terms of an m that is nearly `own`, where u = log(m / own) and (m - own) / m cancel,
  // come from polynomials. CUDA's kernels have no registers left for these: there a skew with alpha
  // of 0.99 is off by 2e-6, of 0.9999 by 2e-4.
#if defined(KD_OWN_MATH)
  static constexpr bool kNearlyOwn = false;
#else
  static constexpr bool kNearlyOwn = true;
#endif

  // own (exp(u) - 1 - u), the term of KL(own || m), given m - own.
  template <class F>
  static KD_INLINE F excess(F own, F difference, F u) {
    const F plain = difference - own * u;
    if constexpr (kNearlyOwn)
      return select(abs(u) < kSeriesRadius, phi_over_x(u) * (own * u), plain);
    else
      return plain;
  }

  template <class F>
  KD_INLINE Term<F> close(const Point<F>& x) const {
    return {close_value(x), x.q * close_slope(x)};
  }

  template <class F>
  KD_INLINE F value(const Point<F>& x, F far) const {
    return select(abs(x.r) < close_radius, close_value(x), far);
  }

  // Given slope / q away from the teacher.
  template <class F>
  KD_INLINE F slope(const Point<F>& x, F far_over_q) const {
    return times_or_zero(x.q, select(abs(x.r) < close_radius, close_slope(x), far_over_q));
  }

 private:
  template <class F>
  KD_INLINE F close_value(const Point<F>& x) const {
    return polynomial(of_value, x.r) * x.r * (x.p * x.r);
  }

  // Divided by q.
  template <class F>
  KD_INLINE F close_slope(const Point<F>& x) const {
    return polynomial(of_slope, x.r) * x.r;
  }

  template <class F>
  static KD_INLINE F polynomial(const float (&coefficients)[kDegree + 1], F r) {
    F sum = splat<F>(coefficients[kDegree]);
    for (int n = kDegree - 1; n >= 0; --n) sum = sum * r + coefficients[n];
    return sum;
  }

  // Cuts a power series, of which kTerms are enough, to a polynomial: from the highest power on,
  // subtracts the multiple of the Chebyshev polynomial of degree n that cancels r^n. Where |r| <
  // close_radius that changes the sum by at most 2^(1 - n) of what the term comes to at
  // close_radius.
  static constexpr int kTerms = 12;
  static void economize(double (&series)[kTerms], float (&coefficients)[kDegree + 1]) {
    for (int n = kTerms - 1; n > kDegree; --n) {
      double of_power = series[n];
      for (int k = 1; 2 * k <= n; ++k) {
        const int power = n - 2 * k;
        of_power *=
            -(double)close_radius * close_radius * (power + 2) * (power + 1) / (4 * k * (n - k));
        series[power] -= of_power;
      }
    }
    for (int n = 0; n <= kDegree; ++n) coefficients[n] = (float)series[n];
  }
};

// beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q. Agarwal et al. 2023 (GKD).
struct JSD : Mixture {
  float log_share, log_rest;

  JSD(double beta, double rest)
      : Mixture(beta, rest, beta, rest),
        log_share((float)::log(beta)),
        log_rest((float)::log1p(-beta)) {}

  template <class F>
  KD_INLINE Term<F> operator()(const Point<F>& x) const {
    // Relative to the larger part of m: relative to the smaller one, the other logarithm would be a
    // small difference of large numbers. Where p is 0 and that of q underflows q is.
    const F of_p = share * x.p, of_q = rest * x.q;
    const auto p_is_larger = (of_p >= of_q) & (x.p > 0.0f);
    const F smaller = select(p_is_larger, of_q, of_p), larger = select(p_is_larger, of_p, of_q);
    const F log = log1p(quotient(smaller, larger + FLT_MIN)) +
                  select(p_is_larger, splat<F>(log_share), splat<F>(log_rest));
    const F over_p = select(p_is_larger, log, log + x.r);
    const F over_q = select(p_is_larger, log - x.r, log);
    const F slope = this->slope(x, -rest * over_q);
    return {value(x, slope - share * times_or_zero(x.p, over_p)), slope};
  }

  KD_INLINE double kl_from() const { return kFarFrom / (share * rest); }

  // log2(q / m) is more by a constant of the row, which cancels in the gradient.
  template <class F>
  KD_INLINE F far(const Point<F>& x, Weights weights, Term<F>& sums) const {
    const F log_m = log2(far_of(x, weights)), over_q = x.log_q - log_m;
    sums.value += x.p * (x.log_p - log_m);
    sums.slope += x.q * over_q;
    return over_q;
  }

  KD_INLINE double far_value(double value, double slope, Weights weights, Rounding added) const {
    const double of_p = weights.p * value, of_q = weights.q * slope;
    const double bits = weights.unit * (share * of_p + rest * of_q) + rest * added.offset;
    return kNatsPerBit * bits + share * added.p + rest * added.q;
  }
  KD_INLINE double far_unit(Weights weights) const {
    return kNatsPerBit * rest * weights.unit * weights.q;
  }
};

// KL(p || alpha p + (1 - alpha) q). Ko et al. 2024 (DistiLLM).
struct SkewForwardKL : Mixture {
  SkewForwardKL(double alpha, double rest) : Mixture(alpha, rest, 1, 0) {}

  template <class F>
  KD_INLINE Term<F> operator()(const Point<F>& x) const {
    const F m = of(x), ratio = quotient(rest * bregman(x.p, x.q, x.r).difference, m);
    const F difference = rest * (x.q - x.p), over_p = log_over(x.p, m, difference);
    return {value(x, excess(x.p, difference, over_p)), rest * times_or_zero(x.q, ratio)};
  }

  KD_INLINE double kl_from() const { return kFarFrom / (rest * rest); }

  template <class F>
  KD_INLINE F far(const Point<F>& x, Weights weights, Term<F>& sums) const {
    const F ratio = over_m(x.p, weights.p, x, weights);
    sums.value += x.p * log2(ratio);
    sums.slope += x.q * ratio;
    return ratio;
  }

  KD_INLINE double far_value(double value, double slope, Weights weights, Rounding added) const {
    return kNatsPerBit * weights.unit * weights.p * value +
           far_unit(weights) * slope * (added.p - added.q);
  }
  KD_INLINE double far_unit(Weights weights) const {
    return -(double)rest * weights.unit * weights.q;
  }
};

// KL(q || alpha q + (1 - alpha) p). Ko et al. 2024 (DistiLLM).
struct SkewReverseKL : Mixture {
  SkewReverseKL(double alpha, double share) : Mixture(share, alpha, 0, 1) {}

  template <class F>
  KD_INLINE Term<F> operator()(const Point<F>& x) const {
    const F m = of(x), difference = share * (x.p - x.q);
    const F over_q = log_over(x.q, m, difference), ratio = quotient(difference, m);
    F slope = rest * ratio - over_q;
    if constexpr (kNearlyOwn) {
      const F series = phi_over_x(-over_q) * over_q - share * ratio;
      slope = select(abs(over_q) < kSeriesRadius, series, slope);
    }
    return {value(x, excess(x.q, difference, over_q)), this->slope(x, slope)};
  }

  // Where the student's share is large, slopes nearly cancel, and what is off in p and q counts.
  KD_INLINE bool has_far() const { return share >= 0.25f && rest >= kLeastShare; }

  KD_INLINE double kl_from() const { return kFarFrom / (share * share); }

  template <class F>
  KD_INLINE F far(const Point<F>& x, Weights weights, Term<F>& sums) const {
    const F ratio = over_m(x.q, weights.q, x, weights), log = log2(ratio);
    const F over_q = log - (kLog2E * rest) * ratio;
    sums.value += x.q * log;
    sums.slope += x.q * over_q;
    return over_q;
  }

  KD_INLINE double far_value(double value, double slope, Weights weights, Rounding added) const {
    const double unit = far_unit(weights);
    return unit * value + (1 - unit * (value - slope)) * (added.p - added.q);
  }
  KD_INLINE double far_unit(Weights weights) const {
    return kNatsPerBit * weights.unit * weights.q;
  }
};

}  // namespace kd::KD_NAMESPACE
