// gradient *= grad_output, when it is known.
#pragma once

#include "blocks.h"

namespace kd::KD_NAMESPACE {

template <DType dtype>
void scale_row(char* row, int64_t width, float factor) {
  constexpr int64_t size = item_size(dtype);
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes)
    store_from_float<dtype>(row + i * size, 0, load_as_float<dtype>(row + i * size, 0) * factor);
  const int left = (int)(width - i);
  if (left == 0) return;
  row += i * size;
  store_some<dtype>(row, 0, load_some<dtype>(row, 0, left) * factor, left);
}

inline void scale_rows(const ScaleParams& params, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    float factor = params.grad_output[row * params.grad_output_stride];
    if (params.row_scale) factor *= params.row_scale[row];
    if (factor == 1) continue;
    char* data = params.gradient.row(row);
    switch (params.gradient.dtype) {
      case DType::kFloat32:
        scale_row<DType::kFloat32>(data, params.gradient.width, factor);
        break;
      case DType::kBFloat16:
        scale_row<DType::kBFloat16>(data, params.gradient.width, factor);
        break;
      case DType::kFloat16:
        scale_row<DType::kFloat16>(data, params.gradient.width, factor);
        break;
    }
  }
}

}  // namespace kd::KD_NAMESPACE
