// The kernels of csrc/cuda against the oracle: every tile the chooser can return, every option,
// hostile logits, several orders of threads.
#include <array>

#include "rows_case.h"

namespace kd::tests {

namespace {

struct Parameters {
  const char* divergence;
  std::vector<std::array<double, 2>> values;
};
// Those of tests/cases.py; 0, 0 where a divergence has none.
const Parameters kParameters[] = {
    {"jsd", {weights(0.5), weights(0.1), weights(0.9)}},
    {"skew_forward_kl", {weights(0.1), weights(0.9)}},
    {"skew_reverse_kl", {weights(0.1), weights(0.9)}},
    {"symmetric_kl", {weights(0.5), weights(0.3)}},
    {"alpha_beta",
     {{0.2f, 0.7f},
      {0.5f, 0.5f},
      {1, 1},
      {2, 0.5f},
      {0, 0},
      {0, 0.7f},
      {0.7f, 0},
      {0.5f, -0.5f},
      {-0.5f, 0.5f},
      {-0.3f, 0.8f},
      {0.8f, -0.3f},
      {-0.3f, 0},
      {-0.2f, -0.3f}}},
};

std::vector<std::array<double, 2>> parameters_of_divergence() {
  for (const Parameters& known : kParameters)
    if (std::string(known.divergence) == kDivergenceName) return known.values;
  return {{0, 0}};
}

cuda::Problem problem_of(const Case& c) {
  LogitsParams params;
  float metrics;
  params.vocab = c.vocab;
  params.student.dtype = c.student;
  params.teacher.dtype = c.teacher;
  params.student_transform = c.student_transform;
  params.teacher_transform = c.teacher_transform;
  params.kd_weight = c.kd_weight;
  params.ce_weight = c.ce_weight;
  const int64_t label = 0;
  if (c.labels) params.labels = &label;
  if (c.metrics) params.metrics = &metrics;
  return tests::problem_of(params);
}

// The tiles the chooser can return for calls like this one, on devices with clusters and without,
// each with the largest vocabulary that it is chosen for.
struct TileUse {
  cuda::Tile tile;
  int64_t largest;
};
std::vector<TileUse> tiles_of(const Case& c) {
  constexpr int64_t kVocabularies = 1 << 22;
  std::vector<TileUse> uses;
  for (const int compute_capability : {9, 8}) {
    const auto tile_of = [&](int64_t vocab) {
      cuda::Problem problem = problem_of(c);
      problem.vocab = vocab;
      return choose(problem, compute_capability);
    };
    const auto same = [](const cuda::Tile& x, const cuda::Tile& y) {
      return x.kernel == y.kernel && x.cluster == y.cluster && x.threads == y.threads &&
             x.ahead == y.ahead;
    };
    for (int64_t vocab = 1; vocab < kVocabularies;) {
      const cuda::Tile tile = tile_of(vocab);
      int64_t largest = vocab, beyond = kVocabularies;
      while (beyond - largest > 1) {
        const int64_t middle = (largest + beyond) / 2;
        (same(tile_of(middle), tile) ? largest : beyond) = middle;
      }
      bool known = false;
      for (TileUse& use : uses) known |= same(use.tile, tile);
      if (!known) uses.push_back({tile, largest});
      vocab = largest + 1;
    }
  }
  return uses;
}

// Every tile: a row of one column, some that leave threads without, one with a full vector for
// every thread and some columns over, and the largest that the chooser has it for.
void check_tiles(Case c, bool largest) {
  std::printf("%s, %d bytes%s:", kDivergenceName, (int)item_size(c.student),
              c.metrics ? " with options" : "");
  const auto uses = tiles_of(c);
  for (const int cluster : cuda::kClusters) {
    bool used = false;
    for (const TileUse& use : uses) used |= use.tile.cluster == cluster;
    expect(used, "no vocabulary for which the chooser returns clusters of %d", cluster);
  }
  for (const TileUse& use : uses) {
    std::printf(" %s", describe_tile(use.tile).c_str());
    const int threads = use.tile.cluster * use.tile.threads;
    if (kThreadSanitizer && threads > 2048) continue;  // it has 8128, and is slow
    c.tile = use.tile;
    for (const int vocab : {1, 5, 37, threads * 8 + 5}) {
      c.rows = threads > 1024 ? 1 : 3;
      c.vocab = vocab;
      check(c);
    }
    if (!largest || use.tile.kernel == cuda::Kernel::kStreaming) continue;
    c.rows = 1;
    c.vocab = (int)use.largest;
    c.tile = {};
    check(c);
  }
  std::printf("\n");
}

// Whether float32 can give the divergence and its gradient where a probability of one model alone
// is 0 or nearly so: powers of small probabilities magnify every rounding.
bool bounded(const Case& c) {
  return std::string(kDivergenceName) != "alpha_beta" ||
         (c.parameters[0] > 0 && c.parameters[1] > 0);
}

// Options drawn at random.
Case mixture(std::array<double, 2> parameters, uint64_t seed) {
  std::mt19937_64 generator(seed);
  const auto below = [&](int n) { return (int)(generator() % n); };
  const auto maybe = [&](int one_in) { return below(one_in) == 0; };
  const auto one_of = [&](std::initializer_list<float> values) {
    return values.begin()[below((int)values.size())];
  };
  Case c;
  c.first_seed = seed;
  std::copy_n(parameters.begin(), 2, c.parameters);
  c.rows = 3 + below(3);
  // Not fewer: the largest error that PTX allows one exponential would be that of the whole row.
  c.vocab = (int)one_of({16, 20, 33, 127, 300, 517, 1100});
  c.student = (DType)below(3);
  c.teacher = maybe(4) ? (DType)below(3) : c.student;
  if (maybe(3)) c.student_padding = below(9);
  if (maybe(3)) c.teacher_padding = maybe(2) ? c.student_padding : below(9);
  if (maybe(2)) c.misaligned[0] = c.misaligned[1] = c.misaligned[2] = below(8);
  if (maybe(4)) c.misaligned[below(3)] = below(8);
  if (maybe(3)) c.inner_size = 1 + below(3);
  c.gradient = !maybe(5);
  c.in_place = c.gradient && maybe(3);
  c.metrics = maybe(4);
  c.temperature = one_of({1, 1, 0.8f, 2});
  if (maybe(3)) c.weights = true;
  if (maybe(3)) c.normalizer = 7.5f;
  c.mean = maybe(3);
  if (maybe(4)) c.kd_weight = one_of({0.5f, -2, 0});
  if (maybe(3)) {
    c.labels = true;
    c.ce_weight = one_of({0, 0.3f, 1});
  }
  if (maybe(5)) c.student_transform.scale = 0.8f;
  if (maybe(5)) c.teacher_transform.scale = 1.2f;
  if (maybe(5)) c.student_transform.softcap = 4;
  if (maybe(5)) c.teacher_transform.softcap = 5;
  // Any tile that holds the row; whole numbers of threads are the business of check_tiles.
  do {
    c.tile = {(cuda::Kernel)below(3), cuda::kClusters[below(5)], 32 << below(2)};
    if (c.tile.kernel == cuda::Kernel::kStreaming)
      c.tile.cluster = 1;
    else
      c.tile.ahead = maybe(2);
  } while (!holds(problem_of(c), c.tile));
  return c;
}

void check_divergence() {
  const auto variants = parameters_of_divergence();
  Case plain;
  std::copy_n(variants[0].begin(), 2, plain.parameters);
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16})
    for (const bool metrics : {false, true}) {
      Case c = plain;
      c.student = c.teacher = dtype;
      c.metrics = metrics;
      c.weights = metrics;
      check_tiles(c, !metrics);
    }

