// The divergences, each once, for the CPU and for CUDA. With teacher p and student q,
//
//   D = sum_v value(v)        dD/ds_k = (slope_k - q_k sum_v slope_v) / temperature
//
// where slope = d value / d log q up to a multiple of q, which cancels in the gradient; it is
// chosen so that slope -> 0 as q -> p and nothing cancels near the teacher. Values are >= 0.
//
// That takes two to four times the operations of the textbook's formulas, which lose nothing to
// rounding where a row's divergence is not small. So each divergence has those too, for far rows.
// A KL divergence has forward() and reverse(), its weights of KL(p || q) and KL(q || p), which the
// first sweep over a row adds up. Any other has far(), which adds a term to the sums of a far row
// and returns its slope, divided by q where kFarOverQ says so. far_value() turns the sums into the
// divergence, without what Rounding put into them; far_unit() is the unit of slopes, in nats.
#pragma once

#include "mixtures.h"

namespace kd::KD_NAMESPACE {

// KL(p || q). Hinton et al. 2015.
struct ForwardKL : Defaults {
  static constexpr bool kSlopeSumsToZero = true;
  static constexpr bool kIsKL = true;
  ForwardKL(float, float) {}

  static KD_INLINE constexpr float forward() { return 1; }
  static KD_INLINE constexpr float reverse() { return 0; }

  template <class F>
  KD_INLINE Term<F> operator()(const Point<F>& x) const {
    const auto kl = bregman(x.p, x.q, x.r);
    return {kl.excess, kl.difference};
  }
};

// KL(q || p). Gu et al. 2023 (MiniLLM).
struct ReverseKL : Defaults {
  static constexpr bool kCheapSlope = true;
  static constexpr bool kIsKL = true;
  static constexpr bool kForward = false, kReverse = true;
  ReverseKL(float, float) {}

  static KD_INLINE constexpr float forward() { return 0; }
  static KD_INLINE constexpr float reverse() { return 1; }

  template <class F>
  KD_INLINE Term<F> operator()(const Point<F>& x) const {
    return {bregman(x.q, x.p, -x.r).excess, times_or_zero(x.q, x.r)};
  }
};

// weight KL(p || q) + (1 - weight) KL(q || p), 0 < weight < 1. Jeffreys 1946.
struct SymmetricKL : Defaults {
  static constexpr bool kIsKL = true;
  static constexpr bool kReverse = true;
  float weight, rest;
  SymmetricKL(double weight, double rest) : weight((float)weight), rest((float)rest) {}

  KD_INLINE float forward() const { return weight; }
  KD_INLINE float reverse() const { return rest; }

  template <class F>
  KD_INLINE Term<F> operator()(const Point<F>& x) const {
    const auto forward = bregman(x.p, x.q, x.r);
    const auto reverse = bregman(x.q, x.p, -x.r);
    return {weight * forward.excess + rest * reverse.excess,
            weight * forward.difference + rest * times_or_zero(x.q, x.r)};
  }
};

// Total variation, sum |p - q| / 2; slope 0 where p = q. Wen et al. 2023.
struct TVD : Defaults {
  static constexpr bool kCheapSlope = true;
  static constexpr bool kFarOverQ = true;
  TVD(float, float) {}

  template <class F>
  KD_INLINE Term<F> operator()(const Point<F>& x) const {
    const F difference = bregman(x.p, x.q, x.r).difference;
    const F half = 0.5f * x.q;
    const F zero = splat<F>(0.0f);
    return {0.5f * abs(difference),
            select(difference > 0.0f, half, select(difference < 0.0f, -half, zero))};
  }

  KD_INLINE bool has_far() const { return true; }
  // By Pinsker's inequality.
  static KD_INLINE constexpr double kl_from() { return 2 * kFarFrom * kFarFrom; }

  template <class F>
  KD_INLINE F far(const Point<F>& x, Weights weights, Term<F>& sums) const {
    const F over_q = step(x.r, weights.offset);  // half of the sign, and 1/2, which cancels
    sums.value += abs(weights.q * x.q - weights.p * x.p);
    sums.slope += x.q * over_q;
    return over_q;
  }

