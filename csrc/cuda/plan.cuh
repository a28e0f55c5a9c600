// What a call does once: weights and normalizer before its rows, and what their losses come to. One
// CTA each, so that a sum has one order; all rows' numbers are a fraction of what one row reads.
#pragma once

#include "softmax.h"

namespace kd::cuda {

constexpr int kPlanThreads = 1024;
constexpr size_t kPlanSharedBytes = kPlanThreads / 32 * sizeof(double);

// Over the only CTA; for its first warp.
KD_DEVICE double cta_sum(double mine) {
  double* const of_warps = shared_memory<double>();
  mine = warp_sum(mine);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = mine;
  __syncthreads();
  return warp_sum(threadIdx.x < blockDim.x / 32 ? of_warps[threadIdx.x] : 0.0);
}

struct WeightsLaunch {
  int64_t rows;
  const int64_t* labels;      // (rows,) or null
  int64_t ignore_index;       // the label of rows that take no part
  const float* token_weight;  // (rows,) or null: 1
  float* weight;              // (rows,), out, or null
  float* normalizer;          // (), out: their sum, or 1 where nothing takes part
};

__global__ void __launch_bounds__(kPlanThreads) weights_kernel(const WeightsLaunch params) {
  double sum = 0;
  for (int64_t row = threadIdx.x; row < params.rows; row += blockDim.x) {
    float weight = params.token_weight ? params.token_weight[row] : 1.0f;
    if (params.labels && params.labels[row] == params.ignore_index) weight = 0;
    if (params.weight) params.weight[row] = weight;
    sum += weight;
  }
  sum = cta_sum(sum);
  if (threadIdx.x == 0) *params.normalizer = (float)(sum <= 0 ? 1 : sum);
}

struct TotalLaunch {
  int64_t rows;
  const float* losses;      // (rows,)
  const float* normalizer;  // () or null: 1
  float divisor;
  float* loss;  // (), out
};

__global__ void __launch_bounds__(kPlanThreads) total_kernel(const TotalLaunch params) {
  double sum = 0;
  for (int64_t row = threadIdx.x; row < params.rows; row += blockDim.x) sum += params.losses[row];
  sum = cta_sum(sum);
  if (threadIdx.x != 0) return;
  const double normalizer = params.normalizer ? *params.normalizer : 1;
  *params.loss = (float)(sum / (normalizer * params.divisor));
}

}  // namespace kd::cuda
