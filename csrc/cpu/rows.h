// The CPU algorithm, once for every instruction set. A row pair is read in blocks, up to three
// times, the later times from cache:
//
//   1. softmax states of student and teacher (and at T = 1 for the hard-label term)
//   2. value and slope of every term; the gradient too where the slopes are known to sum to 0
//   3. otherwise the gradient, from slopes and probabilities kept in scratch rows
//
// Options most calls do not use (labels, softcap, metrics) are loops over a block of their own.
#pragma once

#include <cmath>

#include "softmax.h"

#include "../core/divergences.h"
#include "kernel.h"

namespace kd::KD_NAMESPACE {

template <class Divergence>
class RowPair {
 public:
  RowPair(const LogitsParams& params, int64_t row, float weight, double normalizer, float* scratch)
      : params_(params),
        row_(row),
        weight_(weight),
        student_(params.student, row, params.student_transform),
        teacher_(params.teacher, row, params.teacher_transform),
        gradient_(params.gradient, row),
        slopes_(scratch),
        probabilities_(scratch + scratch_row(params.vocab)) {
    double scale = weight / normalizer;
    if (params.row_scale) {
      params.row_scale[row] = (float)(scale / params.gradient_scale);
      scale = params.gradient_scale;
    }
    if (!student_.has_softcap()) scale *= params.student_transform.scale;
    kd_scale_ = (float)(scale * params.kd_weight / params.temperature);
    ce_scale_ = params.labels ? (float)(scale * params.ce_weight) : 0;
  }

  // The row's loss times its weight; its gradient and metrics on the way.
  template <bool kGradient>
  double run() {
    read_states();
    const bool both_valid = student_state_.valid() && teacher_state_.valid();
    const bool kd_gradient = kGradient && params_.kd_weight != 0;
    // Before the sweeps: the gradient may overwrite the student.
    const double cross_entropy = uses_cross_entropy() ? this->cross_entropy() : 0;
    if (params_.metrics) write_metrics(cross_entropy, both_valid);
    double divergence = NAN;
    if (!uses_divergence())
      divergence = 0;
    else if (both_valid)
      divergence = kd_gradient ? sweep<true>() : sweep<false>();
    if (params_.metrics) metric(kDivergence) = (float)divergence;

    if (kGradient) {
      if ((kd_gradient && !both_valid) || (ce_scale_ != 0 && !state_at_1_.valid()))
        gradient_.fill(0, params_.vocab, NAN);
      else if (!kd_gradient)
        hard_label_gradient();
      gradient_.fill(params_.vocab, gradient_.width(), 0);
    }
    double loss = 0;  // a term of weight 0 may be infinite
    if (params_.kd_weight != 0) loss += params_.kd_weight * divergence;
    if (params_.ce_weight != 0) loss += params_.ce_weight * cross_entropy;
    return weight_ * loss;
  }

 private:
  bool uses_divergence() const { return params_.kd_weight != 0 || params_.metrics; }
  bool uses_cross_entropy() const {
    return params_.labels && (params_.ce_weight != 0 || params_.metrics);
  }
  bool reads_student_for_gradient() const { return ce_scale_ != 0 || student_.has_softcap(); }

  void read_states() {
    const bool apart = uses_cross_entropy() && params_.temperature != 1;
    for_blocks(params_.vocab, [&](int64_t begin, int n) {
      student_.view(begin, n, student_block_, [&](const auto& s) {
        push_block(student_state_, s, n, c_, student_.upcoming(begin + n));
        if (apart) push_block(state_at_1_, s, n, kLog2E, student_.upcoming(begin + n));
      });
      if (!uses_divergence()) return;
      teacher_.view(begin, n, teacher_block_, [&](const auto& t) {
        push_block(teacher_state_, t, n, c_, teacher_.upcoming(begin + n));
      });
    });
    if (!apart) state_at_1_ = student_state_;
  }

  double cross_entropy() const {
    if (!state_at_1_.valid()) return NAN;
    return (double)state_at_1_.max - student_.at(label()) + ::log(state_at_1_.sum);
  }

  int64_t label() const { return params_.labels[row_]; }

  // Sweep 2, and 3 where the divergence needs one; returns the divergence.
  template <bool kGradient>
  double sweep() {
    const bool shifted = ::fabsf(student_state_.max - teacher_state_.max) > 4;
    return shifted ? sweep<kGradient, true>() : sweep<kGradient, false>();
  }

