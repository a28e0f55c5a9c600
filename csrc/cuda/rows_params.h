// What a launch of a row kernel takes.
#pragma once

#include <type_traits>

#include "elements.h"

#include "../core/divergences.h"

namespace kd::cuda {

// How many columns of a row lie before the first that is at a multiple of 16 bytes in every tensor;
// -1 where none is.
KD_INLINE int head_of(const char* student, DType student_dtype, const char* teacher,
                      DType teacher_dtype, const char* gradient) {
  const int student_size = (int)item_size(student_dtype);
  const int teacher_size = (int)item_size(teacher_dtype);
  const auto whole = [](const char* row, int bytes) { return ((uintptr_t)row + bytes) % 16 == 0; };
  const int shift = log2_lanes(student_dtype);
  int head = (int)(-(uintptr_t)student % 16) >> (4 - shift);
  for (; head < 8; head += 1 << shift)
    if (whole(student, head * student_size) && whole(teacher, head * teacher_size) &&
        (!gradient || whole(gradient, head * student_size)))
      return head;
  return -1;
}

// What the host knows of the number of rows that a mean divides by.
inline float divisor_of(const LogitsParams& params) {
  const bool counts = params.reduction == Reduction::kMean && !params.normalizer;
  return counts && params.rows > 0 ? (float)params.rows : 1;
}

// The parameters of a launch, with what the host can compute once. token_weight is 0 for rows
// that take no part; a null normalizer is 1; loss is (rows,), before the reduction.
struct LaunchParams : LogitsParams {
  static constexpr int kByRow = -2;

  RowPlaces student_rows, teacher_rows, gradient_rows;
  int head = kByRow;      // see head_of, where it is the same for all rows
  int64_t first_row = 0;  // of this launch
  int64_t ahead = 0;  // each CTA fetches its share of the row so far ahead into the cache; 0: none
  float divisor = 1;  // of the gradient, beside the normalizer

  explicit LaunchParams(const LogitsParams& params)
      : LogitsParams(params),
        student_rows(params.student),
        teacher_rows(params.teacher),
        gradient_rows(params.gradient) {
    if (student_rows.alike() && teacher_rows.alike() && gradient_rows.alike())
      head = head_of(student.data, student.dtype, teacher.data, teacher.dtype, gradient.data);
    divisor = divisor_of(params);
  }
};

template <class Divergence>
struct RowsParams : LaunchParams {
  Divergence term;
  float c;  // log2(e) / temperature
  float inverse_temperature;

  explicit RowsParams(const LogitsParams& params)
      : LaunchParams(params),
        term(params.parameters[0], params.parameters[1]),
        c((float)(kBitsPerNat / params.temperature)),
        inverse_temperature((float)(1 / (double)params.temperature)) {}
};

// How many CTAs of 256 threads have to fit on an SM by their registers. Alpha-beta, with powers of
// both probabilities, needs too many for two.
template <class Divergence>
constexpr int kCtasOfAnSm = std::is_same_v<Divergence, AlphaBeta> ? 1 : 2;

// Threads of the streaming kernel, with the registers that two CTAs of 256 have.
template <class Divergence>
constexpr int kStreamingThreads = 256 * kCtasOfAnSm<Divergence>;

// Whether a call needs a kernel with options.
inline bool uses_options(const LogitsParams& params) {
  const auto transforms = [](const Transform& x) { return x.scale != 1 || x.softcap != 0; };
  return transforms(params.student_transform) || transforms(params.teacher_transform) ||
         (params.labels && params.ce_weight != 0) || params.kd_weight == 0 || params.metrics;
}

}  // namespace kd::cuda
