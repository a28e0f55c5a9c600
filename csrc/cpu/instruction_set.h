// Everything that one instruction set has.
#pragma once

#include "rows.h"
#include "scale.h"
#include "shard.h"
#include "tail.h"

namespace kd::KD_NAMESPACE {

constexpr InstructionSet instruction_set(const char* name) {
#define KD_LOSS(name, Divergence) run_rows<Divergence, false>,
#define KD_LOSS_AND_GRADIENT(name, Divergence) run_rows<Divergence, true>,
#define KD_SHARD(name, Divergence) run_shard<Divergence>,
  return {name,
          {KD_DIVERGENCES(KD_LOSS)},
          {KD_DIVERGENCES(KD_LOSS_AND_GRADIENT)},
          {KD_DIVERGENCES(KD_SHARD)},
          scale_rows,
          tail_rows};
#undef KD_LOSS
#undef KD_LOSS_AND_GRADIENT
#undef KD_SHARD
}

}  // namespace kd::KD_NAMESPACE
