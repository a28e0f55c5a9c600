// One call of the row kernels: its inputs in memory of exactly their size, its outputs poisoned,
// and the comparison with the oracle.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <random>
#include <sstream>

#include "fetched.h"
#include "harness.h"
#include "oracle.h"
#include "rows_of.h"
#include "tolerances.h"

namespace kd::tests {

enum class Logits {
  kCorrelated,  // as in training
  kClose,       // KL of about 1e-4
  kBorder,      // KL between 0.01 and 0.1, about where formulas change
  kIdentical,
  kHuge,      // 1e4 and more, shifts between the models
  kHostile,   // -inf, NaN and +inf in one model or both
  kClimbing,  // maxima that move along the row
};
constexpr const char* kLogitsNames[] = {"correlated", "close",   "border",  "identical",
                                        "huge",       "hostile", "climbing"};

inline std::string describe_tile(const cuda::Tile& tile) {
  const char* const names[] = {"registers:", "shared:", "streaming:"};
  return names[(int)tile.kernel] + std::to_string(tile.cluster) + 'x' +
         std::to_string(tile.threads) + (tile.ahead ? "+ahead" : "");
}

struct Case {
  double parameters[2] = {0, 0};
  Logits logits = Logits::kCorrelated;
  int rows = 3, vocab = 100;
  DType student = DType::kFloat32, teacher = DType::kFloat32;
  int student_padding = 0, teacher_padding = 0;  // columns beyond the vocabulary
  int misaligned[3] = {0, 0, 0};                 // elements that student, teacher, gradient lie off
  int inner_size = 0;                            // rows at two strides; 0: at one
  bool gradient = true, in_place = false, metrics = false, labels = false;
  float temperature = 1, kd_weight = 1, ce_weight = 0;
  Transform student_transform, teacher_transform;
  bool weights = false;  // of the rows, one of them 0
  float normalizer = 0;  // 0: none
  bool mean = false;     // over all rows, where there is no normalizer
  cuda::Tile tile;       // without threads: the chooser's
  uint64_t first_seed = 0;
  int seeds = 1;  // with the same bits from each

  std::string describe() const {
    std::ostringstream text;
    const char* const dtypes[] = {"float32", "bfloat16", "float16"};
    text << kDivergenceName << '(' << parameters[0] << ", " << parameters[1] << ") "
         << kLogitsNames[(int)logits] << " rows " << rows << " vocab " << vocab << '+'
         << student_padding << '/' << teacher_padding << ' ' << dtypes[(int)student] << '/'
         << dtypes[(int)teacher] << " off " << misaligned[0] << ',' << misaligned[1] << ','
         << misaligned[2] << " inner " << inner_size
         << (!gradient  ? " loss only"
             : in_place ? " in place"
                        : "")
         << (metrics ? " metrics" : "") << (labels ? " labels" : "") << (weights ? " weights" : "")
         << " T " << temperature << " kd " << kd_weight << " ce " << ce_weight << " scale "
         << student_transform.scale << '/' << teacher_transform.scale << " cap "
         << student_transform.softcap << '/' << teacher_transform.softcap << ' '
         << describe_tile(tile);
    return text.str();
  }
};

// Rows in memory that ends where the last row does. Between rows lie columns that nobody may read
// (NaN) or write.
class Matrix {
 public:
  Matrix(DType dtype, int rows, int width, int misaligned, int inner_size) : rows_(rows) {
    const int gap = inner_size ? 5 : 0;
    layout.dtype = dtype;
    layout.width = width;
    layout.inner_size = inner_size ? inner_size : rows + 1;
    layout.inner_stride = width + gap;
    layout.outer_stride = layout.inner_size * layout.inner_stride + 3 * gap;
    const Rows origin = layout;
    const int64_t item = item_size(dtype), last = origin.row(rows - 1) - origin.row(0);
    bytes_ = misaligned * item + last + width * item;
    void* memory;
    if (posix_memalign(&memory, 64, bytes_)) std::abort();
    memory_.reset((char*)memory);
    std::memset(memory_.get(), 0xff, bytes_);
    layout.data = memory_.get() + misaligned * item;
  }

