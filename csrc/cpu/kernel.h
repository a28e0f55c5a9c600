// What one instruction set offers to dispatch.cpp.
#pragma once

#include "../core/divergences.h"
#include "../core/params.h"

namespace kd {

#define KD_ONE(name, Divergence) +1
constexpr int kDivergences = KD_DIVERGENCES(KD_ONE);
#undef KD_ONE

// Per-row inputs and outputs that dispatch.cpp prepares for all rows of a call.
struct RowPlan {
  const float* weight;  // (rows,), 0: the row takes no part
  double normalizer;    // the gradient is divided by it
  double* loss;         // (rows,), out
  bool streams;         // the gradient goes past the caches
};

// Rows [begin, end), and after them `next` where it is a row, whose logits may be fetched early;
// scratch holds 2 x scratch_row(vocab) floats, 64-byte aligned.
using RowsFunction = void (*)(const LogitsParams&, const RowPlan&, int64_t begin, int64_t end,
                              int64_t next, float* scratch);
using ShardFunction = void (*)(const ShardParams&, const RowPlan&, int64_t begin, int64_t end,
                               int64_t next, float* scratch);
using TailFunction = void (*)(const TailParams&, int64_t begin, int64_t end, bool streams);
using ScaleFunction = void (*)(const ScaleParams&, int64_t begin, int64_t end);

KD_INLINE constexpr int64_t scratch_row(int64_t vocab) { return (vocab + 31) / 32 * 32; }

struct InstructionSet {
  const char* name;
  RowsFunction loss[kDivergences];
  RowsFunction loss_and_gradient[kDivergences];
  ShardFunction shard[kDivergences];
  ScaleFunction scale;
  TailFunction tail;
};

extern const InstructionSet kBaseline;
#if defined(KD_X86_64)
extern const InstructionSet kAvx2, kAvx512, kAvx512Bf16;
#endif

}  // namespace kd
