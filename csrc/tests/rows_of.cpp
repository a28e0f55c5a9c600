#include "emulator.h"

#include "../cuda/rows.cuh"

#include <tuple>

#include "rows_of.h"

namespace kd::tests {
namespace {

#define KD_NAME(name, Divergence) #name,
#define KD_STRUCT(name, Divergence) cuda::Divergence,
constexpr const char* kNames[] = {KD_DIVERGENCES(KD_NAME)};

constexpr bool same(const char* x, const char* y) {
  while (*x && *x == *y) ++x, ++y;
  return *x == *y;
}
constexpr int index_of(const char* name) {
  int index = 0;
  while (!same(kNames[index], name)) ++index;
  return index;
}

constexpr int kIndex = index_of(KD_DIVERGENCE);
using Divergence = std::tuple_element_t<kIndex, std::tuple<KD_DIVERGENCES(KD_STRUCT) void>>;

constexpr cuda::Device kH100{9, 0, 227 << 10, 132, 50 << 20};
// The rows in flight are so few that a case has later ones.
constexpr cuda::Device kOneOfItsSms{9, 0, 227 << 10, 1, 50 << 20};

}  // namespace

const char* const kDivergenceName = kNames[kIndex];
const int kDivergenceIndex = kIndex;

void run_rows(const LogitsParams& params, std::optional<cuda::Tile> forced) {
  cuda::run_rows<Divergence>(params, kOneOfItsSms, forced, nullptr);
}

cuda::Problem problem_of(const LogitsParams& params) {
  return cuda::problem_of<Divergence>(params);
}

cuda::Tile choose(const cuda::Problem& problem, int compute_capability) {
  cuda::Device device = kH100;
  device.major = compute_capability;
  return cuda::choose(problem, device);
}

bool holds(const cuda::Problem& problem, const cuda::Tile& tile) {
  return cuda::holds(problem, tile, kH100);
}

int64_t rows_in_flight(const LogitsParams& params, const cuda::Tile& tile) {
  const cuda::Problem problem = problem_of(params);
  return cuda::clusters_at_once(cuda::kernel_of<Divergence>(problem, tile.kernel),
                                cuda::grid_of(problem, tile, 1));
}

}  // namespace kd::tests