  KD_INLINE double far_value(double value, double, Weights weights, Rounding) const {
    return 0.5 * weights.unit * value;
  }
  KD_INLINE double far_unit(Weights weights) const { return weights.unit * weights.q; }
};

// The alpha-beta divergence, Wang et al. 2025 (ABKD), Cichocki et al. 2011:
//
//   -1/(ab) sum [p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)]
//
// With d = log p - log q and phi(x) = exp(x) - 1 - x, a term is q^(a+b) K(a, b, d) with
//   K = phi((a+b) d) / (b (a+b)) - phi(a d) / (ab),      slope = -q^(a+b) (exp(a d) - 1) / a,
// and by symmetry p^(a+b) K(b, a, -d). The larger of p and q is factored out, so that positive
// parameters never overflow. K keeps one shape in the limits at a = 0, b = 0 and a + b = 0.
struct AlphaBeta : Defaults {
  static constexpr bool kFeelsShift = true;
  static constexpr bool kSlopesCancel = true;
  static constexpr bool kHasClose = true;

  // With x = first d:
  // K = sum_phi phi((a+b) d) + first_phi phi(x) + first_product (x (exp(x) - 1) - phi(x))
  //     + square d^2
  // slope / factor = sum_expm1 (exp((a+b) d) - 1) + first_expm1 (exp(x) - 1)
  //     + linear d + linear_power d exp(x)
  struct Coefficients {
    float first;
    float sum_phi = 0, first_phi = 0, first_product = 0, square = 0;

    // K(a, b, d).
    Coefficients(float a, float b) : first(a) {
      if (a == 0 && b == 0) {
        square = 0.5f;
      } else if (a == 0) {
        sum_phi = 1 / (b * b);
      } else if (b == 0) {
        first_product = 1 / (a * a);
      } else if (a + b == 0) {
        first_phi = 1 / (a * a);
      } else {
        sum_phi = 1 / (b * (a + b));
        first_phi = -1 / (a * b);
      }
    }
  };

  float a, b;
  float of_powers, of_logarithm;  // what slopes are made of: one of them is 0
  float close_radius;  // no power is of more than kSeriesRadius there, nor any linear part left out
  Coefficients student_larger, teacher_larger;

  AlphaBeta(float a, float b)
      : a(a),
        b(b),
        of_powers(a == 0 ? 0 : 1 / a),
        of_logarithm(a == 0 ? 1 : 0),
        student_larger(a, b),
        teacher_larger(b, a) {
    const float most = fmaxf(fmaxf(fabsf(a), fabsf(b)), fabsf(a + b));
    close_radius = kSeriesRadius / fmaxf(most, kSeriesRadius);
  }

  // exp(b d) (exp(a d) - 1) / a, or its limit exp(b d) d, from exp(b d) and exp((a + b) d). Far
  // from 0 both are next to nothing beside 1, which is not to be subtracted from them.
  template <class F>
  KD_INLINE F slope_of_larger_teacher(F d, F of_b, F of_both) const {
    const F x = a * d;
    const F series = of_b * (phi_over_x(x) * x + x);
    const F powers = select(abs(x) < kSeriesRadius, series, of_both - of_b);
    return times_or_zero(splat<F>(of_powers), powers) +
           times_or_zero(splat<F>(of_logarithm), times_or_zero(of_b, d));
  }

