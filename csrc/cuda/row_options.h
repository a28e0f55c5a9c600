// What a call asks for of a row beside the divergence: weights, scale and softcap, the hard-label
// term, entropies and other metrics.
#pragma once

#include "row_states.h"

namespace kd::cuda {

template <class Divergence, class Row, bool kOptions>
class RowOptions : protected RowStates<Divergence, Row, kOptions> {
 protected:
  using Base = RowStates<Divergence, Row, kOptions>;
  using Base::index_;
  using Base::inverse_normalizer;
  using Base::params_;
  using Base::row_;
  using Base::student;
  using Base::summary;
  using Base::teacher;
  using Base::team_;
  using Base::uses_cross_entropy;
  using Base::weight;

  using Base::Base;

  KD_DEVICE void set_scales() {
    float scale = summary().scale;
    if (kOptions && !student_softcap()) scale *= params_.student_transform.scale;
    kd_scale_ = scale * params_.kd_weight * params_.inverse_temperature;
    if (kOptions && params_.labels) ce_scale_ = scale * params_.ce_weight;
  }

  KD_DEVICE const State& state_at_1() const { return summary().student_at_1; }

  KD_DEVICE bool student_softcap() const { return params_.student_transform.softcap > 0; }

  KD_DEVICE bool label_in_range() const { return is_label_in_range(params_, index_); }

  // NaN for a label outside the vocabulary.
  KD_DEVICE float label_logit() const {
    if (!uses_cross_entropy() || !label_in_range()) return NAN;
    float x[1] = {load_1(row_.student, params_.labels[index_], row_.dtype())};
    apply(params_.student_transform, x);
    return x[0];
  }

  KD_DEVICE float cross_entropy(float label_logit) const {
    if (!state_at_1().valid()) return NAN;
    return not_below_0(state_at_1().max - label_logit + state_at_1().log_sum(kLog2E));
  }

  // What rounding may take there; NaN stays.
  static KD_DEVICE float not_below_0(float x) { return x < 0 ? 0 : x; }

  KD_DEVICE Probabilities probabilities() const {
    return {params_.c, params_.inverse_temperature, student(), teacher()};
  }

  // Sums of q log q and p log p over the team.
  KD_DEVICE Entropies entropies() {
    const Probabilities probabilities = this->probabilities();
    Sum of_q, of_p;
    row_.for_each_of_student([&](const auto&, auto& s) {
      apply(params_.student_transform, s);
      for (float& x : s) x = times_or_zero(probabilities.q_of(x), probabilities.log_q(x));
      of_q.add(sum_of(s));
    });
    row_.for_each_of_teacher([&](const auto&, auto& t) {
      apply(params_.teacher_transform, t);
      for (float& x : t) x = times_or_zero(probabilities.p_of(x), probabilities.log_p(x));
      of_p.add(sum_of(t));
    });
    team_.tell(kOfEntropies, team_.mine().entropies,
               {warp_sum(of_q.value()), warp_sum(of_p.value())});
    team_.wait(kOfEntropies);
    Entropies sums;
    team_.for_slots([&](const WarpSlot& slot) {
      sums.student += slot.entropies.student;
      sums.teacher += slot.entropies.teacher;
    });
    return {warp_sum(sums.student), warp_sum(sums.teacher)};
  }

  KD_DEVICE void write_entropies() {
    const Entropies sums = entropies();
    if (team_.thread() == 0) {
      metric(kStudentEntropy) = student().valid() ? not_below_0((float)-sums.student) : NAN;
      metric(kTeacherEntropy) = teacher().valid() ? not_below_0((float)-sums.teacher) : NAN;
    }
  }

  // Scale and softcap, keeping the student's raw logits for the softcap's derivative.
  template <int n>
  KD_DEVICE void transform_student(float (&s)[n], float (&raw)[n]) const {
    if constexpr (kOptions) {
#pragma unroll
      for (int i = 0; i < n; ++i) raw[i] = s[i];
      apply(params_.student_transform, s);
    }
  }
  template <int n>
  KD_DEVICE void transform(float (&s)[n], float (&t)[n], float (&raw)[n]) const {
    transform_student(s, raw);
    if constexpr (kOptions) apply(params_.teacher_transform, t);
  }

  // Adds the hard-label term and applies the softcap's derivative.
  template <class Place, int n>
  KD_DEVICE void finish_gradient(const Place& place, const float (&raw)[n], const float (&s)[n],
                                 float (&gradient)[n]) {
    if constexpr (kOptions) {
      if (ce_scale_ != 0) {
        const float scale = ce_scale_ * summary().inverse_at_1, shift = state_at_1().shift(kLog2E);
#pragma unroll
        for (int i = 0; i < n; ++i) {
          gradient[i] = fmaf(exp2_approx(fmaf(s[i], kLog2E, -shift)), scale, gradient[i]);
          if (place.column(i) == summary().label) gradient[i] -= ce_scale_;
        }
      }
      if (student_softcap()) chain_softcap(params_.student_transform, raw, gradient);
    }
  }

  KD_DEVICE void write_row_scale() const {
    if (params_.row_scale)
      params_.row_scale[index_] =
          weight() * inverse_normalizer() / (params_.gradient_scale * range_factor_);
  }

  KD_DEVICE void write_results(double divergence, float cross_entropy, bool both_valid) const {
    double loss = 0;  // a term of weight 0 may be infinite
    if (kOptions && !label_in_range()) loss = NAN;
    if (params_.kd_weight != 0) loss += params_.kd_weight * divergence;
    if (kOptions && params_.ce_weight != 0) loss += (double)params_.ce_weight * cross_entropy;
    params_.loss[index_] = (float)(weight() * loss);
    write_row_scale();
    if (!kOptions || !params_.metrics) return;
    metric(kDivergence) = (float)divergence;
    metric(kCrossEntropy) = cross_entropy;
    metric(kAgreement) = both_valid ? summary().agree : NAN;
  }

  KD_DEVICE float& metric(Metric which) const {
    return params_.metrics[which * params_.rows + index_];
  }

  float kd_scale_, ce_scale_ = 0;  // what a term's gradient is multiplied by
  float range_factor_ = 1;         // of a float16 row, see fit_float16_range
};

}  // namespace kd::cuda
