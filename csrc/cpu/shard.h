// One shard of a row pair, whose other columns are with other processes: the sweeps of rows.h, each
// a launch of its own. Exponentials are computed again in every launch, and no row is far.
#pragma once

#include <algorithm>

#include "rows.h"

namespace kd::KD_NAMESPACE {

template <class Divergence>
class ShardOfRow : RowPair<Divergence> {
  using Base = RowPair<Divergence>;
  using Base::params_, Base::row_, Base::gradient_, Base::student_, Base::teacher_;
  using Base::student_softmax_, Base::teacher_softmax_, Base::softmax_at_1_;

 public:
  ShardOfRow(const ShardParams& params, const RowPlan& plan, const Divergence& divergence,
             int64_t row, int64_t next, float* scratch)
      : Base(params, plan, divergence, row, next, scratch),
        states_(params.states + row * kShardStates),
        sums_(params.sums + row * kShardSums),
        with_divergence_(params.kd_weight != 0 || params.entropies) {}

  void write_states() {
    const int64_t vocab = params_.vocab;
    if (!read(sample_of(vocab))) read(vocab);
    states_[kStudentBase] = student_softmax_.reference();
    states_[kStudentSum] = student_softmax_.total();
    states_[kStudentSumAt1] = softmax_at_1_.total();
    states_[kTeacherBase] = teacher_softmax_.reference();
    states_[kTeacherSum] = teacher_softmax_.total();
  }

  // And the gradient where it needs no sums.
  template <bool kGradient>
  void write_sums(bool entropies) {
    take_states();
    const bool valid = student_softmax_.valid() && teacher_softmax_.valid();
    for (int i = 0; i < kShardSums; ++i) sums_[i] = valid ? 0 : NAN;
    if (entropies) {
      sums_[kStudentEntropySum] = Base::entropy(student_, student_softmax_, Base::student_block_);
      sums_[kTeacherEntropySum] = Base::entropy(teacher_, teacher_softmax_, Base::teacher_block_);
    }
    if (valid) {
      const auto sums = Base::template term_sweep<kGradient, false>();
      sums_[kValueSum] = sums.value;
      sums_[kSlopeSum] = sums.slope;
      sums_[kShiftSum] = sums.shift;
      sums_[kLargestSlope] = sums.largest;
    }
    if (kGradient && Divergence::kSlopeSumsToZero) finish(valid && has_hard_label());
  }

  void write_gradient() {
    take_states();
    const bool of_divergence = params_.kd_weight != 0;
    const bool has_gradient =
        has_hard_label() &&
        (!of_divergence || (student_softmax_.valid() && teacher_softmax_.valid()));
    if (has_gradient && of_divergence) {
      auto sums = Base::template term_sweep<true, false>();
      sums.slope = sums_[kSlopeSum];
      Base::gradient_sweep(sums);
    } else if (has_gradient) {
      Base::hard_label_gradient();
    }
    finish(has_gradient);
  }

 private:
  // Relative to the largest of `sample` logits.
  bool read(int64_t sample) {
    this->start(largest_logit(student_, sample, Base::student_block_),
                with_divergence_ ? largest_logit(teacher_, sample, Base::teacher_block_) : 0);
    return this->push_logits(params_.labels, with_divergence_, nullptr);
  }

  // The softmaxes of the whole vocabulary, and this shard's exponentials.
  void take_states() {
    this->start((float)states_[kStudentBase], (float)states_[kTeacherBase]);
    this->push_logits(false, with_divergence_, nullptr);
    student_softmax_.set_total(states_[kStudentSum]);
    softmax_at_1_.set_total(states_[kStudentSumAt1]);
    teacher_softmax_.set_total(states_[kTeacherSum]);
  }

  bool has_hard_label() const { return Base::ce_scale_ == 0 || softmax_at_1_.valid(); }

  void finish(bool has_gradient) const {
    if (!has_gradient) gradient_.fill(0, params_.vocab, NAN);
    gradient_.fill(params_.vocab, gradient_.width(), 0);
  }

  double* const states_;
  double* const sums_;
  const bool with_divergence_;
};

inline void write_masked_shard(const ShardParams& params, int64_t row) {
  if (params.phase == ShardPhase::kStates)
    std::fill_n(params.states + row * kShardStates, (int)kShardStates, 0.0);
  if (params.phase == ShardPhase::kSums)
    std::fill_n(params.sums + row * kShardSums, (int)kShardSums, 0.0);
  write_masked_row(params, row);
}

template <class Divergence>
void run_shard(const ShardParams& params, const RowPlan& plan, int64_t begin, int64_t end,
               int64_t next, float* scratch) {
  const Divergence divergence(params.parameters[0], params.parameters[1]);
  for (int64_t row = begin; row < end; ++row) {
    if (plan.weight[row] == 0) {
      write_masked_shard(params, row);
      continue;
    }
    const int64_t after = row + 1 < end ? row + 1 : next;
    ShardOfRow<Divergence> shard(params, plan, divergence, row, after, scratch);
    if (params.phase == ShardPhase::kStates)
      shard.write_states();
    else if (params.phase == ShardPhase::kGradient)
      shard.write_gradient();
    else if (params.gradient.data && params.kd_weight != 0)
      shard.template write_sums<true>(params.entropies);
    else
      shard.template write_sums<false>(params.entropies);
  }
  if (plan.streams) fence();
}

}  // namespace kd::KD_NAMESPACE
