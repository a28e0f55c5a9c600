// The first sweep over a row pair: softmax states of student and teacher (and at T = 1 for the
// hard-label term) and how far the row is from its teacher, merged over the team. One warp of a CTA
// merges, and computes for the others what depends on the row alone.
#pragma once

#include <type_traits>

#include "columns.h"
#include "probabilities.h"
#include "rows_params.h"

namespace kd::cuda {

template <class Divergence>
using OfFarRow = std::conditional_t<Divergence::kIsKL, KLGradient, FarRow>;

template <class Divergence>
struct alignas(16) RowSummary {
  State student, teacher, student_at_1;
  OfFarRow<Divergence> of_far;
  float scale = 0;
  // Of the hard-label term: neither in double nor from the device's memory for each vector.
  float inverse_at_1 = 0;
  int label = -1;
  // Not bool: a copy of the padding would go through memory.
  int agree = 0;          // on the top token
  int far = 0;            // see csrc/core/divergences.h
  double divergence = 0;  // by a KL divergence
};

// Matters also where labels only say which rows take part.
KD_DEVICE bool is_label_in_range(const LaunchParams& params, int64_t row) {
  return !params.labels || (params.labels[row] >= 0 && params.labels[row] < params.vocab);
}

// Otherwise nothing asks for the teacher's logits.
template <bool kOptions>
KD_DEVICE bool uses_divergence(const LaunchParams& params) {
  return !kOptions || params.kd_weight != 0 || params.metrics;
}

template <class Divergence, class Row, bool kOptions>
class RowStates {
 public:
  KD_DEVICE RowStates(const RowsParams<Divergence>& params, const Team& team, Row& row,
                      int64_t index)
      : params_(params), team_(team), row_(row), index_(index) {}

 protected:
  KD_DEVICE float weight() const {
    return params_.token_weight ? params_.token_weight[index_] : 1.0f;
  }
  KD_DEVICE float inverse_normalizer() const {
    return reciprocal((params_.normalizer ? *params_.normalizer : 1.0) * params_.divisor);
  }

  // What the gradient of a term of weight 1 is multiplied by.
  KD_DEVICE float scale() const {
    return params_.row_scale ? params_.gradient_scale : weight() * inverse_normalizer();
  }

  // -1 where it is no column of these, or nobody asks.
  KD_DEVICE int label() const {
    const bool asked = kOptions && params_.labels && is_label_in_range(params_, index_);
    return asked ? (int)params_.labels[index_] : -1;
  }

  KD_DEVICE bool uses_divergence() const { return cuda::uses_divergence<kOptions>(params_); }
  KD_DEVICE bool uses_cross_entropy() const {
    return kOptions && params_.labels && (params_.ce_weight != 0 || params_.metrics);
  }
  // Whether the hard-label term needs a state of its own.
  KD_DEVICE bool apart() const { return uses_cross_entropy() && params_.temperature != 1; }

  KD_DEVICE const RowSummary<Divergence>& summary() const {
    return team_.template summary<RowSummary<Divergence>>();
  }
  KD_DEVICE const State& student() const { return summary().student; }
  KD_DEVICE const State& teacher() const { return summary().teacher; }

  KD_DEVICE void read_states(float label_logit) {
    RunningPair<Divergence, typename Row::Total> pair(params_.c);
    Running<Sum> at_1(kLog2E);
    Tops tops;
    constexpr bool kMaxFirst = Row::kHeld && !kOptions;
    if constexpr (kMaxFirst) {
      const auto largest = row_.largest();
      pair.student.rise(largest.student);
      pair.teacher.rise(largest.teacher);
      row_.for_each([&](const auto&, auto& s, auto& t) { pair.add(s, t); });
    } else {
      const auto read_student = [&](const auto& place, auto& s) {
        if constexpr (kOptions) {
          if (params_.metrics) tops.student.push(s, place);
          apply(params_.student_transform, s);
          if (apart()) at_1.push(s);
        }
      };
      if (uses_divergence())
        row_.for_each([&](const auto& place, auto& s, auto& t) {
          read_student(place, s);
          if constexpr (kOptions) {
            if (params_.metrics) tops.teacher.push(t, place);
            apply(params_.teacher_transform, t);
          }
          pair.push(s, t);
        });
      else
        row_.for_each_of_student([&](const auto& place, auto& s) {
          read_student(place, s);
          pair.student.push(s);
        });
    }

    team_.wait_until_all_entered();
    WarpStates mine{warp_merge<Divergence>(pair.state(), params_.c), {}, {}};
    if constexpr (kOptions) {
      if (apart()) mine.student_at_1 = warp_merge(at_1.state(), kLog2E);
      if (params_.metrics) mine.tops = warp_tops(tops);
      // Nobody else needs it. But whoever has been told may overwrite this logit, so its load has
      // to be over by then, in the lanes that tell nobody or others too.
      mine.pair.label_logit = label_logit;
      __syncwarp();
      team_.tell(kOfStates, team_.mine().states, mine);
    } else {
      team_.tell(kOfStates, team_.mine().states.pair, mine.pair);
    }
    float scale = 0;
    int label = 0;
    if (team_.in_first_warp()) {  // from memory, while others are waited for
      scale = this->scale();
      label = this->label();
    }
    team_.meet();
    if (team_.in_first_warp()) summarize(scale, label);
    __syncthreads();
  }

 private:
  // For all warps of the CTA.
  KD_DEVICE void summarize(float scale, int label) {
    team_.wait_for(kOfStates);
    PairState pair;
    State at_1;
    Tops tops;
    // First the largest logits of all, so that no slot waits for another one's arithmetic.
    team_.for_slots([&](const WarpSlot& slot) { pair.see(slot.states.pair); });
    pair = warp_maxima(pair);
    team_.for_slots([&](const WarpSlot& slot) {
      pair.add(slot.states.pair, params_.c);
      if constexpr (kOptions) {
        if (apart()) at_1.merge(slot.states.student_at_1, kLog2E);
        if (params_.metrics) tops.merge(slot.states.tops);
      }
    });
    pair = warp_sums<Divergence>(pair);
    RowSummary<Divergence> all;
    all.student = pair.student, all.teacher = pair.teacher;
    if constexpr (kOptions) {
      all.student_at_1 = apart() ? warp_merge(at_1, kLog2E) : all.student;
      all.inverse_at_1 = reciprocal(all.student_at_1.sum);
      all.label = label;
      if (params_.metrics) {
        tops = warp_tops(tops);
        all.agree = tops.student.column == tops.teacher.column;
      }
    }
    all.scale = scale;

    const KL kl(params_.term, pair, params_.c);
    if constexpr (Divergence::kIsKL) {
      const float forward = params_.term.forward(), reverse = params_.term.reverse();
      all.divergence = ((Divergence::kForward ? forward * kl.forward : 0) +
                        (Divergence::kReverse ? reverse * kl.reverse : 0)) *
                       kNatsPerBit;
      all.far = is_far(all.divergence, params_.term.far_from());
      if constexpr (Divergence::kAddsEntropy) all.divergence += kl.entropy * kNatsPerBit;
      all.of_far = KLGradient(params_.c, pair, kl, forward, reverse);
    } else {
      all.far = params_.term.has_far() && is_far(kl.forward * kNatsPerBit, params_.term.kl_from());
      all.of_far = FarRow(params_.c, pair, kl);
    }
    if (team_.lane == 0) team_.template summary<RowSummary<Divergence>>() = all;
  }

 protected:
  const RowsParams<Divergence>& params_;
  const Team& team_;
  Row& row_;
  const int64_t index_;
};

}  // namespace kd::cuda
