// Softmax states of the columns that a process holds of a sharded vocabulary, and the sums of a KL
// divergence: one CTA for a row pair, which it reads once.
#pragma once

#include <type_traits>

#include "launch.h"
#include "shard_states.h"
#include "streaming.cuh"

namespace kd::cuda {

struct ShardStatesLaunch : LaunchParams {
  double* states;
  bool reads_teacher;
  float c;  // log2(e) / temperature

  explicit ShardStatesLaunch(const ShardParams& params)
      : LaunchParams(params),
        states(params.states),
        reads_teacher(params.kd_weight != 0 || params.entropies),
        c((float)(kBitsPerNat / params.temperature)) {}
};

// Stands for a divergence that is no KL divergence: states have no sums for it.
struct NoSums {
  static constexpr bool kForward = false, kReverse = false, kAddsEntropy = false;
};
template <class Divergence>
using SumsOf = std::conditional_t<Divergence::kIsKL, Divergence, NoSums>;

template <class Divergence>
__global__ void __launch_bounds__(kMaxShardThreads, 3)
    shard_states_kernel(const ShardStatesLaunch params) {
  const Team team(1, true);
  const int64_t index = params.first_row + blockIdx.x;
  double* const states = params.states + index * kShardStates;
  StreamingRow row(params, team, index);
  if (params.token_weight[index] == 0) {
    if (threadIdx.x < kShardStates) states[threadIdx.x] = 0;
    return;
  }
  row.reads_teacher = params.reads_teacher;
  const bool apart = params.labels && params.temperature != 1;
  RunningPair<SumsOf<Divergence>, Sum> pair(params.c);
  Running<Sum> at_1(kLog2E);
  row.for_each([&](const auto&, auto& s, auto& t) {
    apply(params.student_transform, s);
    if (apart) at_1.push(s);
    if (!params.reads_teacher) return pair.student.push(s);
    apply(params.teacher_transform, t);
    pair.push(s, t);
  });
  if (apart)
    merge_in_cta(team, warp_merge(at_1.state(), kLog2E), kLog2E,
                 [&](const State& all) { states[kStudentSumAt1] = sum_from_max(all, kLog2E); });
  const PairState of_warp = warp_merge<SumsOf<Divergence>>(pair.state(), params.c);
  merge_in_cta(team, of_warp, params.c, [&](const PairState& all) {
    const KLSums sums = sums_from_max(all, params.c);
    states[kStudentBase] = all.student.max;
    states[kStudentSum] = sum_from_max(all.student, params.c);
    if (!apart) states[kStudentSumAt1] = params.labels ? states[kStudentSum] : 0;
    states[kTeacherBase] = all.teacher.max;
    states[kTeacherSum] = sum_from_max(all.teacher, params.c);
    states[kForwardSum] = sums.forward;
    states[kReverseSum] = sums.reverse;
    states[kEntropySum] = sums.entropy;
  });
}

template <class Divergence>
void run_shard_states(ShardParams call, void* stream) {
  call.gradient = {};
  const unsigned threads = streaming_threads(call.vocab);
  ShardStatesLaunch params(call);
  launch_in_parts(params, call.rows, [&](int64_t rows) {
    launch(shard_states_kernel<Divergence>,
           Grid{(unsigned)rows, threads, 1, sizeof(PairState) * (threads / 32)}, stream, params);
  });
}

}  // namespace kd::cuda
