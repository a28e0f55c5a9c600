// The backward: gradient *= grad_output * row_scale. Where all factors are 1, which the device
// alone knows, there is nothing to do, and a CTA for each row would take longer to start than that.
#pragma once

#include "columns.h"

namespace kd::cuda {

constexpr int kScaleThreads = 256, kScaleCtas = 1024;

template <int kItem>
KD_DEVICE void scale_vector(char* at, bool bfloat16, float factor) {
  float x[kLanes<kItem>];
  unpack<kItem>(*(const uint4*)at, bfloat16, x);
#pragma unroll
  for (int i = 0; i < kLanes<kItem>; ++i) x[i] *= factor;
  store_16(at, pack<kItem>(x, bfloat16));
}

struct ScaleLaunch : ScaleParams {
  RowPlaces gradient_rows;

  explicit ScaleLaunch(const ScaleParams& params)
      : ScaleParams(params), gradient_rows(params.gradient) {}
};

KD_DEVICE void scale_row(const ScaleLaunch& params, int64_t index) {
  float factor = params.grad_output[index * params.grad_output_stride];
  if (params.row_scale) factor *= params.row_scale[index];
  if (factor == 1) return;
  const Rows& rows = params.gradient;
  char* const row = params.gradient_rows[index];
  const WholeVectors vectors(row, rows.dtype, 0, rows.width);
  const auto scale_1 = [&](int64_t i) {
    store_1(row, i, rows.dtype, load_1(row, i, rows.dtype) * factor);
  };
  for (int64_t i = threadIdx.x; i < vectors.head; i += blockDim.x) scale_1(i);
  for (int64_t i = vectors.tail + threadIdx.x; i < rows.width; i += blockDim.x) scale_1(i);
  for (int64_t i = threadIdx.x; i < vectors.count; i += blockDim.x) {
    char* const at = vectors[i];
    if (rows.dtype == DType::kFloat32)
      scale_vector<4>(at, false, factor);
    else
      scale_vector<2>(at, rows.dtype == DType::kBFloat16, factor);
  }
}

__global__ void __launch_bounds__(kScaleThreads) scale_kernel(const ScaleLaunch params) {
  if (!params.row_scale && params.grad_output_stride == 0 && *params.grad_output == 1) return;
  for (int64_t row = blockIdx.x; row < params.rows; row += gridDim.x) scale_row(params, row);
}

}  // namespace kd::cuda
