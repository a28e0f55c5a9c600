// The kernels of a sparse teacher against their definition in double.
#include "emulator.h"

#include "../cuda/tail.cuh"

#include "rows_case.h"

namespace kd::tests {
namespace {

struct TailCase {
  DType dtype = DType::kFloat32;
  int vocab = 100, padding = 0, misaligned = 0, inner_size = 0;
  int listed = 5, empty = 0;  // slots in use and not
  bool clustered = false;     // what is listed are neighbours
  bool hostile = false;       // -inf in every row, a NaN, an inf and nothing else in one each
  bool climbing = false, in_place = false, at_1 = false;
  float temperature = 1;
  Transform transform;

  std::string describe() const {
    std::ostringstream text;
    text << "tail dtype " << (int)dtype << " vocab " << vocab << '+' << padding << " off "
         << misaligned << " inner " << inner_size << " listed " << listed << '+' << empty
         << (clustered ? " clustered" : "") << (hostile ? " hostile" : "")
         << (climbing ? " climbing" : "") << (in_place ? " in place" : "") << (at_1 ? " at 1" : "")
         << " T " << temperature << " scale " << transform.scale << " cap " << transform.softcap;
    return text.str();
  }
};

double transformed(const Transform& transform, double x) {
  if (transform.softcap == 0 || x == -INFINITY) return transform.scale * x;
  return transform.softcap * std::tanh(transform.scale * x / transform.softcap);
}

double derivative(const Transform& transform, double x) {
  if (transform.softcap == 0) return transform.scale;
  const double cosh = std::cosh(transform.scale * x / transform.softcap);
  return transform.scale / (cosh * cosh);
}

// `size` is that of the terms, which may cancel.
bool close(double actual, double expected, double size, double relative, double absolute) {
  if (std::isnan(expected) || std::isinf(expected))
    return std::isnan(expected) ? std::isnan(actual) : actual == expected;
  return std::fabs(actual - expected) <= std::fmax(relative * size, absolute);
}

void check_tail(const TailCase& c) {
  constexpr int kRows = 5;
  const std::string label = c.describe();
  emulator::options = {(uint64_t)c.vocab, label.c_str()};
  std::mt19937 random((unsigned)(c.vocab + 31 * c.listed));
  std::normal_distribution<double> normal;
  const int width = c.vocab + c.padding;
  Matrix student(c.dtype, kRows, width, c.misaligned, c.inner_size);
  for (int row = 0; row < kRows; ++row)
    for (int i = 0; i < width; ++i) {
      double x = 3 * normal(random) + (c.climbing ? 300.0 * i / width : 0);
      if (c.hostile && (i % 7 == 3 || row == 3)) x = -INFINITY;
      student.set(row, i, x);
    }
  if (c.hostile) {
    student.set(1, c.vocab / 2, NAN);
    student.set(2, c.vocab / 2, INFINITY);
  }

  const int size = c.listed + c.empty;
  std::vector<int64_t> listed(kRows * size, -1);
  for (int row = 0; row < kRows; ++row) {
    std::vector<int64_t> columns(c.vocab);
    for (int i = 0; i < c.vocab; ++i) columns[i] = (i + row) % c.vocab;
    if (!c.clustered) std::shuffle(columns.begin(), columns.end(), random);
    std::sort(columns.begin(), columns.begin() + c.listed);
    std::copy_n(columns.begin(), c.listed, listed.begin() + row * size + c.empty);
  }
  // Memory of exactly its size, for AddressSanitizer.
  std::unique_ptr<bool[]> kept(new bool[kRows]{true, true, true, true, false});
  const int temperatures = c.at_1 ? 2 : 1;
  std::vector<float> tails((1 + temperatures) * kRows, NAN);
  std::vector<float> grad_tails(temperatures * kRows), grad_listed(kRows * size);
  for (float& x : grad_tails) x = (float)normal(random);
  for (float& x : grad_listed) x = (float)normal(random);
  for (int i = 0; i < temperatures; ++i) grad_tails[i * kRows + 4] = 0;  // the row left out

  TailParams params;
  params.rows = kRows;
  params.vocab = c.vocab;
  params.student = student.layout;
  params.transform = c.transform;
  params.temperature = c.temperature;
  params.at_1 = c.at_1;
  params.listed = listed.data();
  params.listed_size = size;
  params.kept = kept.get();
  params.tails = tails.data();
  const std::string logits = student.bytes();
  const cuda::Grid grid{kRows, cuda::kTailThreads, 1, cuda::kTailSharedBytes};
  cuda::launch(cuda::tails_kernel, grid, nullptr, cuda::TailLaunch(params));
  expect(student.bytes() == logits, "the forward wrote to the logits");

  // The definition.
  const auto is_listed = [&](int row, int column) {
    const auto first = listed.begin() + row * size;
    return std::find(first, first + size, column) != first + size;
  };
  std::vector<double> expected(kRows * width, 0), sizes(kRows * width, 0);
  for (int row = 0; row < kRows; ++row) {
    for (int which = 0; which < temperatures; ++which) {
      const double temperature = which == 0 ? c.temperature : 1;
      double top = -INFINITY, sum = 0;
      bool bad = false;
      for (int i = 0; i < c.vocab; ++i) {
        if (is_listed(row, i)) continue;
        const double x = transformed(c.transform, student.get(row, i));
        top = std::fmax(top, x);
        bad |= std::isnan(x) || x == INFINITY;
      }
      for (int i = 0; i < c.vocab && top > -INFINITY; ++i)
        if (!is_listed(row, i))
          sum += std::exp((transformed(c.transform, student.get(row, i)) - top) / temperature);
      double log_sum_exp = bad ? NAN : top / temperature + std::log(sum);
      if (row == 4) log_sum_exp = -INFINITY;
      const double actual = (double)tails[row] / temperature + tails[(1 + which) * kRows + row];
      expect(close(actual, log_sum_exp, std::fabs(top / temperature), 3e-7, 3e-7),
             "row %d: log-sum-exp %.9g, expected %.9g", row, actual, log_sum_exp);
      if (log_sum_exp == -INFINITY) continue;
      for (int i = 0; i < c.vocab; ++i) {
        const double raw = student.get(row, i), x = transformed(c.transform, raw);
        const double part = bad ? NAN : std::exp(x / temperature - log_sum_exp) / temperature;
        const double term = grad_tails[which * kRows + row] * part *
                            (raw == -INFINITY ? 1 : derivative(c.transform, raw));
        expected[row * width + i] += term;
        sizes[row * width + i] += std::fabs(term);
      }
    }
    for (int i = 0; i < size; ++i)
      if (const int64_t column = listed[row * size + i]; column >= 0) {
        expected[row * width + column] = grad_listed[row * size + i];
        sizes[row * width + column] = std::fabs(grad_listed[row * size + i]);
      }
  }

  Matrix fresh(c.dtype, kRows, width, c.misaligned, c.inner_size);
  Matrix& gradient = c.in_place ? student : fresh;
  const std::string before = gradient.bytes();
  params.gradient = gradient.layout;
  params.grad_tails = grad_tails.data();
  params.grad_listed = grad_listed.data();
  params.kept = nullptr;
  cuda::launch(cuda::tails_gradient_kernel, grid, nullptr, cuda::TailLaunch(params));
  expect(gradient.only_rows_differ(before), "written to between the rows");
  if (!c.in_place) expect(student.bytes() == logits, "the backward wrote to the logits");
  const double relative = c.dtype == DType::kFloat32    ? 4e-6
                          : c.dtype == DType::kBFloat16 ? 5e-3
                                                        : 1e-3;
  // exp(-40) has a relative error of 40 roundings.
  const double absolute = c.dtype == DType::kFloat16 ? 1e-7 : 1e-17;
  for (int row = 0; row < kRows; ++row)
    for (int i = 0; i < width; ++i)
      expect(close(gradient.get(row, i), expected[row * width + i], sizes[row * width + i],
                   relative, absolute),
             "gradient (%d, %d) is %g, expected %g", row, i, gradient.get(row, i),
             expected[row * width + i]);
}

void check_all() {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (const int vocab : {1, 2, 7, 8, 100, 2053, 6000})
      for (const int misaligned : {0, 1, 3})
        for (const int listed : {1, 7, 300}) {
          if (listed > vocab) continue;
          TailCase c;
          c.dtype = dtype;
          c.vocab = vocab;
          c.misaligned = misaligned;
          c.listed = listed;
          c.empty = misaligned;
          c.padding = vocab % 5;
          c.in_place = misaligned == 3;
          check_tail(c);
        }
    TailCase c;
    c.dtype = dtype;
    c.vocab = 4100;
    c.listed = 40;
    for (const bool clustered : {false, true})
      for (const int inner_size : {0, 2})
        for (const float softcap : {0.0f, 5.0f})
          for (const bool at_1 : {false, true}) {
            c.clustered = clustered;
            c.inner_size = inner_size;
            c.transform = {softcap == 0 ? 1 : 1.5f, softcap};
            c.at_1 = at_1;
            c.temperature = at_1 ? 2 : 0.5f;
            c.climbing = inner_size != 0;
            c.hostile = false;
            check_tail(c);
            c.climbing = false;
            c.hostile = true;
            check_tail(c);
          }
  }
}

}  // namespace
}  // namespace kd::tests

int main() {
  kd::tests::check_all();
  return kd::tests::finish();
}
