// The backward's kernel: every element times a factor, rounded once, and nothing else touched.
#include "emulator.h"

#include "../cuda/scale.cuh"

#include "rows_case.h"

namespace kd::tests {
namespace {

void check_scale(DType dtype, int width, int misaligned, int inner_size, bool per_row,
                 bool scaled) {
  const int rows = 4;
  const std::string label = "scale of width " + std::to_string(width) + " dtype " +
                            std::to_string((int)dtype) + " off " + std::to_string(misaligned);
  emulator::options = {(uint64_t)width, label.c_str()};
  Matrix gradient(dtype, rows, width, misaligned, inner_size);
  for (int row = 0; row < rows; ++row)
    for (int i = 0; i < width; ++i) gradient.set(row, i, (i % 97 - 40) * 0.01 * (row + 1));
  const std::string before = gradient.bytes();
  std::vector<double> old;
  for (int row = 0; row < rows; ++row)
    for (int i = 0; i < width; ++i) old.push_back(gradient.get(row, i));

  const std::vector<float> grad_output = {1, 3, -0.7f, 1}, row_scale = {1, 0.5f, 2, 0};
  ScaleParams params;
  params.rows = rows;
  params.gradient = gradient.layout;
  params.grad_output = grad_output.data() + !per_row;
  params.grad_output_stride = per_row;
  if (scaled) params.row_scale = row_scale.data();
  const unsigned ctas = rows - 1;  // one of them has two rows
  cuda::launch(cuda::scale_kernel, {ctas, cuda::kScaleThreads, 1, 0}, nullptr,
               cuda::ScaleLaunch(params));

  expect(gradient.only_rows_differ(before), "written to between the rows");
  Matrix rounded(dtype, 1, 1, 0, 0);
  for (int row = 0; row < rows; ++row)
    for (int i = 0; i < width; ++i) {
      const float factor = grad_output[per_row ? row : 1] * (scaled ? row_scale[row] : 1);
      rounded.set(0, 0, (float)old[row * width + i] * factor);
      expect(gradient.get(row, i) == rounded.get(0, 0), "(%d, %d) is %g, expected %g", row, i,
             gradient.get(row, i), rounded.get(0, 0));
    }
}

// Rows found by multiplying, against Rows::row, up to the largest numbers.
void check_places() {
  std::mt19937_64 generator(0);
  for (int i = 0; i < 100000; ++i) {
    const auto below = [&](int bits) { return (int64_t)(generator() >> (64 - 1 - i % bits)); };
    Rows rows;
    rows.data = (char*)4096;
    rows.dtype = (DType)(i % 3);
    rows.inner_size = 1 + below(32);
    rows.inner_stride = below(20), rows.outer_stride = below(24);
    const cuda::RowPlaces places(rows);
    const int64_t row = below(32), first = row - row % rows.inner_size;
    for (const int64_t at : {row, first, first + rows.inner_size - 1})
      if (at < (int64_t)1 << 32)
        expect(places[(uint32_t)at] == rows.row(at), "row %lld of %lld inner ones", (long long)at,
               (long long)rows.inner_size);
  }
}

}  // namespace
}  // namespace kd::tests

int main() {
  using namespace kd;
  tests::check_places();
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16})
    for (const int width : {1, 7, 8, 9, 100, 2053})
      for (const int misaligned : {0, 1, 5})
        for (const int inner_size : {0, 2}) {
          tests::check_scale(dtype, width, misaligned, inner_size, false, false);
          tests::check_scale(dtype, width, misaligned, inner_size, true, false);
          tests::check_scale(dtype, width, misaligned, inner_size, true, true);
        }
  return tests::finish();
}
