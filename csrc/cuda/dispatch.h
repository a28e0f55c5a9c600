// What the extension module calls; declared without CUDA's headers.
#pragma once

#include <optional>
#include <string>

#include "tiles.h"

#include "../core/params.h"

namespace kd::cuda {

// Why calls on a device cannot be served, or an empty string.
std::string why_not(int device);

// The tile that the environment asks for, as for benchmarks and tests, read anew each time. Not
// while other threads may change the environment.
std::optional<Tile> forced_tile();

// All of these launch on `stream`, a cudaStream_t, and return at once.

// Labels need not be in range: such rows become NaN. `scratch` holds 2 rows + 1 floats.
void logits(const LogitsParams& params, std::optional<Tile> forced, float* scratch, int device,
            void* stream);

// One phase; true where it writes the gradient.
bool shard(const ShardParams& params, int device, void* stream);

void tail(const TailParams& params, int device, void* stream);

void scale(const ScaleParams& params, int device, void* stream);

}  // namespace kd::cuda