  template <bool kGradient, bool kShifted>
  double sweep() {
    const Divergence divergence(params_.parameters[0], params_.parameters[1]);
    const float s_max = student_state_.max, t_max = teacher_state_.max;
    const Exponent s_exponent(s_max, c_), t_exponent(t_max, c_);
    const float s_inverse = (float)(s_exponent.correction / student_state_.sum);
    const float t_inverse = (float)(t_exponent.correction / teacher_state_.sum);
    const float s_log_sum = (float)::log(student_state_.sum);
    const float t_log_sum = (float)::log(teacher_state_.sum);
    const float inverse_temperature = 1 / params_.temperature;

    // log q - log p = ((s - s_origin) - (t - t_origin)) / T + offset. Origins of 0 keep s - t exact
    // for close logits; a large shift between the models would cost digits, so it goes first.
    const float s_origin = kShifted ? s_max : 0, t_origin = kShifted ? t_max : 0;
    const float offset =
        (float)((((double)t_max - t_origin) - ((double)s_max - s_origin)) / params_.temperature +
                ::log(teacher_state_.sum / student_state_.sum));

    double value_sum = 0, slope_sum = 0, shift_sum = 0;
    for_blocks(params_.vocab, [&](int64_t begin, int n) {
      const float* s = student_.block(begin, n, student_block_);
      const float* t = teacher_.block(begin, n, teacher_block_);
      float* g = kGradient && Divergence::kSlopeSumsToZero ? gradient_target(begin, n) : nullptr;
      Vec values = {}, slopes = {}, shifts = {};
      for (int i = 0; i < n; i += kLanes) {
        const Vec x = load(s + i), y = load(t + i);
        Point<Vec> point;
        point.p = t_exponent(y) * t_inverse;
        point.q = s_exponent(x) * s_inverse;
        point.log_p = (y - t_max) * inverse_temperature - t_log_sum;
        point.log_q = (x - s_max) * inverse_temperature - s_log_sum;
        // NaN where both are -inf; a divergence never lets r past p = q = 0.
        const Vec apart = kShifted ? (x - s_origin) - (y - t_origin) : x - y;
        point.r = apart * inverse_temperature + offset;
        const Term<Vec> term = divergence(point);
        values += term.value;
        if constexpr (Divergence::kFeelsShift) {
          const Vec difference = bregman(point.p, point.q, point.r).difference;
          shifts += difference;
          if constexpr (!kGradient) slopes += term.slope;
        }
        if constexpr (kGradient && Divergence::kSlopeSumsToZero) {
          store(g + i, term.slope * kd_scale_);
        } else if constexpr (kGradient) {
          store(slopes_ + begin + i, term.slope);
          store(probabilities_ + begin + i, point.q);
          slopes += term.slope;
        }
      }
      value_sum += sum(values);
      if constexpr (Divergence::kFeelsShift) {
        shift_sum += sum(shifts);
        if constexpr (!kGradient) slope_sum += sum(slopes);
      }
      if constexpr (kGradient && Divergence::kSlopeSumsToZero)
        finish_gradient(begin, n, s, g);
      else if constexpr (kGradient)
        slope_sum += sum(slopes);
    });
    // sum q - p is 0; what it comes to is how far rounding of the softmax sums moved all log q.
    if constexpr (Divergence::kFeelsShift) {
      if (::fabs(slope_sum) <= FLT_MAX) value_sum -= shift_sum * slope_sum;
      if (value_sum < 0) value_sum = 0;
    }
    // The probabilities sum to 1 up to the rounding of s_inverse, known exactly here.
    const double total = s_inverse * (student_state_.sum / s_exponent.correction);
    if constexpr (kGradient && !Divergence::kSlopeSumsToZero)
      gradient_sweep((float)(slope_sum / total));
    return value_sum;
  }

  void gradient_sweep(float slope_sum) {
    // Covers NaN and both infinities: an infinite divergence of q has no gradient.
    if (!(::fabsf(slope_sum) <= FLT_MAX)) return gradient_.fill(0, params_.vocab, NAN);
    const float scale = kd_scale_ * fit_float16_range(slope_sum);
    for_blocks(params_.vocab, [&](int64_t begin, int n) {
      float* g = gradient_target(begin, n);
      for (int i = 0; i < n; i += kLanes) {
        const Vec slope = load(slopes_ + begin + i), q = load(probabilities_ + begin + i);
        store(g + i, (slope - q * slope_sum) * scale);
      }
      const float* s =
          reads_student_for_gradient() ? student_.block(begin, n, student_block_) : nullptr;
      finish_gradient(begin, n, s, g);
    });
  }

  // The slopes of reverse KL are as large as its value, which has no bound: a float16 row takes
  // another power of two then. Returns the factor for kd_scale_ and applies it to the rest.
  float fit_float16_range(float slope_sum) {
    if (!params_.row_scale || ::fabsf(slope_sum) < 1) return 1;
    const float factor = ::exp2f((float)-::ilogbf(slope_sum));
    ce_scale_ *= factor;
    params_.row_scale[row_] /= factor;
    return factor;
  }

  void hard_label_gradient() {
    for_blocks(params_.vocab, [&](int64_t begin, int n) {
      for (int i = 0; i < n; i += kLanes) store(gradient_block_ + i, Vec{});
      finish_gradient(begin, n, student_.block(begin, n, student_block_), gradient_block_);
    });
  }

  // Where a block of the gradient is computed. Not in place while the student is still needed.
  float* gradient_target(int64_t begin, int n) {
    float* direct = reads_student_for_gradient() ? nullptr : gradient_.direct(begin, n);
    return direct ? direct : gradient_block_;
  }