  void set(int row, int column, double x) {
    char* const to = layout.row(row);
    const float value = (float)x;
    if (layout.dtype == DType::kFloat32)
      ((float*)to)[column] = value;
    else
      ((uint16_t*)to)[column] =
          (uint16_t)(layout.dtype == DType::kBFloat16 ? cuda::to_bfloat16(value)
                                                      : cuda::to_float16(value));
  }
  double get(int row, int column) const { return decode(layout.row(row), layout.dtype, column); }

  std::string bytes() const { return {memory_.get(), bytes_}; }
  void restore(const std::string& bytes) { std::memcpy(memory_.get(), bytes.data(), bytes_); }

  // Whether all but the rows is as `before`.
  bool only_rows_differ(const std::string& before) const {
    std::string now = bytes();
    for (int row = 0; row < rows_; ++row) {
      const size_t at = layout.row(row) - memory_.get();
      now.replace(at, layout.width * item_size(layout.dtype), before, at,
                  layout.width * item_size(layout.dtype));
    }
    return now == before;
  }

  Rows layout;

 private:
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  const int rows_;
  size_t bytes_;
  std::unique_ptr<char, Free> memory_;
};

// Logits for a case; deterministic.
inline void fill(const Case& c, Matrix& student, Matrix& teacher) {
  std::mt19937 generator(c.vocab * 31 + c.rows);
  std::normal_distribution<double> normal;
  const double lowest = c.student == DType::kFloat16 || c.teacher == DType::kFloat16
                            ? -65504.0
                            : -3.3895313892515355e38;  // of bfloat16

  for (int row = 0; row < c.rows; ++row) {
    for (int i = 0; i < c.vocab; ++i) {
      double t = 2 * normal(generator), s = 0.6 * t + 1.2 * normal(generator);
      if (c.logits == Logits::kClose) s = t + 0.01 * c.temperature * normal(generator);
      if (c.logits == Logits::kBorder)
        s = t + (0.15 + 0.04 * (row % 8)) * c.temperature * normal(generator);
      if (c.logits == Logits::kClimbing) {
        const double climb = (row % 2 ? -90.0 : 90.0) * i / c.vocab;
        s += climb, t += climb;
        if (row % 3 == 2 && i < c.vocab / 2) s = t = -kInf;
      }
      if (c.logits == Logits::kHuge) {
        if (row % 4 == 0) s -= 1e4;
        if (row % 4 == 1) t += 1e4;
        if (row % 4 == 2 && i == c.vocab / 2) s = t = 1e4;
        if (row % 4 == 3) s *= 30, t *= 30;
      }
      teacher.set(row, i, t);
      if (c.logits == Logits::kIdentical) s = teacher.get(row, i);
      student.set(row, i, s);
    }
    if (c.logits != Logits::kHostile) continue;
    const int first = 0, middle = c.vocab / 2, last = c.vocab - 1;
    const auto both = [&](int i, double x) {
      student.set(row, i, x);
      teacher.set(row, i, x);
    };
    switch (row % 10) {
      case 0:
        for (const int i : {first, last})
          if (c.vocab > 2) both(i, -kInf);
        break;
      case 1:
        if (c.vocab > 1) student.set(row, middle, -kInf);
        break;
      case 2:
        if (c.vocab > 1) teacher.set(row, last, -kInf);
        break;
      case 3:
        student.set(row, last, kNaN);
        break;
      case 4:
        teacher.set(row, first, kNaN);
        break;
      case 5:
        for (int i = 0; i < c.vocab; ++i) student.set(row, i, -kInf);
        break;
      case 6:
        for (int i = 0; i < c.vocab; ++i) teacher.set(row, i, -kInf);
        break;
      case 7:
        student.set(row, middle, kInf);
        break;
      case 8:
        teacher.set(row, middle, kInf);
        break;
      default:
        for (const int i : {first, middle})
          if (c.vocab > 2) both(i, lowest);
    }
  }
}

// Moves logits of the student where p and q agree so closely that total variation's slope, a sign,
// is a matter of rounding.
inline void part_ties(const LogitsParams& params, Matrix& student) {
  for (int row = 0; row < params.rows; ++row)
    for (int tries = 0; tries < 10; ++tries) {
      const Softmax p(
          RowLogits(params.teacher, params.teacher_transform, row, params.vocab).transformed,
          params.temperature);
      const Softmax q(
          RowLogits(params.student, params.student_transform, row, params.vocab).transformed,
          params.temperature);
      bool tied = false;
      for (int i = 0; i < params.vocab; ++i) {
        if (!(std::fabs(q.log[i] - p.log[i]) < TVD_TIE)) continue;
        tied = true;
        student.set(row, i, student.get(row, i) * 1.02 + 0.02);
      }
      if (!tied) break;
    }
}

class Comparison {
 public:
  explicit Comparison(const char* what) : what_(what) {}

