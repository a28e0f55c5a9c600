// A cluster holds the whole row pair on chip: one read of student and teacher, one write of the
// gradient. From sm_90 on.
#pragma once

#include "held_row.h"
#include "run_row.h"
#include "tiles.h"

namespace kd::cuda {

// Whether slopes stay on chip between sweeps 2 and 3, since computing them again would cost more
// time than the row takes to read and write. Registers have no room for them.
template <class Divergence>
constexpr bool kKeepsSlopes = !Divergence::kSlopeSumsToZero && !Divergence::kCheapSlope;

// 16-byte vectors of each tensor that a thread holds in registers: as many as the compiler can
// place, beside what it computes with, in the 128 registers that let 512 threads share an SM.
template <class Divergence>
constexpr int kRegisterVectors = kKeepsSlopes<Divergence>                       ? 0
                                 : std::is_same_v<Divergence, TVD>              ? 8
                                 : std::is_same_v<Divergence, SoftCrossEntropy> ? 9
                                                                                : 10;

// In registers: the fewest instructions, for calls without options.
template <class Divergence, int kItem>
__global__ void __launch_bounds__(kMaxRegisterThreads)
    registers_kernel(const RowsParams<Divergence> params) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  const Team team(cluster_size(), false);
  run_row<HeldRow<kItem, Registers<kRegisterVectors<Divergence>>>, false>(
      params, team, params.first_row + cluster_index());
#endif
}

// In shared memory: loops instead of unrolled code, and room for slopes.
template <class Divergence, int kItem, bool kOptions>
__global__ void __launch_bounds__(kMaxSharedThreads, kCtasOfAnSm<Divergence>)
    shared_kernel(const RowsParams<Divergence> params) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  const Team team(cluster_size(), kOptions);
  run_row<HeldRow<kItem, Shared<kItem, kKeepsSlopes<Divergence>>>, kOptions>(
      params, team, params.first_row + cluster_index());
#endif
}

}  // namespace kd::cuda
