// The running softmax of a row: the largest logit and the sum of exp((x - max) / temperature).
// One merge serves lanes, blocks, threads, clusters and ranks.
#pragma once

#include <cfloat>

#include "math.h"

namespace kd::KD_NAMESPACE {

// Where a maximum starts. Finite, so that a row of -inf needs no guard against -inf - (-inf) and
// its sum stays 0; small enough that it can be divided by a temperature. Lower logits, such as the
// lowest float as padding, work like -inf.
constexpr float kLowestLogit = -1e30f;

// Sum is double where it is free (CPU) and float elsewhere.
template <class Sum>
struct SoftmaxState {
  float max = kLowestLogit;
  Sum sum = 0;

  KD_INLINE void merge(const SoftmaxState& other, float inverse_temperature) {
    if (other.max > max) {
      sum *= exp((max - other.max) * inverse_temperature);
      max = other.max;
      sum += other.sum;
    } else {
      sum += other.sum * exp((other.max - max) * inverse_temperature);
    }
  }

  // False for a row that is all -inf or holds NaN or +inf: it has no softmax.
  KD_INLINE bool valid() const { return sum > 0 && sum <= FLT_MAX; }
};

}  // namespace kd::KD_NAMESPACE
