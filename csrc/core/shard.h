// Which launch of a shard of the vocabulary writes its gradient, of which rows.
#pragma once

#include "divergences.h"
#include "params.h"

namespace kd::KD_NAMESPACE {

// Whether a row is far, by the states of the whole vocabulary.
template <class Divergence>
KD_INLINE bool is_far_row(const double* states) {
  return Divergence::kIsKL && states[kReverseKL] == states[kReverseKL];
}

// Whether this launch writes the gradient of all rows that have none yet.
inline bool writes_gradient(const ShardParams& params) {
#define KD_SLOPE_SUMS_TO_ZERO(name, Divergence) Divergence::kSlopeSumsToZero,
  constexpr bool kSlopeSumsToZero[] = {KD_DIVERGENCES(KD_SLOPE_SUMS_TO_ZERO)};
#undef KD_SLOPE_SUMS_TO_ZERO
  if (!params.gradient.data || params.phase == ShardPhase::kStates) return false;
  return params.phase == ShardPhase::kGradient ||
         (params.kd_weight != 0 && kSlopeSumsToZero[params.divergence]);
}

}  // namespace kd::KD_NAMESPACE
