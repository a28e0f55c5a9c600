// The running softmax of a row: the largest logit and the sum of exp((x - max) / temperature).
// One merge serves lanes, blocks, threads, clusters and ranks.
#pragma once

#include <cfloat>

#include "math.h"

namespace kd::KD_NAMESPACE {

// Sum is double where it is free (CPU) and float elsewhere.
template <class Sum>
struct SoftmaxState {
  // Finite, so that a row of -inf needs no guard against -inf - (-inf): its sum stays 0.
  float max = -FLT_MAX;
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
