// A row pair in shards of uneven widths, and what their processes do between the phases.
#pragma once

#include "../cuda/shard.cuh"

#include "rows_case.h"

namespace kd::tests {

// The divergence that a whole row's KL(p || q) and KL(q || p) make, NaN if it has others in it.
template <class Divergence>
double of_kls(const double parameters[2], double forward, double reverse) {
  const Divergence divergence(parameters[0], parameters[1]);
  if constexpr (Divergence::kIsKL)
    return (divergence.forward() ? divergence.forward() * forward : 0) +
           (divergence.reverse() ? divergence.reverse() * reverse : 0);
  return kNaN;
}

struct Entry {
  const char* name;
  void (*run)(ShardParams, void*);
  double (*of_kls)(const double[2], double, double);
  bool feels_shift, writes_in_sums, adds_entropy;
};
#define KD_ENTRY(name, Divergence)     \
  {#name,                              \
   cuda::run_shard<cuda::Divergence>,  \
   of_kls<cuda::Divergence>,           \
   cuda::Divergence::kFeelsShift,      \
   cuda::Divergence::kSlopeSumsToZero, \
   cuda::Divergence::kAddsEntropy},
#if defined(KD_FEW)  // for planted faults, each of which is compiled anew
constexpr Entry kEntries[] = {KD_ENTRY(forward_kl, ForwardKL) KD_ENTRY(reverse_kl, ReverseKL)};
#else
constexpr Entry kEntries[] = {KD_DIVERGENCES(KD_ENTRY)};
#endif

struct ShardCase : Case {
  const Entry* entry = kEntries;
  int shards = 3;
  int hidden = -1;        // this shard is all -inf, in one model or both
  double base_shift = 0;  // of the whole's states: a base need not be a logit
  bool poisoned = false;  // the first row's states
};

inline std::string describe(const ShardCase& c) {
  std::ostringstream text;
  text << "shard " << c.entry->name << '(' << c.parameters[0] << ", " << c.parameters[1] << ") "
       << kLogitsNames[(int)c.logits] << ' ' << c.shards << " of " << c.rows << " x " << c.vocab
       << " dtypes " << (int)c.student << '/' << (int)c.teacher << " padding " << c.student_padding
       << '/' << c.teacher_padding << " off " << c.misaligned[0] << ',' << c.misaligned[1] << ','
       << c.misaligned[2] << " inner " << c.inner_size
       << (!c.gradient  ? " loss only"
           : c.in_place ? " in place"
                        : "")
       << (c.metrics ? " entropies" : "") << (c.labels ? " labels" : "")
       << (c.weights ? " weights" : "") << " T " << c.temperature << " kd " << c.kd_weight << " ce "
       << c.ce_weight << " scale " << c.student_transform.scale << '/' << c.teacher_transform.scale
       << " cap " << c.student_transform.softcap << '/' << c.teacher_transform.softcap << " hidden "
       << c.hidden << " base " << c.base_shift << (c.poisoned ? " poisoned" : "");
  return text.str();
}

// Where shards begin, and the end: uneven, and one of three or more has one column.
inline std::vector<int> cuts_of(int vocab, int shards) {
  const std::vector<double> shares[] = {{}, {}, {0.3}, {0.55, 0}, {}, {0, 0.07, 0.4, 0.1}};
  std::vector<int> cuts{0};
  for (size_t i = 0; i < shares[shards].size(); ++i)
    cuts.push_back(std::min(cuts.back() + std::max(1, (int)(shares[shards][i] * vocab)),
                            vocab - shards + (int)i + 1));
  cuts.push_back(vocab);
  return cuts;
}

// What a process holds.
struct Shard {
  int begin, vocab;
  Matrix student, teacher, gradient;
  std::vector<int64_t> labels;
  std::vector<double> states, sums;
  std::vector<float> row_scale;
  bool wrote_gradient = false;

