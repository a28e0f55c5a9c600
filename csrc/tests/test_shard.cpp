// The kernels of a sharded vocabulary, against the oracle of the whole row.
#include "emulator.h"

#include <array>

#include "shard_case.h"

namespace kd::tests {
namespace {

void check_shards(const ShardCase& c) {
  const std::string description = describe(c), divergence = c.entry->name;
  emulator::options = {c.first_seed, description.c_str()};
  Matrix student(c.student, c.rows, c.vocab, 0, 0), teacher(c.teacher, c.rows, c.vocab, 0, 0);
  std::vector<float> weights(c.rows, 1), metrics(1);
  std::vector<int64_t> labels(c.rows);
  for (int row = 0; row < c.rows; ++row) {
    labels[row] = (row * 71 + c.vocab - 1) % c.vocab;
    if (c.weights) weights[row] = row % 3 == 1 ? 0 : 0.1f + row;
  }
  ShardParams params;
  params.rows = c.rows;
  params.student = student.layout, params.teacher = teacher.layout;
  params.vocab = c.vocab;
  params.divergence = (int)(c.entry - kEntries);
  std::copy_n(c.parameters, 2, params.parameters);
  params.temperature = c.temperature;
  params.student_transform = c.student_transform;
  params.teacher_transform = c.teacher_transform;
  params.kd_weight = c.kd_weight;
  params.ce_weight = c.ce_weight;
  params.token_weight = weights.data();
  params.entropies = c.metrics;
  if (c.labels) params.labels = labels.data();

  fill(c, student, teacher);
  const std::vector<int> cuts = cuts_of(c.vocab, c.shards);
  for (int row = 0; row < c.rows && c.hidden >= 0; ++row)
    for (int i = cuts[c.hidden]; i < cuts[c.hidden + 1]; ++i) {
      if (row % 3 != 1) student.set(row, i, -kInf);
      if (row % 3 != 2) teacher.set(row, i, -kInf);
    }
  if (divergence == "tvd" && c.logits != Logits::kIdentical) part_ties(params, student);
  std::vector<Expected> expected;
  {
    LogitsParams whole = params;
    if (c.metrics) whole.metrics = metrics.data();
    for (int row = 0; row < c.rows; ++row)
      expected.push_back(oracle(whole, divergence, row, weights[row], 1));
  }
  if (c.logits == Logits::kIdentical)  // exactly: float64 rounds here
    for (Expected& e : expected) std::fill(e.gradient.begin(), e.gradient.end(), 0);

  std::vector<std::unique_ptr<Shard>> shards;
  std::vector<std::string> students, teachers, gradients;
  for (int i = 0; i < c.shards; ++i) {
    shards.push_back(std::make_unique<Shard>(c, cuts[i], cuts[i + 1]));
    Shard& shard = *shards.back();
    for (int row = 0; row < c.rows; ++row) {
      const int64_t label = labels[row] - shard.begin;
      shard.labels[row] = label >= 0 && label < shard.vocab ? label : -1 - row;
      for (int column = 0; column < shard.vocab; ++column) {
        shard.student.set(row, column, student.get(row, shard.begin + column));
        shard.teacher.set(row, column, teacher.get(row, shard.begin + column));
      }
    }
    students.push_back(shard.student.bytes());
    teachers.push_back(shard.teacher.bytes());
    gradients.push_back(shard.gradient.bytes());
  }

  const auto run_phase = [&](ShardPhase phase, Shard& shard) {
    ShardParams mine = params;
    mine.phase = phase;
    mine.vocab = shard.vocab;
    mine.student = shard.student.layout, mine.teacher = shard.teacher.layout;
    if (c.gradient) mine.gradient = c.in_place ? shard.student.layout : shard.gradient.layout;
    if (c.gradient && c.student == DType::kFloat16) {
      mine.gradient_scale = 4096;
      mine.row_scale = shard.row_scale.data();
    }
    if (c.labels) mine.labels = shard.labels.data();
    mine.states = shard.states.data();
    mine.sums = shard.sums.data();
    c.entry->run(mine, nullptr);
    shard.wrote_gradient |= cuda::writes_gradient(mine);
  };
  std::vector<double> far;  // see merge_states
  const auto run = [&](uint64_t seed) {
    emulator::options.seed = seed;
    std::string bits;
    const auto add = [&](const auto& output) {
      bits.append((const char*)output.data(), output.size() * sizeof output[0]);
    };
    for (int i = 0; i < c.shards; ++i) {
      shards[i]->student.restore(students[i]);
      shards[i]->gradient.restore(gradients[i]);
      shards[i]->wrote_gradient = false;
      run_phase(ShardPhase::kStates, *shards[i]);
      add(shards[i]->states);
    }
    far = merge_states(c, shards);
    if (c.kd_weight != 0 || c.metrics) {
      for (auto& shard : shards) {
        run_phase(ShardPhase::kSums, *shard);
        expect(shard->wrote_gradient == (c.gradient && c.kd_weight != 0 && c.entry->writes_in_sums),
               "wrote a gradient among the sums, or did not");
        add(shard->sums);
      }
      add_sums(c, shards);
    }
    for (auto& shard : shards) {
      if (c.gradient && !shard->wrote_gradient) run_phase(ShardPhase::kGradient, *shard);
      bits += c.in_place ? shard->student.bytes() : shard->gradient.bytes();
      add(shard->row_scale);
    }
    return bits;
  };
  const std::string bits = run(c.first_seed);

  Comparison losses("the loss"), slopes("the gradient"), metric("a metric");
  const auto& tolerance = loss_tolerance(divergence);
  for (int row = 0; row < c.rows; ++row) {
    Expected& e = expected[row];
    const double* const states = shards[0]->states.data() + row * kShardStates;
    const double* const sums = shards[0]->sums.data() + row * kShardSums;
    double value = sums[kValueSum];
    if (c.entry->feels_shift && std::fabs(sums[kSlopeSum]) <= FLT_MAX)
      value -= sums[kShiftSum] * sums[kSlopeSum];
    if (value < 0) value = 0;
    if (!std::isnan(far[row])) {
      expect(value == 0, "a far row has sums");
      value = far[row];
    }
    double loss = c.kd_weight == 0 ? 0 : c.kd_weight * value;
    if (c.ce_weight != 0 && c.labels) {
      const RowLogits logits(params.student, params.student_transform, row, c.vocab);
      double sum = states[kStudentSumAt1];
      if (!(sum > 0 && sum <= FLT_MAX)) sum = kNaN;
      loss +=
          c.ce_weight * (states[kStudentBase] + std::log(sum) - logits.transformed[labels[row]]);
    }
    const bool poisoned = c.poisoned && row == 0;
    if (poisoned) {
      e.loss = kNaN;
      std::fill_n(e.gradient.begin(), c.vocab, kNaN);
      std::fill_n(e.metrics, (int)kMetrics, kNaN);
    }
    if (weights[row] == 0) {
      for (const auto& shard : shards) {
        for (int i = 0; i < kShardSums && (c.kd_weight != 0 || c.metrics); ++i)
          expect(shard->sums[row * kShardSums + i] == 0, "a masked row has sums");
        expect(
            c.poisoned || c.base_shift != 0 || shard->states[row * kShardStates + kStudentSum] == 0,
            "a masked row has states");
      }
    } else {
      losses.value(weights[row] * loss, e.loss, tolerance, weights[row], row);
    }
    if (c.logits == Logits::kIdentical && divergence != "soft_cross_entropy" && !c.labels)
      expect(loss >= 0 && loss < IDENTICAL_LOSS, "the loss is %g", loss);
    if (c.metrics) {
      metric.value(value, e.metrics[kDivergence], tolerance, 1, row);
      metric.value(std::max(sums[kStudentEntropySum], 0.0), e.metrics[kStudentEntropy], METRIC, 1,
                   row);
      metric.value(std::max(sums[kTeacherEntropySum], 0.0), e.metrics[kTeacherEntropy], METRIC, 1,
                   row);
    }
    double largest = 0;
    for (const double x : e.gradient)
      if (!(std::fabs(x) <= largest)) largest = x == x ? std::fabs(x) : kInf;
    // Two certain models: no gradient but the rounding of probabilities of 1.
    const bool certain = weights[row] != 0 && c.logits != Logits::kIdentical && largest < 1e-30;
    const double rounding = ROUNDING_OF_1 * std::fabs(weights[row] * c.kd_weight) /
                            std::min(1.0, (double)c.temperature);
    for (const auto& shard : shards) {
      const Matrix& result = c.in_place ? shard->student : shard->gradient;
      const double scale = c.student == DType::kFloat16 ? shard->row_scale[row] : 1;
      for (int i = 0; i < shard->vocab + c.student_padding && c.gradient; ++i) {
        const double actual = result.get(row, i) * scale;
        if (i >= shard->vocab || largest == 0)
          expect(std::fabs(actual) <= (certain && i < shard->vocab ? rounding : 0),
                 "the gradient at (%d, %d + %d) is %g, expected 0", row, shard->begin, i, actual);
        if (!certain && i < shard->vocab)
          slopes.element(actual, e.gradient[shard->begin + i], row, shard->begin + i);
      }
    }
  }
  if (c.gradient) {
    const double relative = c.student == DType::kBFloat16  ? BFLOAT16_GRADIENT
                            : c.student == DType::kFloat16 ? FLOAT16_GRADIENT
                            : c.logits == Logits::kClose || c.logits == Logits::kBorder
                                ? CLOSE_GRADIENT
                                : tolerance[0];
    slopes.finish(relative, c.student == DType::kFloat16 ? FLOAT16_SUBNORMAL : 0);
  }
  for (int i = 0; i < c.shards; ++i) {
    const Shard& shard = *shards[i];
    const bool in_student = c.gradient && c.in_place, in_gradient = c.gradient && !c.in_place;
    expect(shard.teacher.bytes() == teachers[i], "the teacher was written to");
    expect(in_student ? shard.student.only_rows_differ(students[i])
                      : shard.student.bytes() == students[i],
           "the student was written to");
    expect(in_gradient ? shard.gradient.only_rows_differ(gradients[i])
                       : shard.gradient.bytes() == gradients[i],
           "the gradient was written to between its rows");
  }
  for (int seed = 1; seed < c.seeds; ++seed)
    expect(run(c.first_seed + seed) == bits, "other bits than with another order of threads");
}

std::vector<std::array<double, 2>> parameters_of(const std::string& divergence) {
  if (divergence == "jsd") return {weights(0.5), weights(0.1)};
  if (divergence == "skew_forward_kl" || divergence == "skew_reverse_kl") return {weights(0.1)};
  if (divergence == "symmetric_kl") return {weights(0.3)};
  if (divergence == "alpha_beta")
    return {{0.2f, 0.7f}, {2, 0.5f}, {0, 0}, {0, 0.7f}, {0.7f, 0}, {-0.5f, 0.5f}, {0.8f, -0.3f}};
  return {{0, 0}};
}

// As in test_rows.cpp.
bool bounded(const ShardCase& c) {
  return std::string(c.entry->name) != "alpha_beta" || (c.parameters[0] > 0 && c.parameters[1] > 0);
}

// Options drawn at random.
ShardCase mixture(ShardCase c, uint64_t seed) {
  std::mt19937_64 generator(seed);
  const auto below = [&](int n) { return (int)(generator() % n); };
  const auto maybe = [&](int one_in) { return below(one_in) == 0; };
  const auto one_of = [&](std::initializer_list<float> values) {
    return values.begin()[below((int)values.size())];
  };
  c.first_seed = seed;
  c.rows = 3 + below(3);
  c.vocab = (int)one_of({33, 127, 300, 517, 1100, 4300});
  c.shards = (int)one_of({1, 2, 3, 5});
  if (maybe(4) && c.shards > 1 && bounded(c)) c.hidden = below(c.shards);
  c.student = (DType)below(3);
  c.teacher = maybe(2) ? (DType)below(3) : c.student;
  if (maybe(3)) c.student_padding = below(9);
  if (maybe(3)) c.teacher_padding = below(9);
  if (maybe(2)) c.misaligned[0] = c.misaligned[1] = c.misaligned[2] = below(8);
  if (maybe(4)) c.misaligned[below(3)] = below(8);
  if (maybe(3)) c.inner_size = 1 + below(3);
  c.gradient = !maybe(5);
  c.in_place = c.gradient && maybe(3);
  c.metrics = maybe(3);
  c.temperature = one_of({1, 1, 0.8f, 2});
  c.weights = maybe(2);
  if (maybe(3)) c.kd_weight = one_of({0.5f, -2, 0});
  if (maybe(2)) {
    c.labels = true;
    c.ce_weight = one_of({0, 0.3f, 1});
  }
  if (maybe(5)) c.student_transform.scale = 0.8f;
  if (maybe(5)) c.teacher_transform.scale = 1.2f;
  if (maybe(4)) c.student_transform.softcap = 4;
  if (maybe(4)) c.teacher_transform.softcap = 5;
  if (maybe(4)) c.base_shift = one_of({0.3f, 6, -5, 90});
  return c;
}

void check_divergence(const Entry& entry) {
  ShardCase plain;
  plain.entry = &entry;
  const auto variants = parameters_of(entry.name);
  for (const auto& variant : variants) {
    std::copy_n(variant.begin(), 2, plain.parameters);
    for (const Logits logits :
         {Logits::kCorrelated, Logits::kClose, Logits::kBorder, Logits::kIdentical, Logits::kHuge,
          Logits::kHostile, Logits::kClimbing})
      for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
        ShardCase c = plain;
        c.logits = logits;
        c.student = c.teacher = dtype;
        c.shards = dtype == DType::kFloat32 ? 3 : dtype == DType::kBFloat16 ? 2 : 5;
        const bool eight = c.logits == Logits::kBorder || c.logits == Logits::kClimbing;
        c.rows = c.logits == Logits::kHostile ? 10 : eight ? 8 : 4;
        c.vocab = 517;
        if (!bounded(c) && (logits == Logits::kHostile || logits == Logits::kHuge)) continue;
        check_shards(c);
        if (logits != Logits::kHostile) continue;
        c.labels = c.in_place = c.metrics = true;
        c.ce_weight = 1;
        check_shards(c);
      }
  }
  std::copy_n(variants[0].begin(), 2, plain.parameters);
  for (const float kd_weight : {1, 0})
    for (const int hidden : {0, 1, 2}) {
      ShardCase c = plain;
      c.kd_weight = kd_weight;
      c.hidden = hidden;
      c.labels = c.poisoned = true;
      c.ce_weight = 0.5f;
      c.temperature = 2;
      check_shards(c);
    }
  for (const int shards : {2, 3, 5}) {  // of one column each
    ShardCase c = plain;
    c.rows = 20;
    c.vocab = c.shards = shards;
    check_shards(c);
  }
  for (int i = 0; i < 50; ++i) {
    std::copy_n(variants[i % variants.size()].begin(), 2, plain.parameters);
    ShardCase c = mixture(plain, 1000 * (&entry - kEntries) + i);
    c.seeds = 2;
    check_shards(c);
  }
}

// A few cases, for .ci/check_emulator as in test_fault.cpp.
void check_faulty() {
  for (const Entry* entry : {kEntries, kEntries + 1}) {
    ShardCase c;
    c.entry = entry;
    c.first_seed = emulator::options.seed;
    c.vocab = 301;
    check_shards(c);
    c.student = c.teacher = DType::kBFloat16;
    c.labels = c.metrics = true;
    c.ce_weight = 1;
    c.temperature = 2;
    c.shards = 1;
    c.vocab = 2100;  // of eight warps, whose slots for both merges overlap
    check_shards(c);
  }
}

}  // namespace
}  // namespace kd::tests

int main(int count, char** arguments) {
  if (count > 1) {
    const char* const message = count > 2 && *arguments[2] ? arguments[2] : nullptr;
    kd::tests::expect_caught(arguments[1], message, 20, 5, kd::tests::check_faulty);
    return kd::tests::finish();
  }
  for (const auto& entry : kd::tests::kEntries) kd::tests::check_divergence(entry);
  std::printf("%d checks\n", kd::tests::checks);
  return kd::tests::finish();
}