  // Within (relative, absolute); NaN and infinities must agree.
  void value(double actual, double expected, const double (&tolerance)[2], double weight, int row) {
    const bool special = !std::isfinite(expected);
    const double allowed =
        std::max(tolerance[0] * std::fabs(expected), tolerance[1] * std::max(1.0, weight));
    const bool right = special ? actual == expected || (actual != actual && expected != expected)
                               : std::fabs(actual - expected) <= allowed;
    expect(right, "%s of row %d is %.9g, expected %.9g", what_, row, actual, expected);
  }

  void element(double actual, double expected, int row, int column) {
    if (!std::isfinite(expected)) {
      expect(actual == expected || (actual != actual && expected != expected),
             "%s at (%d, %d) is %g, expected %g", what_, row, column, actual, expected);
      return;
    }
    if (!std::isfinite(actual))
      expect(false, "%s at (%d, %d) is %g, expected %g", what_, row, column, actual, expected);
    error_ += (actual - expected) * (actual - expected);
    size_ += expected * expected;
    ++count_;
  }

  // Relative in L2, over all elements.
  void finish(double relative, double per_element) {
    const double allowed = relative * std::sqrt(size_) + per_element * std::sqrt((double)count_);
    expect(std::sqrt(error_) <= allowed, "%s is off by %g of a norm of %g, allowed is %g", what_,
           std::sqrt(error_), std::sqrt(size_), allowed);
  }

