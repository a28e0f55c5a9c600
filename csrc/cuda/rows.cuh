// Launches the kernel of one divergence for all rows of a call.
#pragma once

#include <optional>
#include <stdexcept>

#include "launch.h"
#include "resident.cuh"
#include "streaming.cuh"
#include "tiles.h"

namespace kd::cuda {

inline Grid grid_of(const Problem& problem, const Tile& tile, int64_t rows) {
  return {(unsigned)(rows * tile.cluster), (unsigned)tile.threads, (unsigned)tile.cluster,
          (size_t)shared_bytes(problem, tile)};
}

template <class Divergence>
using RowsKernel = void (*)(RowsParams<Divergence>);

template <class Divergence, int kItem>
RowsKernel<Divergence> resident_kernel(Kernel kernel, bool options) {
  if constexpr (kRegisterVectors<Divergence> > 0)
    if (kernel == Kernel::kRegisters) return registers_kernel<Divergence, kItem>;
  return options ? shared_kernel<Divergence, kItem, true> : shared_kernel<Divergence, kItem, false>;
}

template <class Divergence>
RowsKernel<Divergence> kernel_of(const Problem& problem, Kernel kernel) {
  const bool options = problem.options;
  if (kernel == Kernel::kStreaming)
    return options ? streaming_kernel<Divergence, true> : streaming_kernel<Divergence, false>;
  return problem.item_size == 4 ? resident_kernel<Divergence, 4>(kernel, options)
                                : resident_kernel<Divergence, 2>(kernel, options);
}

template <class Divergence>
Problem problem_of(const LogitsParams& params) {
  const int item = (int)item_size(params.student.dtype);
  return {params.vocab,
          item,
          params.student.dtype == params.teacher.dtype,
          uses_options(params),
          kRegisterVectors<Divergence>,
          vectors_of_slot(item, kKeepsSlopes<Divergence>),
          kStreamingThreads<Divergence>};
}

// With the forced tile, or else the chooser's.
template <class Divergence>
void run_rows(const LogitsParams& call, const Device& device, std::optional<Tile> forced,
              void* stream) {
  RowsParams<Divergence> params(call);
  const Problem problem = problem_of<Divergence>(call);
  const auto at_once = [&](const Tile& tile) {  // row pairs
    return clusters_at_once(kernel_of<Divergence>(problem, tile.kernel), grid_of(problem, tile, 1));
  };
  const auto has_room = [&](const Tile& tile) { return tile.cluster == 1 || at_once(tile) > 0; };
  if (forced && !(holds(problem, *forced, device) && has_room(*forced)))
    throw std::invalid_argument("the tile that was asked for cannot hold this row pair here");
  const Tile tile = forced ? *forced : choose(problem, device, has_room);
  if (tile.ahead) params.ahead = at_once(tile);
  const auto kernel = kernel_of<Divergence>(problem, tile.kernel);
  launch_in_parts(params, params.rows, [&](int64_t rows) {
    launch(kernel, grid_of(problem, tile, rows), stream, params);
  });
}

}  // namespace kd::cuda