  template <class F>
  KD_INLINE Term<F> operator()(const Point<F>& x) const {
    const auto student = x.r >= 0.0f;
    const auto pick = [&](float Coefficients::* member) {
      return select(student, splat<F>(student_larger.*member), splat<F>(teacher_larger.*member));
    };
    const F d = -abs(x.r);
    const F larger = select(student, x.log_q, x.log_p);
    const F none = splat<F>(0.0f);
    const F factor =
        select(larger < -FLT_MAX, none, a + b == 0 ? splat<F>(1.0f) : exp((a + b) * larger));
    const F first = pick(&Coefficients::first) * d;
    const auto of_sum = exponential(splat<F>(a + b) * d);
    const auto of_first = exponential(first);
    const F product = select(first > -30.0f, first * of_first.expm1 - of_first.phi, splat<F>(1.0f));
    // The linear parts of the two phi cancel; far from 0 they are left out, being infinite at last.
    const bool two_terms = a != 0 && b != 0 && a + b != 0;
    const auto far = d < (two_terms ? -1.0f : -INFINITY);
    const F value =
        times_or_zero(pick(&Coefficients::sum_phi), select(far, of_sum.expm1, of_sum.phi)) +
        times_or_zero(pick(&Coefficients::first_phi), select(far, of_first.expm1, of_first.phi)) +
        times_or_zero(pick(&Coefficients::first_product), product) +
        times_or_zero(pick(&Coefficients::square), d * d);
    const F of_larger_student = times_or_zero(splat<F>(-of_powers), of_first.expm1) -
                                times_or_zero(splat<F>(of_logarithm), d);
    // An exponent of 0 d is 0, but NaN where d is infinite.
    const F of_b = b == 0 ? splat<F>(1.0f) : exp(first);
    const F of_both = a + b == 0 ? splat<F>(1.0f) : exp(splat<F>(a + b) * d);
    const F slope = select(student, of_larger_student, slope_of_larger_teacher(d, of_b, of_both));
    return {times_or_zero(factor, value), times_or_zero(factor, slope)};
  }

  // Nothing overflows there, so either of p and q may be factored out.
  template <class F>
  KD_INLINE Term<F> close(const Point<F>& x) const {
    const Coefficients& k = student_larger;
    const F factor = exp((a + b) * x.log_q);
    const F sum = -(a + b) * x.r, first = -a * x.r;
    const F sum_phi = phi_over_x(sum) * sum, first_phi = phi_over_x(first) * first;
    const F first_expm1 = first_phi + first;
    const F value = k.sum_phi * sum_phi + k.first_phi * first_phi +
                    k.first_product * (first * first_expm1 - first_phi) + k.square * (x.r * x.r);
    return {factor * value, factor * (of_logarithm * x.r - of_powers * first_expm1)};
  }

  // Where nothing can overflow. Powers of both have errors of their own, which coefficients
  // multiply.
  KD_INLINE bool has_far() const { return a >= kLeastShare && b >= kLeastShare && a + b <= 8; }
  KD_INLINE double far_from() const {
    const float coefficient = 1 / ((a < b ? a : b) * (a + b));
    return 4 * kFarFrom * (coefficient > 1 ? coefficient : 1);
  }

  KD_INLINE double kl_from() const { return far_from(); }

  template <class F>
  KD_INLINE F far(const Point<F>& x, Weights weights, Term<F>& sums) const {
    const F log_p = x.log_p + weights.log_p, log_q = x.log_q + weights.log_q;
    const F both = exp2(a * log_p + b * log_q);
    // Not by a + b, which rounds apart from the exponents of `both`.
    const F of_p = exp2(a * log_p + b * log_p), of_q = exp2(a * log_q + b * log_q);
    const F from_q = of_q - both;
    sums.value += of_p - both;
    sums.slope += from_q;
    return from_q;
  }

  KD_INLINE double far_value(double value, double slope, Weights, Rounding) const {
    return (1 / (b * (a + b))) * value + (1 / (a * (a + b))) * slope;
  }
  KD_INLINE double far_unit(Weights) const { return 1 / a; }
};

// -sum p log q = KL(p || q) + the teacher's entropy.
struct SoftCrossEntropy : ForwardKL {
  static constexpr bool kAddsEntropy = true;
  using ForwardKL::ForwardKL;

  template <class F>
  KD_INLINE Term<F> operator()(const Point<F>& x) const {
    return {-times_or_zero(x.p, x.log_q), bregman(x.p, x.q, x.r).difference};
  }
};

// The table: X(name, struct). A kernel library expands it once; Python's table is tested against
// it.
#define KD_DIVERGENCES(X)           \
  X(forward_kl, ForwardKL)          \
  X(reverse_kl, ReverseKL)          \
  X(jsd, JSD)                       \
  X(skew_forward_kl, SkewForwardKL) \
  X(skew_reverse_kl, SkewReverseKL) \
  X(symmetric_kl, SymmetricKL)      \
  X(tvd, TVD)                       \
  X(alpha_beta, AlphaBeta)          \
  X(soft_cross_entropy, SoftCrossEntropy)

}  // namespace kd::KD_NAMESPACE
