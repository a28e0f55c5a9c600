// What every divergence is made of: points, terms, and the traits kernels ask for.
#pragma once

#include <cfloat>

#include "math.h"

namespace kd::KD_NAMESPACE {

// A row is far where its divergence exceeds this (in nats) and no logit is infinite.
constexpr double kFarFrom = 1.0 / 32;

// Infinite logits make it infinite or NaN.
KD_INLINE bool is_far(double divergence, double from) {
  return divergence > from && divergence <= FLT_MAX;
}

// Of a mixture's parts for its row to be far: the logarithm of a smaller one loses digits.
constexpr float kLeastShare = 1.0f / 16;

// One vocabulary entry: probabilities, their logarithms, and r = log q - log p computed from the
// logits' difference, so that it is accurate where p and q are close.
template <class F>
struct Point {
  F p, q, log_p, log_q, r;
};

// What goes from logits before student and teacher are compared, from those that are larger: models
// that agree may do so up to a constant, and then small differences are left, exact ones of close
// logits, since whole 64ths take no digits from most.
struct Shifts {
  float student, teacher;
};

// Given where the models' logits lie; none for those less than `least` apart, whose differences
// are exact as they are.
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

// What makes p and q of a far row's points probabilities.
struct Weights {
  float p, q;
};

// How far rounding put those and the logarithms of a far row's points off, all of them alike.
struct Rounding {
  float log_p = 0, log_q = 0;  // added to log2 p and log2 q
  float p = 0, q = 0;          // of 1, added to the sum of each
};

struct Defaults {
  // Whether it is forward() KL(p || q) + reverse() KL(q || p), and the teacher's entropy besides.
  static constexpr bool kIsKL = false;
  static constexpr bool kAddsEntropy = false;
  // Which of the two the first sweep adds up, to tell far rows or for their value.
  static constexpr bool kForward = true, kReverse = false;
  static KD_INLINE constexpr double far_from() { return kFarFrom; }
  // KL(p || q) of rows whose divergence is at most about far_from().
  static KD_INLINE constexpr double kl_from() { return kFarFrom; }
  // Whether the gradient needs no sum of slopes, and so one sweep less.
  static constexpr bool kSlopeSumsToZero = false;
  // Whether one rounding error common to all log q changes the divergence at first order, so that
  // the kernel has to take it back.
  static constexpr bool kFeelsShift = false;
  // Whether slopes have either sign and no bound: their sum tells nothing of their size.
  static constexpr bool kSlopesCancel = false;
  // Whether it has close(), for points whose |r| is below close_radius: polynomials alone, where
  // terms are a choice between those and more.
  static constexpr bool kHasClose = false;
  // Whether computing the slopes a second time costs less than keeping them.
  static constexpr bool kCheapSlope = false;
};

}  // namespace kd::KD_NAMESPACE