  Shard(const ShardCase& c, int begin, int end)
      : begin(begin),
        vocab(end - begin),
        student(c.student, c.rows, vocab + c.student_padding, c.misaligned[0], c.inner_size),
        teacher(c.teacher, c.rows, vocab + c.teacher_padding, c.misaligned[1], c.inner_size),
        gradient(c.student, c.rows, vocab + c.student_padding, c.misaligned[2], 0),
        labels(c.rows),
        states(c.rows * kShardStates, NAN),
        sums(c.rows * kShardSums, NAN),
        row_scale(c.rows, NAN) {}
};

// The states of the whole vocabulary, in every shard; returns the divergences of far rows, NaN of
// all others.
inline std::vector<double> merge_states(const ShardCase& c,
                                        std::vector<std::unique_ptr<Shard>>& shards) {
  const double temperature = c.temperature;
  std::vector<double> values;
  for (int row = 0; row < c.rows; ++row) {
    double all[kShardStates] = {-kInf, -kInf};
    for (const auto& shard : shards)
      for (const int base : {kStudentBase, kTeacherBase})
        all[base] = std::max(all[base], shard->states[row * kShardStates + base]);
    for (const auto& shard : shards) {
      const double* const mine = shard->states.data() + row * kShardStates;
      const double at_1 = mine[kStudentBase] - all[kStudentBase], s = at_1 / temperature;
      const double t = (mine[kTeacherBase] - all[kTeacherBase]) / temperature;
      all[kStudentSum] += mine[kStudentSum] * std::exp(s);
      all[kStudentSumAt1] += mine[kStudentSumAt1] * std::exp(at_1);
      all[kTeacherSum] += mine[kTeacherSum] * std::exp(t);
      all[kForwardSum] += (mine[kForwardSum] + mine[kTeacherSum] * (s - t)) * std::exp(t);
      all[kReverseSum] += (mine[kReverseSum] + mine[kStudentSum] * (s - t)) * std::exp(s);
      all[kEntropySum] += (mine[kEntropySum] + mine[kTeacherSum] * t) * std::exp(t);
    }
    const double log_t = std::log(all[kTeacherSum]), offset = log_t - std::log(all[kStudentSum]);
    const double forward = -all[kForwardSum] / all[kTeacherSum] - offset;
    const double reverse = all[kReverseSum] / all[kStudentSum] + offset;
    double value = c.kd_weight == 0 ? kNaN : c.entry->of_kls(c.parameters, forward, reverse);
    if (!cuda::is_far(value, cuda::kFarFrom)) value = kNaN;
    const double entropy = all[kEntropySum];
    all[kForwardSum] = all[kEntropySum] = kNaN;
    all[kReverseKL] = std::isnan(value) ? kNaN : reverse;
    if (c.entry->adds_entropy) value += log_t - entropy / all[kTeacherSum];
    values.push_back(value);
    for (const int base : {kStudentBase, kTeacherBase}) all[base] += c.base_shift;
    for (const int sum : {kStudentSum, kTeacherSum})
      all[sum] *= std::exp(-c.base_shift / temperature);
    all[kStudentSumAt1] *= std::exp(-c.base_shift);
    if (c.poisoned && row == 0) {
      std::fill_n(all, (int)kShardStates, kNaN);
      values.back() = kNaN;
    }
    for (auto& shard : shards)
      std::copy_n(all, (int)kShardStates, shard->states.begin() + row * kShardStates);
  }
  return values;
}

// The sums of the whole vocabulary, in every shard but for the largest slope.
inline void add_sums(const ShardCase& c, std::vector<std::unique_ptr<Shard>>& shards) {
  for (int row = 0; row < c.rows; ++row)
    for (int i = 0; i < kShardSums; ++i) {
      if (i == kLargestSlope) continue;
      double all = 0;
      for (const auto& shard : shards) all += shard->sums[row * kShardSums + i];
      for (auto& shard : shards) shard->sums[row * kShardSums + i] = all;
    }
}

}  // namespace kd::tests
