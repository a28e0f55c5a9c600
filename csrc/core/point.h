// What every divergence is made of: points, terms, and the traits kernels ask for.
#pragma once

#include <cfloat>

#include "math.h"

namespace kd::KD_NAMESPACE {

// A row is far where its divergence exceeds this (in nats) and no logit is infinite.
constexpr double kFarFrom = 1.0 / 32;

// Infinite logits make the divergence infinite or NaN: such a row is not far.
KD_INLINE bool is_far(double divergence, double from) {
  return divergence > from && divergence <= FLT_MAX;
}

// The smallest share of a mixture, and parameter of alpha-beta, whose rows may be far: below it the
// formulas for far rows lose digits.
constexpr float kLeastShare = 1.0f / 16;

// One vocabulary entry: probabilities, their logarithms, and r = log q - log p computed from the
// logits' difference, so that it is accurate where p and q are close. Of a far row p and q are
// exponentials, and the logarithms those of these, to base 2.
template <class F>
struct Point {
  F p, q, log_p, log_q, r;
};

// Shifts subtracted from the logits of the model with the larger ones. Close models may differ by a
// constant; removing it in steps of 1/64 leaves most logits exact, so small differences keep their
// digits.
struct Shifts {
  float student, teacher;
};

// From a number near each model's logits, such as the largest. No shift where these are less than
// `least` apart: then the differences of logits are exact as they are.
KD_INLINE Shifts shifts_between(float student, float teacher, float least) {
  constexpr float kGrid = 1.5f * (1 << 17);  // floats about it are spaced by 1/64
  const float apart = student - teacher;
  const float shift = fabsf(apart) >= least ? (apart + kGrid) - kGrid : 0;
  return fabsf(student) > fabsf(teacher) ? Shifts{shift, 0} : Shifts{0, -shift};
}

template <class F>
struct Term {
  F value, slope;
};

// What makes the exponentials of a far row probabilities: times `p` and `q`, and times `unit`, one
// over the teacher's sum.
struct Weights {
  float p, q;
  float unit;
  float log_p, log_q;  // added to the logarithms to base 2
  float offset;        // added to r
};

// What rounding of a far row's weights has in common for all points.
struct Rounding {
  float p = 0, q = 0;  // by which the sums of p and of q exceed 1
  double offset = 0;   // exactly what log2 q - log2 p is more than of the exponentials
};

struct Defaults {
  // Whether it is forward() KL(p || q) + reverse() KL(q || p), and the teacher's entropy besides.
  static constexpr bool kIsKL = false;
  static constexpr bool kAddsEntropy = false;
  // Which of the two the first sweep adds up, to tell far rows or for their value.
  static constexpr bool kForward = true, kReverse = false;
  static KD_INLINE constexpr double far_from() { return kFarFrom; }
  // A row whose KL(p || q) is at most this has a divergence of at most about far_from().
  static KD_INLINE constexpr double kl_from() { return kFarFrom; }
  // Whether the gradient needs no sum of slopes, and so one sweep less.
  static constexpr bool kSlopeSumsToZero = false;
  // Whether one rounding error common to all log q changes the divergence at first order, so that
  // the kernel has to take it back.
  static constexpr bool kFeelsShift = false;
  // Whether slopes have either sign and no bound: their sum tells nothing of their size.
  static constexpr bool kSlopesCancel = false;
  // Whether it has close(): cheaper terms, polynomials alone, for points whose |r| is below
  // close_radius.
  static constexpr bool kHasClose = false;
  // Whether computing the slopes a second time costs less than keeping them.
  static constexpr bool kCheapSlope = false;
  // Whether what far() returns is still to be multiplied by q.
  static constexpr bool kFarOverQ = false;
};

}  // namespace kd::KD_NAMESPACE