  using cuda::Kernel;
  for (const auto& variant : variants)
    for (const Logits logits :
         {Logits::kCorrelated, Logits::kClose, Logits::kBorder, Logits::kIdentical, Logits::kHuge,
          Logits::kHostile, Logits::kClimbing})
      for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16})
        for (const cuda::Tile tile : {cuda::Tile{Kernel::kStreaming, 1, 64},
                                      {Kernel::kRegisters, 4, 64},
                                      {Kernel::kShared, 1, 64},
                                      {Kernel::kShared, 4, 64}}) {
          Case c = plain;
          std::copy_n(variant.begin(), 2, c.parameters);
          c.logits = logits;
          c.student = c.teacher = dtype;
          c.tile = tile;
          // All kinds of rows that a case has.
          const bool eight = c.logits == Logits::kBorder || c.logits == Logits::kClimbing;
          c.rows = c.logits == Logits::kHostile ? 10 : eight ? 8 : 4;
          c.vocab = 517;
          if (!holds(problem_of(c), tile)) continue;
          if (bounded(c) || (logits != Logits::kHostile && logits != Logits::kHuge)) check(c);
        }
  for (const auto& variant : variants)
    for (const int vocab : {1, 2, 5, 7}) {
      Case c = plain;
      std::copy_n(variant.begin(), 2, c.parameters);
      c.rows = 40;
      c.vocab = vocab;
      c.tile = {Kernel::kShared, 1, 32};
      check(c);
    }
  // At 0.17 a shift that did not begin at that of the lowest logit would become infinite.
  for (const float temperature : {0.17f, 100.0f}) {
    Case c = plain;
    c.logits = Logits::kClimbing;
    c.temperature = temperature;
    c.rows = 6;
    c.vocab = 5170;
    if (bounded(c)) check(c);
  }
  for (int i = 0; i < 50; ++i) {
    Case c = mixture(variants[i % variants.size()], 1000 * kDivergenceIndex + i);
    c.seeds = 3;
    check(c);
  }
}

}  // namespace
}  // namespace kd::tests

int main() {
  kd::tests::check_divergence();
  std::printf("%s: %d checks\n", kd::tests::kDivergenceName, kd::tests::checks);
  return kd::tests::finish();
}
