// What a call does once, before its rows and after them: weights, normalizer, the loss of all rows.
#include "harness.h"

#include "../cuda/plan.cuh"

#include <cmath>
#include <vector>

namespace kd::tests {
namespace {

void check_plan(int rows, unsigned threads, bool labels, bool weights) {
  const std::string label = std::to_string(rows) + " rows, " + std::to_string(threads) + " threads";
  emulator::options = {(uint64_t)rows + threads, label.c_str()};
  const cuda::Grid grid{1, threads, 1, cuda::kPlanSharedBytes};
  std::vector<int64_t> label_of(rows);
  std::vector<float> given(rows), weight(rows, NAN);
  double sum = 0;
  std::vector<float> expected(rows, 1);
  for (int row = 0; row < rows; ++row) {
    label_of[row] = row % 3 ? row : -100;
    given[row] = 0.25f * (row % 7);
    if (weights) expected[row] = given[row];
    if (labels && row % 3 == 0) expected[row] = 0;
    sum += expected[row];
  }
  float normalizer = NAN, loss = NAN;
  cuda::launch(cuda::weights_kernel, grid, nullptr,
               cuda::WeightsLaunch{rows, labels ? label_of.data() : nullptr, -100,
                                   weights ? given.data() : nullptr, weight.data(), &normalizer});
  expect(weight == expected, "the weights are others");
  expect(normalizer == (sum > 0 ? (float)sum : 1), "the normalizer is %g of %g", normalizer, sum);
  for (const float* by : {(const float*)nullptr, (const float*)&normalizer}) {
    cuda::launch(cuda::total_kernel, grid, nullptr,
                 cuda::TotalLaunch{rows, expected.data(), by, 8, &loss});
    expect(loss == (float)(sum / (by ? normalizer * 8.0 : 8)), "the loss is %g", loss);
  }
}

}  // namespace
}  // namespace kd::tests

int main() {
  for (const int rows : {0, 1, 31, 33, 100, 1000})
    for (const unsigned threads : {32u, 96u, (unsigned)kd::cuda::kPlanThreads})
      for (const bool labels : {false, true})
        for (const bool weights : {false, true})
          kd::tests::check_plan(rows, threads, labels, weights);
  return kd::tests::finish();
}