 private:
  const char* what_;
  double error_ = 0, size_ = 0;
  int64_t count_ = 0;
};

inline const double (&loss_tolerance(const std::string& divergence))[2] {
  const bool plain = divergence == "forward_kl" || divergence == "reverse_kl" ||
                     divergence == "soft_cross_entropy";
  return plain ? PLAIN_LOSS : OTHER_LOSS;
}

inline void check(const Case& c) {
  const std::string description = c.describe();
  emulator::options.label = description.c_str();
  const std::string divergence = kDivergenceName;
  Matrix student(c.student, c.rows, c.vocab + c.student_padding, c.misaligned[0], c.inner_size);
  Matrix teacher(c.teacher, c.rows, c.vocab + c.teacher_padding, c.misaligned[1], c.inner_size);
  Matrix gradient(c.student, c.rows, c.vocab + c.student_padding, c.misaligned[2], 0);

  std::vector<int64_t> labels(c.rows);
  std::vector<float> weights(c.rows), loss(c.rows), row_scale(c.rows), metrics(kMetrics * c.rows);
  for (int row = 0; row < c.rows; ++row) {
    labels[row] = row % 5 == 3 ? c.vocab : (row * 7 + c.vocab - 1) % c.vocab;
    weights[row] = row % 3 == 1 ? 0 : 0.5f + row;
  }
  LogitsParams params;
  params.rows = c.rows;
  params.vocab = c.vocab;
  params.student = student.layout;
  params.teacher = teacher.layout;
  if (c.gradient) params.gradient = c.in_place ? student.layout : gradient.layout;
  std::copy_n(c.parameters, 2, params.parameters);
  params.temperature = c.temperature;
  params.student_transform = c.student_transform;
  params.teacher_transform = c.teacher_transform;
  params.kd_weight = c.kd_weight;
  params.ce_weight = c.ce_weight;
  if (c.labels) params.labels = labels.data();
  if (c.weights) params.token_weight = weights.data();
  if (c.normalizer != 0) params.normalizer = &c.normalizer;
  if (c.mean) params.reduction = Reduction::kMean;
  if (c.gradient && c.student == DType::kFloat16) {
    params.gradient_scale = 4096;
    params.row_scale = row_scale.data();
  }
  params.loss = loss.data();
  if (c.metrics) params.metrics = metrics.data();

  fill(c, student, teacher);
  if (divergence == "tvd" && c.logits != Logits::kIdentical) part_ties(params, student);
  const std::string student_before = student.bytes(), teacher_before = teacher.bytes();
  const std::string gradient_before = gradient.bytes();
  std::vector<Expected> expected;
  const double normalizer = c.normalizer != 0 ? c.normalizer : c.mean ? c.rows : 1.0;
  for (int row = 0; row < c.rows; ++row)
    expected.push_back(oracle(params, divergence, row, c.weights ? weights[row] : 1, normalizer));
  if (c.logits == Logits::kIdentical)  // exactly: float64 rounds here
    for (Expected& e : expected) std::fill(e.gradient.begin(), e.gradient.end(), 0);

  const Matrix& result = c.in_place ? student : gradient;
  const auto run = [&](uint64_t seed) {
    student.restore(student_before);
    gradient.restore(gradient_before);
    for (auto* output : {&loss, &row_scale, &metrics})
      std::fill(output->begin(), output->end(), NAN);
    emulator::options.seed = seed;
    run_rows(params, c.tile.threads == 0 ? std::nullopt : std::optional(c.tile));
    std::string bits = result.bytes();
    for (auto* output : {&loss, &row_scale, &metrics})
      bits.append((const char*)output->data(), output->size() * sizeof(float));
    return bits;
  };
  const uint64_t first_seed = c.first_seed + c.vocab + c.rows;
  std::vector<emulator::Fetched> fetched;
  emulator::fetched = &fetched;
  const std::string bits = run(first_seed);
  emulator::fetched = nullptr;
  if (c.tile.threads != 0) check_fetched(params, c.tile, fetched);

  Comparison losses("the loss"), gradients("the gradient"), metric("a metric");
  const auto& tolerance = loss_tolerance(divergence);
  for (int row = 0; row < c.rows; ++row) {
    const Expected& e = expected[row];
    losses.value(loss[row], e.loss, tolerance, c.weights ? weights[row] : 1, row);
    if (c.logits == Logits::kIdentical && divergence != "soft_cross_entropy")
      expect(loss[row] >= 0 && loss[row] < IDENTICAL_LOSS, "the loss is %g", loss[row]);
    const float scale = params.row_scale ? row_scale[row] : 1;
    double largest = 0;
    for (const double x : e.gradient)
      if (!(std::fabs(x) <= largest)) largest = x == x ? std::fabs(x) : kInf;
    const double weight = c.weights ? weights[row] : 1;
    // Two certain models: no gradient but the rounding of probabilities of 1.
    const bool certain = weight != 0 && c.logits != Logits::kIdentical && largest < 1e-30;
    const double rounding = ROUNDING_OF_1 * std::fabs(weight * c.kd_weight / normalizer) /
                            std::min(1.0, (double)c.temperature);
    for (int i = 0; i < (int)e.gradient.size() && c.gradient; ++i) {
      const double actual = result.get(row, i) * scale;
      if (i >= c.vocab || largest == 0)
        expect(std::fabs(actual) <= (certain && i < c.vocab ? rounding : 0),
               "the gradient at (%d, %d) is %g, expected 0", row, i, actual);
      if (!certain) gradients.element(actual, e.gradient[i], row, i);
    }
    for (int i = 0; i < kMetrics && c.metrics; ++i)
      metric.value(metrics[i * c.rows + row], e.metrics[i], i == kDivergence ? tolerance : METRIC,
                   1, row);
  }
  if (c.gradient) {
    const double relative = c.student == DType::kBFloat16  ? BFLOAT16_GRADIENT
                            : c.student == DType::kFloat16 ? FLOAT16_GRADIENT
                            : c.logits == Logits::kClose || c.logits == Logits::kBorder
                                ? CLOSE_GRADIENT
                                : tolerance[0];
    gradients.finish(relative, c.student == DType::kFloat16 ? FLOAT16_SUBNORMAL : 0);
  }

  expect(teacher.bytes() == teacher_before, "the teacher was written to");
  expect(c.in_place ? student.only_rows_differ(student_before) : student.bytes() == student_before,
         "the student was written to");
  expect(c.gradient && !c.in_place ? gradient.only_rows_differ(gradient_before)
                                   : gradient.bytes() == gradient_before,
         "the gradient was written to between its rows");
  for (int seed = 1; seed < c.seeds; ++seed)
    expect(run(first_seed + seed) == bits, "other bits than with another order of threads");
}

}  // namespace kd::tests
