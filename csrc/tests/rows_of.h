// The row kernels of one divergence, as the tests call them: rows_of.cpp is compiled, and a program
// linked, for each.
#pragma once

#include <optional>

#include "../core/params.h"
#include "../cuda/tiles.h"

namespace kd::tests {

extern const char* const kDivergenceName;
extern const int kDivergenceIndex;

// As csrc/cuda/rows.cuh does it, on an H100 of one SM.
void run_rows(const LogitsParams& params, std::optional<cuda::Tile> forced);

cuda::Problem problem_of(const LogitsParams& params);
cuda::Tile choose(const cuda::Problem& problem, int compute_capability);
// Whether the tile can hold the row pair.
bool holds(const cuda::Problem& problem, const cuda::Tile& tile);
// How far ahead run_rows() fetches.
int64_t rows_in_flight(const LogitsParams& params, const cuda::Tile& tile);

}  // namespace kd::tests
