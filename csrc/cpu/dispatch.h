// The CPU backend's entry points.
#pragma once

#include <string>
#include <vector>

#include "../core/params.h"

namespace kd::cpu {

// The instruction sets of this build that this machine runs, best first.
std::vector<std::string> instruction_sets();

// The names of KD_DIVERGENCES, in order.
std::vector<std::string> divergences();

// Throws std::invalid_argument, before anything is written, for a label outside the vocabulary.
void logits(const LogitsParams& params, int threads);

// One phase; true where the gradient is written then.
bool shard(const ShardParams& params, int threads);

// The caller has checked what is listed.
void tail(const TailParams& params, int threads);

void scale(const ScaleParams& params, int threads);

}  // namespace kd::cpu