  // Adds the hard-label term, applies the softcap's derivative and stores a block.
  void finish_gradient(int64_t begin, int n, const float* s, float* g) {
    if (ce_scale_ != 0) {
      const Exponent exponent(state_at_1_.max, kLog2E);
      const float scale = (float)(ce_scale_ * exponent.correction / state_at_1_.sum);
      for (int i = 0; i < n; i += kLanes) store(g + i, load(g + i) + exponent(load(s + i)) * scale);
      const int64_t label = this->label() - begin;
      if (label >= 0 && label < n) g[label] -= ce_scale_;
    }
    if (student_.has_softcap()) student_.chain_softcap(begin, n, student_block_, g);
    if (g == gradient_block_) gradient_.write(begin, n, g);
  }

  // All but the divergence, which the sweeps give.
  void write_metrics(double cross_entropy, bool both_valid) {
    metric(kCrossEntropy) = (float)cross_entropy;
    metric(kTeacherEntropy) = entropy(teacher_, teacher_state_, teacher_block_);
    metric(kStudentEntropy) = entropy(student_, student_state_, student_block_);
    const bool agree = top_token(student_, params_.vocab, student_block_) ==
                       top_token(teacher_, params_.vocab, teacher_block_);
    metric(kAgreement) = both_valid ? agree : NAN;
  }

  float& metric(Metric which) { return params_.metrics[which * params_.rows + row_]; }

  float entropy(const Reader& reader, const State& state, float* buffer) const {
    if (!state.valid()) return NAN;
    double total = 0;
    for_blocks(params_.vocab, [&](int64_t begin, int n) {
      total += entropy_block(reader.block(begin, n, buffer), n, state.max, c_);
    });
    return (float)(::log(state.sum) - total / kLog2E / state.sum);
  }

  const LogitsParams& params_;
  const int64_t row_;
  const double weight_;
  const Reader student_, teacher_;
  const Writer gradient_;
  float* const slopes_;         // (vocab,)
  float* const probabilities_;  // (vocab,), the student's
  const float c_ = (float)(1.4426950408889634 / params_.temperature);
  float kd_scale_, ce_scale_;  // what a term's gradient is multiplied by
  State student_state_, teacher_state_, state_at_1_;
  alignas(64) float student_block_[kBlock];
  alignas(64) float teacher_block_[kBlock];
  alignas(64) float gradient_block_[kBlock];
};

// A row of weight 0: exact zeros, whatever the logits hold.
inline void write_masked_row(const LogitsParams& params, int64_t row) {
  if (params.gradient.data) {
    const Writer gradient(params.gradient, row);
    gradient.fill(0, gradient.width(), 0);
  }
  if (params.row_scale) params.row_scale[row] = 0;
  if (params.metrics)
    for (int i = 0; i < kMetrics; ++i) params.metrics[i * params.rows + row] = 0;
}

template <class Divergence, bool kGradient>
void run_rows(const LogitsParams& params, const RowPlan& plan, int64_t begin, int64_t end,
              float* scratch) {
  for (int64_t row = begin; row < end; ++row) {
    plan.loss[row] = 0;
    if (plan.weight[row] == 0) {
      write_masked_row(params, row);
    } else {
      RowPair<Divergence> pair(params, row, plan.weight[row], plan.normalizer, scratch);
      plan.loss[row] = pair.template run<kGradient>();
    }
  }
}

template <DType dtype>
void scale_row(char* row, int64_t width, float factor) {
  constexpr int64_t size = item_size(dtype);
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes)
    store_from_float<dtype>(row + i * size, 0, load_as_float<dtype>(row + i * size, 0) * factor);
  if (i == width) return;
  char tail[kLanes * sizeof(float)] = {};
  std::memcpy(tail, row + i * size, (width - i) * size);
  store_from_float<dtype>(tail, 0, load_as_float<dtype>(tail, 0) * factor);
  std::memcpy(row + i * size, tail, (width - i) * size);
}

inline void scale_rows(const ScaleParams& params, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    float factor = params.grad_output[row * params.grad_output_stride];
    if (params.row_scale) factor *= params.row_scale[row];
    if (factor == 1) continue;
    char* data = params.gradient.row(row);
    switch (params.gradient.dtype) {
      case DType::kFloat32:
        scale_row<DType::kFloat32>(data, params.gradient.width, factor);
        break;
      case DType::kBFloat16:
        scale_row<DType::kBFloat16>(data, params.gradient.width, factor);
        break;
      case DType::kFloat16:
        scale_row<DType::kFloat16>(data, params.gradient.width, factor);
        break;
    }
  }
}

constexpr InstructionSet instruction_set(const char* name) {
#define KD_LOSS(name, Divergence) run_rows<Divergence, false>,
#define KD_LOSS_AND_GRADIENT(name, Divergence) run_rows<Divergence, true>,
  return {name, {KD_DIVERGENCES(KD_LOSS)}, {KD_DIVERGENCES(KD_LOSS_AND_GRADIENT)}, scale_rows};
#undef KD_LOSS
#undef KD_LOSS_AND_GRADIENT
}

}  // namespace kd::KD_NAMESPACE
