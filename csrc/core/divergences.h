// The divergences, each once, for the CPU and for CUDA. With teacher p and student q,
//
//   D = sum_v value(v)        dD/ds_k = (slope_k - q_k sum_v slope_v) / temperature
//
// where slope = d value / d log q up to a multiple of q, which cancels in the gradient; it is
// chosen so that slope -> 0 as q -> p and nothing cancels near the teacher. Values are >= 0.
#pragma once

#include <cfloat>

#include "math.h"

namespace kd::KD_NAMESPACE {

// One vocabulary entry: probabilities, their logarithms, and r = log q - log p computed from the
// logits' difference, so that it is accurate where p and q are close.
template <class F>
struct Point {
  F p, q, log_p, log_q, r;
};

template <class F>
struct Term {
  F value, slope;
};

struct Defaults {
  // Whether the gradient needs no sum of slopes, and so one sweep less.
  static constexpr bool kSlopeSumsToZero = false;
  // Whether one rounding error common to all log q changes the divergence at first order, so that
  // the kernel has to take it back.
  static constexpr bool kFeelsShift = false;
};

// KL(p || q). Hinton et al. 2015.
struct ForwardKL : Defaults {
  static constexpr bool kSlopeSumsToZero = true;
  ForwardKL(float, float) {}

  template <class F>
  KD_INLINE Term<F> operator()(const Point<F>& x) const {
    const auto kl = bregman(x.p, x.q, x.r);
    return {kl.excess, kl.difference};
  }
};

// KL(q || p). Gu et al. 2023 (MiniLLM).
struct ReverseKL : Defaults {
  ReverseKL(float, float) {}

  template <class F>
  KD_INLINE Term<F> operator()(const Point<F>& x) const {
    return {bregman(x.q, x.p, -x.r).excess, times_or_zero(x.q, x.r)};
  }
};

// log m - log p and log m - log q for the mixture m = share p + (1 - share) q, 0 < share < 1.
template <class F>
struct MixtureLogs {
  F over_p, over_q;
};

template <class F>
KD_INLINE MixtureLogs<F> mixture_logs(F r, float share) {
  // From the larger of p and q, so that the exponential never overflows.
  const auto p_is_larger = r <= 0.0f;
  const F weight = select(p_is_larger, splat<F>(1.0f - share), splat<F>(share));
  const F log_of_larger = log1p(weight * exponential(-abs(r)).expm1);
  return {select(p_is_larger, log_of_larger, log_of_larger + r),
          select(p_is_larger, log_of_larger - r, log_of_larger)};
}

// beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q. Agarwal et al. 2023 (GKD).
struct JSD : Defaults {
  float beta;
  JSD(float beta, float) : beta(beta) {}

  template <class F>
  KD_INLINE Term<F> operator()(const Point<F>& x) const {
    const F m = beta * x.p + (1.0f - beta) * x.q;
    const auto logs = mixture_logs(x.r, beta);
    const F value = beta * bregman(x.p, m, logs.over_p).excess +
                    (1.0f - beta) * bregman(x.q, m, logs.over_q).excess;
    return {value, (beta - 1.0f) * times_or_zero(x.q, logs.over_q)};
  }
};

// KL(p || alpha p + (1 - alpha) q). Ko et al. 2024 (DistiLLM).
struct SkewForwardKL : Defaults {
  float alpha;
  SkewForwardKL(float alpha, float) : alpha(alpha) {}

  template <class F>
  KD_INLINE Term<F> operator()(const Point<F>& x) const {
    const F m = alpha * x.p + (1.0f - alpha) * x.q;
    const F difference = bregman(x.p, x.q, x.r).difference;
    const F share = select(m == 0.0f, splat<F>(0.0f), x.q / m);
    return {bregman(x.p, m, mixture_logs(x.r, alpha).over_p).excess,
            (1.0f - alpha) * (1.0f - alpha) * share * difference};
  }
};

// KL(q || alpha q + (1 - alpha) p). Ko et al. 2024 (DistiLLM).
struct SkewReverseKL : Defaults {
  float alpha;
  SkewReverseKL(float alpha, float) : alpha(alpha) {}

  template <class F>
  KD_INLINE Term<F> operator()(const Point<F>& x) const {
    const F m = alpha * x.q + (1.0f - alpha) * x.p;
    const F difference = bregman(x.p, x.q, x.r).difference;
    const F share = select(m == 0.0f, splat<F>(0.0f), x.q / m);
    const F over_q = mixture_logs(x.r, 1.0f - alpha).over_q;
    return {bregman(x.q, m, over_q).excess,
            -times_or_zero(x.q, over_q) - alpha * (1.0f - alpha) * share * difference};
  }
};

// weight KL(p || q) + (1 - weight) KL(q || p), 0 < weight < 1. Jeffreys 1946.
struct SymmetricKL : Defaults {
  float weight;
  SymmetricKL(float weight, float) : weight(weight) {}

  template <class F>
  KD_INLINE Term<F> operator()(const Point<F>& x) const {
    const auto forward = bregman(x.p, x.q, x.r);
    const auto reverse = bregman(x.q, x.p, -x.r);
    return {weight * forward.excess + (1.0f - weight) * reverse.excess,
            weight * forward.difference + (1.0f - weight) * times_or_zero(x.q, x.r)};
  }
};

// Total variation, sum |p - q| / 2; slope 0 where p = q. Wen et al. 2023.
struct TVD : Defaults {
  TVD(float, float) {}

  template <class F>
  KD_INLINE Term<F> operator()(const Point<F>& x) const {
    const F difference = bregman(x.p, x.q, x.r).difference;
    const F half = 0.5f * x.q;
    const F zero = splat<F>(0.0f);
    return {0.5f * abs(difference),
            select(difference > 0.0f, half, select(difference < 0.0f, -half, zero))};
  }
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

  // With x = first d:
  // K = sum_phi phi((a+b) d) + first_phi phi(x) + first_product (x (exp(x) - 1) - phi(x))
  //     + square d^2
  // slope / factor = sum_expm1 (exp((a+b) d) - 1) + first_expm1 (exp(x) - 1)
  //     + linear d + linear_product d (exp(x) - 1)
  struct Coefficients {
    float first;
    float sum_phi = 0, first_phi = 0, first_product = 0, square = 0;
    float sum_expm1 = 0, first_expm1 = 0, linear = 0, linear_product = 0;

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
  Coefficients student_larger, teacher_larger;

  AlphaBeta(float a, float b) : a(a), b(b), student_larger(a, b), teacher_larger(b, a) {
    if (a != 0) {
      student_larger.first_expm1 = -1 / a;
      teacher_larger.sum_expm1 = 1 / a;
      teacher_larger.first_expm1 = -1 / a;
    } else {
      student_larger.linear = -1;
      teacher_larger.linear = 1;
      teacher_larger.linear_product = 1;
    }
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
    const F slope = times_or_zero(pick(&Coefficients::sum_expm1), of_sum.expm1) +
                    times_or_zero(pick(&Coefficients::first_expm1), of_first.expm1) +
                    times_or_zero(pick(&Coefficients::linear), d) +
                    times_or_zero(pick(&Coefficients::linear_product), d * of_first.expm1);
    return {times_or_zero(factor, value), times_or_zero(factor, slope)};
  }
};

// -sum p log q.
struct SoftCrossEntropy : Defaults {
  static constexpr bool kSlopeSumsToZero = true;
  SoftCrossEntropy(float, float) {}

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
