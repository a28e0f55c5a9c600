// One row by its team: the algorithm, or zeros where the row takes no part.
#pragma once

#include "row_pair.h"

namespace kd::cuda {

// A row of weight 0: exact zeros, whatever the logits hold.
KD_DEVICE void clear_gradient(const LaunchParams& params, const Team& team, int64_t row) {
  if (params.gradient.data)
    fill(team, params.gradient_rows[row], params.gradient.dtype, 0, params.gradient.width, 0);
}

KD_DEVICE void write_masked_row(const LaunchParams& params, const Team& team, int64_t row) {
  clear_gradient(params, team, row);
  if (team.thread() != 0) return;
  params.loss[row] = 0;
  if (params.row_scale) params.row_scale[row] = 0;
  if (params.metrics)
    for (int i = 0; i < kMetrics; ++i) params.metrics[i * params.rows + row] = 0;
}

// A row of NaN, for its label is outside the vocabulary, though nothing asks for its cross-entropy.
KD_DEVICE void write_bad_row(const LaunchParams& params, const Team& team, int64_t row) {
  if (params.gradient.data) {
    char* const gradient = params.gradient_rows[row];
    fill(team, gradient, params.gradient.dtype, 0, params.vocab, NAN);
    fill(team, gradient, params.gradient.dtype, params.vocab, params.gradient.width, 0);
  }
  if (team.thread() != 0) return;
  params.loss[row] = NAN;
  if (params.row_scale) params.row_scale[row] = 1;
}

// One row, by the team; Row says how it is held.
template <class Row, bool kOptions, class Divergence>
KD_DEVICE void run_row(const RowsParams<Divergence>& params, const Team& team, int64_t index) {
  const float weight = params.token_weight ? params.token_weight[index] : 1.0f;
  const int64_t label = !kOptions && params.labels ? params.labels[index] : 0;
  Row row(params, team, index);  // while weight and label are on their way, both at once
  if (kOptions) row.reads_teacher = uses_divergence<kOptions>(params);
  if (weight == 0 || label < 0 || label >= params.vocab) {
    if constexpr (Row::kHeld) row.fetch_later(params, team, index);
    return weight == 0 ? write_masked_row(params, team, index) : write_bad_row(params, team, index);
  }
  team.enter();
  RowPair<Divergence, Row, kOptions>(params, team, row, index).run();
}

}  // namespace kd::cuda
