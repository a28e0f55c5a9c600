// The CPU backend's entry points.
#pragma once

#include <string>
#include <vector>

#include "../core/params.h"

namespace kd {

struct InstructionSet;  // kernel.h

namespace cpu {

// The instruction sets of this build that this machine runs, best first.
std::vector<std::string> instruction_sets();

// The best one, or the one that the environment asks for, which is read anew each time so that a
// test can run each in one process. Not while other threads may change the environment.
const InstructionSet* chosen();

// The names of KD_DIVERGENCES, in order.
std::vector<std::string> divergences();

// Throws std::invalid_argument, before anything is written, for a label outside the vocabulary.
void logits(const LogitsParams& params, const InstructionSet* set, int threads);

// One phase; true where the gradient is written then.
bool shard(const ShardParams& params, const InstructionSet* set, int threads);

// The caller has checked what is listed.
void tail(const TailParams& params, const InstructionSet* set, int threads);

void scale(const ScaleParams& params, const InstructionSet* set, int threads);

}  // namespace cpu
}  // namespace kd
