// One shard of a row pair, whose other columns are with other processes: the sweeps of rows.h, each
// a launch of its own. Exponentials are computed again in every launch. Rows may be far only by a
// KL divergence, which needs no more sums than those of the first sweep.
#pragma once

#include <algorithm>

#include "../core/shard.h"
#include "rows.h"

namespace kd::KD_NAMESPACE {

template <class Divergence>
class ShardOfRow : RowPair<Divergence> {
  using Base = RowPair<Divergence>;
  using Base::params_, Base::row_, Base::gradient_, Base::student_, Base::teacher_, Base::kl_;
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
    KLSums kl;
    if (!read(sample_of(vocab), kl)) read(vocab, kl);
    states_[kStudentBase] = student_softmax_.reference();
    states_[kStudentSum] = student_softmax_.total();
    states_[kStudentSumAt1] = softmax_at_1_.total();
    states_[kTeacherBase] = teacher_softmax_.reference();
    states_[kTeacherSum] = teacher_softmax_.total();
    const double of_student =
        student_softmax_.exponent().correction() / student_softmax_.temperature();
    const double of_teacher =
        teacher_softmax_.exponent().correction() / teacher_softmax_.temperature();
    states_[kForwardSum] = kl.forward * of_teacher;
    states_[kReverseSum] = kl.reverse * of_student;
    states_[kEntropySum] = kl.entropy * of_teacher;
  }

  // Writes the sums, and the gradient where it does not need them.
  template <bool kGradient>
  void write_sums(bool entropies) {
    const bool far = is_far_row<Divergence>(states_);
    take_states(kGradient || !far);
    const bool valid = student_softmax_.valid() && teacher_softmax_.valid();
    for (int i = 0; i < kShardSums; ++i) sums_[i] = valid ? 0 : NAN;
    if (entropies) {
      sums_[kStudentEntropySum] = Base::entropy(student_, student_softmax_, Base::student_block_);
      sums_[kTeacherEntropySum] = Base::entropy(teacher_, teacher_softmax_, Base::teacher_block_);
    }
    if constexpr (Divergence::kIsKL)
      if (far) {
        if (kGradient) write_far_gradient();
        return;
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
    take_states(true);
    const bool of_divergence = params_.kd_weight != 0;
    const bool has_gradient =
        has_hard_label() &&
        (!of_divergence || (student_softmax_.valid() && teacher_softmax_.valid()));
    if (has_gradient && of_divergence) {
      auto sums = Base::template term_sweep<true, false>();
      sums.slope = sums_[kSlopeSum];
      Base::template gradient_sweep<false>(sums);
    } else if (has_gradient) {
      Base::hard_label_gradient();
    }
    finish(has_gradient);
  }

 private:
  // Relative to the largest of `sample` logits.
  bool read(int64_t sample, KLSums& kl) {
    kl = {};
    this->start(largest_logit(student_, sample, Base::student_block_),
                with_divergence_ ? largest_logit(teacher_, sample, Base::teacher_block_) : 0);
    const bool may_be_far = Divergence::kIsKL && params_.kd_weight != 0;
    const bool fits =
        this->push_logits(params_.labels, with_divergence_, may_be_far ? &kl : nullptr);
    if (may_be_far) {
      // The gap is relative to its shifts, that of the states relative to the bases.
      const Shifts shifts = this->gap().shifts;
      const double left = ((double)shifts.student - student_softmax_.reference()) -
                          ((double)shifts.teacher - teacher_softmax_.reference());
      kl.forward += left / teacher_softmax_.scale();
      kl.reverse += left / student_softmax_.scale();
    }
    return fits;
  }

  // The softmaxes of the whole vocabulary, and this shard's exponentials if they are needed.
  void take_states(bool exponentials) {
    this->start((float)states_[kStudentBase], (float)states_[kTeacherBase]);
    if (exponentials) this->push_logits(false, with_divergence_, nullptr);
    student_softmax_.set_total(states_[kStudentSum]);
    softmax_at_1_.set_total(states_[kStudentSumAt1]);
    teacher_softmax_.set_total(states_[kTeacherSum]);
  }

  void write_far_gradient() {
    kl_.reverse = states_[kReverseKL];
    kl_.offset = Base::gap().offset(student_softmax_, teacher_softmax_);
    const Divergence& divergence = Base::divergence_;
    if (has_hard_label())
      Base::template kl_gradient<true>(divergence.forward(), divergence.reverse());
    finish(has_hard_label());
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

inline void write_masked_shard(const ShardParams& params, const RowPlan& plan, int64_t row) {
  if (params.phase == ShardPhase::kStates)
    std::fill_n(params.states + row * kShardStates, (int)kShardStates, 0.0);
  if (params.phase == ShardPhase::kSums)
    std::fill_n(params.sums + row * kShardSums, (int)kShardSums, 0.0);
  write_masked_row(params, plan, row);
}

template <class Divergence>
void run_shard(const ShardParams& params, const RowPlan& plan, int64_t begin, int64_t end,
               int64_t next, float* scratch) {
  const Divergence divergence(params.parameters[0], params.parameters[1]);
  for (int64_t row = begin; row < end; ++row) {
    if (plan.weight[row] == 0) {
      write_masked_shard(params, plan, row);
      continue;
    }
    const bool written = params.phase == ShardPhase::kGradient &&
                         is_far_row<Divergence>(params.states + row * kShardStates);
    if (written) continue;  // with its row_scale
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
