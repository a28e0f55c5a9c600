// Softmax states of the columns that a process holds of a sharded vocabulary: one CTA for a row
// pair, which it reads once.
#pragma once

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

__global__ void __launch_bounds__(kMaxStreamingThreads, 3)
    shard_states_kernel(const ShardStatesLaunch params) {
  const Team team(1);
  const int64_t index = params.first_row + blockIdx.x;
  double* const states = params.states + index * kShardStates;
  StreamingRow row(params, team, index);
  if (params.token_weight[index] == 0) {
    if (threadIdx.x < kShardStates) states[threadIdx.x] = 0;
    return;
  }
  row.reads_teacher = params.reads_teacher;
  const bool apart = params.labels && params.temperature != 1;
  Running<Sum> student(params.c), teacher(params.c), at_1(kLog2E);
  row.for_each([&](const auto&, auto& s, auto& t) {
    apply(params.student_transform, s);
    student.push(s);
    if (apart) at_1.push(s);
    if (!params.reads_teacher) return;
    apply(params.teacher_transform, t);
    teacher.push(t);
  });
  merge_in_cta(team, student.state(), params.c, [&](const State& all) {
    const double sum = sum_from_max(all, params.c);
    states[kStudentBase] = all.max;
    states[kStudentSum] = sum;
    if (!apart) states[kStudentSumAt1] = params.labels ? sum : 0;
  });
  if (apart)
    merge_in_cta(team, at_1.state(), kLog2E,
                 [&](const State& all) { states[kStudentSumAt1] = sum_from_max(all, kLog2E); });
  merge_in_cta(team, teacher.state(), params.c, [&](const State& all) {
    states[kTeacherBase] = all.max;
    states[kTeacherSum] = sum_from_max(all, params.c);
  });
}

inline void run_shard_states(ShardParams call, void* stream) {
  call.gradient = {};
  const unsigned threads = streaming_tile(call.vocab).threads;
  ShardStatesLaunch params(call);
  launch_in_parts(params, call.rows, [&](int64_t rows) {
    launch(shard_states_kernel, Grid{(unsigned)rows, threads, 1, sizeof(State) * (threads / 32)},
           stream, params);
  });
}

}  // namespace kd::cuda
