// What a launch of a row kernel takes.
#pragma once

#include <type_traits>

#include "elements.h"

#include "../core/divergences.h"

namespace kd::cuda {

// The parameters of a launch, with what the host can compute once. token_weight is 0 for rows
// that take no part; a null normalizer is 1; loss is (rows,), before the reduction.
template <class Divergence>
struct RowsParams : LogitsParams {
  Divergence term;
  float c;  // log2(e) / temperature
  float inverse_temperature;
  int64_t first_row = 0;  // of this launch

  explicit RowsParams(const LogitsParams& params)
      : LogitsParams(params),
        term(params.parameters[0], params.parameters[1]),
        c((float)(1.4426950408889634 / params.temperature)),
        inverse_temperature((float)(1 / (double)params.temperature)) {}
};

// How many CTAs of 256 threads the compiler has to fit on an SM by their registers. Powers of both
// probabilities need too many.
template <class Divergence>
constexpr int kCtasOfAnSm = std::is_same_v<Divergence, AlphaBeta> ? 1 : 2;

// Whether a call needs a kernel with options.
inline bool uses_options(const LogitsParams& params) {
  const auto transforms = [](const Transform& x) { return x.scale != 1 || x.softcap != 0; };
  return transforms(params.student_transform) || transforms(params.teacher_transform) ||
         (params.labels && params.ce_weight != 0) || params.kd_weight == 0 || params.metrics;
}

}  // namespace kd::cuda
