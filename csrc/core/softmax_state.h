// What the softmax states of all kernels agree on: a state is a base, at least kLowestLogit, and
// the sum of exponentials relative to it.
#pragma once

#include <cfloat>

#include "base.h"

namespace kd::KD_NAMESPACE {

// Where a maximum starts. Finite, so that a row of -inf needs no guard against -inf - (-inf) and
// its sum stays 0; small enough that it can be divided by a temperature. Lower logits, such as the
// lowest float as padding, work like -inf.
constexpr float kLowestLogit = -1e30f;

// False of a row that is all -inf or holds NaN or +inf: it has no softmax.
KD_INLINE bool is_valid_sum(double sum) { return sum > 0 && sum <= FLT_MAX; }

}  // namespace kd::KD_NAMESPACE
