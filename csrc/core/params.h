// The border between Python and the kernels: plain structs of pointers, shapes and strides.
#pragma once

#include <cstdint>

#include "base.h"

namespace kd {

enum class DType : int { kFloat32, kBFloat16, kFloat16 };

KD_INLINE constexpr int64_t item_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// A (rows, width) tensor whose rows lie at two strides: row = outer * inner_size + inner. That
// covers `logits[:, :-1]` and transposed leading dimensions without a copy.
struct Rows {
  char* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t width = 0;
  int64_t inner_size = 1;
  int64_t outer_stride = 0, inner_stride = 0;  // in elements

  KD_INLINE char* row(int64_t index) const {
    const int64_t offset =
        (index / inner_size) * outer_stride + (index % inner_size) * inner_stride;
    return data + offset * item_size(dtype);
  }
};

// x -> softcap * tanh(scale * x / softcap); softcap 0 means none.
struct Transform {
  float scale = 1, softcap = 0;
};

enum class Reduction : int { kNone, kSum, kMean };

struct LogitsParams {
  int64_t rows = 0;
  int64_t vocab = 0;  // the columns that take part, at most either width
  Rows student;       // (rows, width)
  Rows teacher;       // (rows, width)
  Rows gradient;      // (rows, student.width), may be the student itself; null data: loss only

  int divergence = 0;             // position in KD_DIVERGENCES
  double parameters[2] = {0, 0};  // of weights, the other one may be small
  float temperature = 1;
  Transform student_transform, teacher_transform;

  float kd_weight = 1;  // includes temperature squared where asked for
  float ce_weight = 0;
  const int64_t* labels = nullptr;  // (rows,)
  int64_t ignore_index = -100;
  const float* token_weight = nullptr;  // (rows,)
  Reduction reduction = Reduction::kNone;
  const float* normalizer = nullptr;  // (); null: the sum of the kept rows' weights

  // float16 gradients are stored times a power of two per row, without weight and normalizer;
  // row_scale gives what the backward multiplies them by.
  float gradient_scale = 1;
  float* row_scale = nullptr;  // (rows,)

  float* loss = nullptr;     // (rows,) for kNone, else ()
  float* metrics = nullptr;  // (kMetrics, rows)
};

// A shard of the vocabulary: the columns of every row pair that this process holds; others hold the
// rest. A call is up to three launches. Between them the processes tell each other what their
// shards came to, and add it up.
enum class ShardPhase : int { kStates, kSums, kGradient };

// Of a row: sums of exp((x - base) / T) over transformed logits x, or of exp(x - base). All -inf:
// base kLowestLogit and sum 0; a sum over NaN or +inf is NaN or infinite.
//
// For a KL divergence also those that it needs of the sums of e_s (s' - t'), e_t (s' - t') and
// e_t t', where s' = (s - base) / T, t' likewise, and e_s and e_t are their exponentials. States of
// the whole vocabulary have one number in their place: KL(q || p) of a far row, else NaN.
enum ShardState {
  kStudentBase,
  kTeacherBase,
  kStudentSum,
  kTeacherSum,
  kReverseSum,
  kForwardSum,
  kEntropySum,
  kStudentSumAt1,
  kShardStates,
  kReverseKL = kReverseSum
};

// Of a row: sums over terms, by softmaxes of the whole vocabulary.
enum ShardSum {
  kValueSum,
  kSlopeSum,
  kShiftSum,      // of q - p
  kLargestSlope,  // in size; stays in its shard
  kStudentEntropySum,
  kTeacherEntropySum,
  kShardSums
};

// Of what it inherits, token_weight is the weight of a row divided by the normalizer, and labels
// are columns of this shard, negative where another process has the label; without labels there is
// no hard-label term. The gradient is that of the terms of kd_weight and ce_weight. kSums writes it
// where slopes are known to sum to 0, and of far rows, whose sums it sets to 0; kGradient writes
// the rest. Rows of weight 0 get zeros everywhere.
struct ShardParams : LogitsParams {
  ShardPhase phase = ShardPhase::kStates;
  bool entropies = false;    // in kSums
  double* states = nullptr;  // (rows, kShardStates), out in kStates, else of the whole vocabulary
  double* sums = nullptr;    // (rows, kShardSums), out in kSums, of the whole one in kGradient
};

// Log-sum-exps of a row's columns that are not listed, or their gradient where one is given.
struct TailParams {
  int64_t rows = 0;
  int64_t vocab = 0;  // the columns that take part
  Rows student;       // (rows, width)
  Rows gradient;      // (rows, student.width), may be the student itself; null data: the tails
  Transform transform;
  float temperature = 1;
  bool at_1 = false;  // also at temperature 1

  // (rows, listed_size), ascending: -1, then different columns below vocab.
  const int64_t* listed = nullptr;
  int64_t listed_size = 0;
  const bool* kept = nullptr;  // (rows,), rows whose tails are asked for; null: all

  // (2 + at_1, rows): a reference, and log sum exp((x - reference) / T) at the temperatures.
  float* tails = nullptr;
  const float* grad_tails = nullptr;   // (1 + at_1, rows), of the log-sum-exps
  const float* grad_listed = nullptr;  // (rows, listed_size), goes into the gradient as it is
};

enum Metric { kDivergence, kCrossEntropy, kTeacherEntropy, kStudentEntropy, kAgreement, kMetrics };

// gradient *= grad_output * row_scale, row by row.
struct ScaleParams {
  int64_t rows = 0;
  Rows gradient;
  const float* grad_output = nullptr;
  int64_t grad_output_stride = 0;    // 0: one number for all rows, else 1
  const float* row_scale = nullptr;  // (rows,)
};

}  // namespace kd
