// Softmax states as the processes of a sharded vocabulary tell each other: relative to
// exp(base / T), where State's are relative to a power of two.
#pragma once

#include "pair.h"
#include "tiles.h"

namespace kd::cuda {

// A state's sum relative to exp(max / T); 0 where all logits are -inf.
KD_DEVICE double sum_from_max(const State& state, float c) {
  return state.sum == 0 ? 0 : state.corrected_sum(c) * ::exp2(-state.excess(c));
}

// The sums of a KL divergence likewise, in nats.
KD_DEVICE KLSums sums_from_max(const PairState& pair, float c) {
  const State &student = pair.student, &teacher = pair.teacher;
  const double s_factor = kNatsPerBit * (sum_from_max(student, c) / student.sum);
  const double t_factor = kNatsPerBit * (sum_from_max(teacher, c) / teacher.sum);
  const double s_excess = student.excess(c), t_excess = teacher.excess(c);
  return {(pair.sums.forward - teacher.sum * (s_excess - t_excess)) * t_factor,
          (pair.sums.reverse - student.sum * (s_excess - t_excess)) * s_factor,
          (pair.sums.entropy - teacher.sum * t_excess) * t_factor};
}

// Any base will do. An invalid sum gives an invalid state.
KD_DEVICE State state_from(double base, double sum, double temperature, float c) {
  State state{kLowestLogit, sum};
  if (!state.valid()) return state;
  if (sum < 0.5 || sum > (double)kMaxVocab) {  // far from the largest logit
    base += ::log(sum) * temperature;
    sum = 1;
  }
  state.max = (float)base;
  state.sum = sum * ::exp2(base * c - state.shift(c));
  state.sum -= state.corrected_sum(c) - state.sum;
  return state;
}

}  // namespace kd::cuda
