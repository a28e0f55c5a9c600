// What the columns that a process holds of a sharded vocabulary add to a row pair's sums, and their
// gradient, given the softmax states of the whole vocabulary. The algorithm is that of row_pair.h,
// cut where the processes add up; rows may be far by a KL divergence alone, whose value the states
// have.
#pragma once

#include "launch.h"
#include "run_row.h"
#include "shard_states.cuh"
#include "streaming.cuh"

#include "../core/shard.h"

namespace kd::cuda {

template <class Divergence>
struct ShardLaunch : RowsParams<Divergence> {
  const double* states;
  double* sums;
  bool entropies;

  explicit ShardLaunch(const ShardParams& params)
      : RowsParams<Divergence>(params),
        states(params.states),
        sums(params.sums),
        entropies(params.entropies) {}
};

template <class Divergence>
class ShardPair : RowPair<Divergence, StreamingRow, true> {
  using Base = RowPair<Divergence, StreamingRow, true>;
  using Base::largest_slope_;
  using Base::params_;
  using Base::probabilities;
  using Base::row_;
  using Base::student;
  using Base::teacher;
  using Base::team_;

 public:
  KD_DEVICE ShardPair(const ShardLaunch<Divergence>& params, const Team& team, StreamingRow& row,
                      int64_t index)
      : Base(params, team, row, index),
        states_(params.states + index * kShardStates),
        sums_(params.sums + index * kShardSums) {
    if (threadIdx.x == 0) summarize();
    __syncthreads();
    this->set_scales();
  }

  // Writes the sums, and the gradient where it does not need them.
  KD_DEVICE void write_sums(bool with_entropies) {
    Entropies entropies;  // first: the gradient may overwrite the student
    if (with_entropies) entropies = this->entropies();
    const bool both_valid = student().valid() && teacher().valid();
    const bool gradient_is_nan = !both_valid || hard_label_is_nan();
    const bool far = is_far_row<Divergence>(states_);
    const bool with_gradient = row_.gradient && (far || Divergence::kSlopeSumsToZero);
    TermSums sums{NAN, NAN, NAN};
    if (far) {
      sums = {};
      if constexpr (Divergence::kIsKL)
        if (with_gradient && !gradient_is_nan) this->kl_gradient();
    } else if (both_valid) {
      sums = this->term_sweep(probabilities(), with_gradient && !gradient_is_nan);
    }
    if (with_gradient) finish_row(gradient_is_nan);
    if (threadIdx.x != 0) return;
    sums_[kValueSum] = sums.value;
    sums_[kSlopeSum] = sums.slope;
    sums_[kShiftSum] = sums.shift;
    sums_[kLargestSlope] = largest_slope_;
    sums_[kStudentEntropySum] = -entropies.student;
    sums_[kTeacherEntropySum] = -entropies.teacher;
  }

  // Of the hard-label term alone where slopes sum to 0, or the divergence has no weight.
  KD_DEVICE void write_gradient() {
    constexpr bool kNeedsSum = !Divergence::kSlopeSumsToZero;
    const bool of_divergence = kNeedsSum && params_.kd_weight != 0;
    const bool gradient_is_nan =
        (of_divergence && !(student().valid() && teacher().valid())) || hard_label_is_nan();
    if (!gradient_is_nan) {
      if (!of_divergence) {
        this->hard_label_gradient();
      } else if constexpr (kNeedsSum) {
        largest_slope_ = (float)sums_[kLargestSlope];
        this->gradient_sweep(probabilities(), sums_[kSlopeSum]);
      }
    }
    finish_row(gradient_is_nan);
  }

 private:
  // Fills in what the first sweep would find out.
  KD_DEVICE void summarize() const {
    auto& all = team_.template summary<RowSummary<Divergence>>();
    const double temperature = params_.temperature, base = states_[kStudentBase];
    PairState pair;
    pair.student = state_from(base, states_[kStudentSum], temperature, params_.c);
    pair.teacher = state_from(states_[kTeacherBase], states_[kTeacherSum], temperature, params_.c);
    all.student = pair.student, all.teacher = pair.teacher;
    all.student_at_1 = state_from(base, states_[kStudentSumAt1], 1, kLog2E);
    all.scale = this->scale();
    all.inverse_at_1 = reciprocal(all.student_at_1.sum);
    all.label = this->label();
    if constexpr (Divergence::kIsKL) {
      if (!is_far_row<Divergence>(states_)) return;
      KL kl(params_.term, pair, params_.c);
      kl.reverse = states_[kReverseKL] * kBitsPerNat;
      all.of_far = KLGradient(params_.c, pair, kl, params_.term.forward(), params_.term.reverse());
    }
  }

  KD_DEVICE bool hard_label_is_nan() const {
    return this->ce_scale_ != 0 && !this->state_at_1().valid();
  }

  KD_DEVICE void finish_row(bool gradient_is_nan) const {
    if (gradient_is_nan) this->fill_vocab_with_nan();
    this->clear_padding();
    if (threadIdx.x == 0) this->write_row_scale();
  }

  const double* const states_;
  double* const sums_;
};

KD_DEVICE void write_masked_shard(const LaunchParams& params, const Team& team, int64_t row) {
  clear_gradient(params, team, row);
  if (threadIdx.x == 0 && params.row_scale) params.row_scale[row] = 0;
}

template <class Divergence>
__global__ void __launch_bounds__(kMaxShardThreads, kCtasOfAnSm<Divergence>)
    shard_sums_kernel(const ShardLaunch<Divergence> params) {
  const Team team(1, true);
  const int64_t index = params.first_row + blockIdx.x;
  StreamingRow row(params, team, index);
  if (params.token_weight[index] != 0)
    return ShardPair<Divergence>(params, team, row, index).write_sums(params.entropies);
  write_masked_shard(params, team, index);
  if (threadIdx.x < kShardSums) params.sums[index * kShardSums + threadIdx.x] = 0;
}

template <class Divergence>
__global__ void __launch_bounds__(kMaxShardThreads, kCtasOfAnSm<Divergence>)
    shard_gradient_kernel(const ShardLaunch<Divergence> params) {
  const Team team(1, true);
  const int64_t index = params.first_row + blockIdx.x;
  if (is_far_row<Divergence>(params.states + index * kShardStates)) return;  // it is written
  StreamingRow row(params, team, index);
  if (params.token_weight[index] == 0) return write_masked_shard(params, team, index);
  ShardPair<Divergence>(params, team, row, index).write_gradient();
}

template <class Divergence>
void run_shard(ShardParams call, void* stream) {
  if (call.phase == ShardPhase::kStates) return run_shard_states<Divergence>(call, stream);
  const bool far_rows = Divergence::kIsKL && call.kd_weight != 0;
  if (!far_rows && !writes_gradient(call)) {
    call.gradient = {};
    call.row_scale = nullptr;
  }
  const auto kernel = call.phase == ShardPhase::kSums ? shard_sums_kernel<Divergence>
                                                      : shard_gradient_kernel<Divergence>;
  const unsigned threads = streaming_threads(call.vocab);
  const size_t shared_bytes = slots_bytes(threads / 32, true);
  ShardLaunch<Divergence> params(call);
  launch_in_parts(params, call.rows, [&](int64_t rows) {
    launch(kernel, Grid{(unsigned)rows, threads, 1, shared_bytes}, stream, params);
  });
}

}  // namespace kd::cuda
