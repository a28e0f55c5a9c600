// The algorithm of one row pair, for any team of threads and any way to hold or re-read the row:
//
//   1. softmax states of student and teacher (and at T = 1 for the hard-label term) and how far the
//      row is from its teacher, merged over the team
//   2. value and slope of every term; the gradient too where the slopes are known to sum to 0
//   3. otherwise the gradient, once the sum of the slopes is known
//
// The second sweep of a far row (see csrc/core/divergences.h) has simpler terms, or for a KL
// divergence, whose value the first one has, nothing but the gradient.
//
// It follows csrc/cpu/rows.h; options most calls do not use exist in kernels of their own.
#pragma once

#include <type_traits>

#include "columns.h"
#include "probabilities.h"
#include "rows_params.h"

namespace kd::cuda {

template <class Divergence, class Row, bool kOptions>
class RowPair {
 public:
  KD_DEVICE RowPair(const RowsParams<Divergence>& params, const Team& team, Row& row, int64_t index)
      : params_(params), team_(team), row_(row), index_(index) {}

  KD_DEVICE void run(float weight) {
    if (kOptions) row_.reads_teacher = uses_divergence();
    row_.load();
    // What else is in memory, once the row is on its way.
    set_scales(weight);
    const float label_logit = this->label_logit();  // before the gradient may overwrite it
    row_.wait_until_loaded();
    read_states();
    const bool both_valid = student().valid() && teacher().valid();
    const bool kd_gradient = row_.gradient && (!kOptions || params_.kd_weight != 0);
    // Filled by other threads than would store it, so nothing may be stored before.
    const bool gradient_is_nan =
        (kd_gradient && !both_valid) ||
        (kOptions && ce_scale_ != 0 && !(state_at_1_.valid() && label_in_range()));
    const float cross_entropy = uses_cross_entropy() ? this->cross_entropy(label_logit) : 0;
    if (kOptions && params_.metrics) read_entropies();  // before the gradient may overwrite them
    if (!uses_divergence())
      divergence_ = 0;
    else if (both_valid)
      sweep(kd_gradient && !gradient_is_nan);

    if (row_.gradient) {
      if (gradient_is_nan)
        fill(team_, row_.gradient, row_.dtype(), 0, params_.vocab, NAN);
      else if (kOptions && !kd_gradient)
        hard_label_gradient();
      fill(team_, row_.gradient, row_.dtype(), params_.vocab, params_.gradient.width, 0);
    }
    if (team_.first() == 0) write_results(cross_entropy, both_valid);
  }

 private:
  KD_DEVICE void set_scales(float weight) {
    float scale = params_.row_scale ? params_.gradient_scale : weight * inverse_normalizer();
    if (kOptions && !student_softcap()) scale *= params_.student_transform.scale;
    kd_scale_ = scale * params_.kd_weight * params_.inverse_temperature;
    if (kOptions && params_.labels) ce_scale_ = scale * params_.ce_weight;
  }

  KD_DEVICE float weight() const {
    return params_.token_weight ? params_.token_weight[index_] : 1.0f;
  }
  KD_DEVICE float inverse_normalizer() const {
    return reciprocal((params_.normalizer ? *params_.normalizer : 1.0) * params_.divisor);
  }

  KD_DEVICE bool uses_divergence() const {
    return !kOptions || params_.kd_weight != 0 || params_.metrics;
  }
  KD_DEVICE bool uses_cross_entropy() const {
    return kOptions && params_.labels && (params_.ce_weight != 0 || params_.metrics);
  }
  KD_DEVICE bool student_softcap() const { return params_.student_transform.softcap > 0; }

  KD_DEVICE int64_t label() const { return params_.labels[index_]; }
  KD_DEVICE bool label_in_range() const { return label() >= 0 && label() < params_.vocab; }

  // NaN for a label outside the vocabulary.
  KD_DEVICE float label_logit() const {
    if (!uses_cross_entropy() || !label_in_range()) return NAN;
    float x[1] = {load_1(row_.student, label(), row_.dtype())};
    apply(params_.student_transform, x);
    return x[0];
  }

  KD_DEVICE float cross_entropy(float label_logit) const {
    if (!state_at_1_.valid()) return NAN;
    return state_at_1_.max - label_logit + state_at_1_.log_sum(kLog2E);
  }

  KD_DEVICE void read_states() {
    RunningPair<Divergence, typename Row::Total> pair(params_.c);
    Running<Sum> at_1(kLog2E);
    Top student_top, teacher_top;
    const bool apart = uses_cross_entropy() && params_.temperature != 1;
    constexpr bool kMaxFirst = Row::kHeld && !kOptions;
    if constexpr (kMaxFirst) {
      pair.student.rise(row_.max_of_student());
      pair.teacher.rise(row_.max_of_teacher());
      row_.for_each([&](const auto&, auto& s, auto& t) { pair.add(s, t); });
    } else {
      const auto read_student = [&](const auto& place, auto& s) {
        if constexpr (kOptions) {
          if (params_.metrics) student_top.push(s, place);
          apply(params_.student_transform, s);
          if (apart) at_1.push(s);
        }
      };
      if (uses_divergence())
        row_.for_each([&](const auto& place, auto& s, auto& t) {
          read_student(place, s);
          if constexpr (kOptions) {
            if (params_.metrics) teacher_top.push(t, place);
            apply(params_.teacher_transform, t);
          }
          pair.push(s, t);
        });
      else
        row_.for_each_of_student([&](const auto& place, auto& s) {
          read_student(place, s);
          pair.student.push(s);
        });
    }

    team_.wait_until_all_entered();
    team_.template tell<Divergence>(team_.mine().pair,
                                    warp_merge<Divergence>(pair.state(), params_.c));
    if constexpr (kOptions) {
      if (apart) team_.tell(team_.mine().student_at_1, warp_merge(at_1.state(), kLog2E));
      if (params_.metrics) {
        team_.tell(team_.mine().student_top, warp_top(student_top));
        team_.tell(team_.mine().teacher_top, warp_top(teacher_top));
      }
    }
    team_.arrive();
    team_.wait();
    if (team_.in_first_warp()) merge_slots(apart);
    __syncthreads();
    const WarpSlot& all = team_.all();
    pair_ = all.pair;
    if constexpr (kOptions) {
      state_at_1_ = apart ? all.student_at_1 : student();
      agree_ = all.student_top.column == all.teacher_top.column;
    }
  }

  // For all warps of the CTA.
  KD_DEVICE void merge_slots(bool apart) {
    PairState pair;
    State at_1;
    Top student_top, teacher_top;
    team_.for_slots([&](const WarpSlot& slot) {
      pair.merge(slot.pair, params_.c);
      if (apart) at_1.merge(slot.student_at_1, kLog2E);
      if (kOptions && params_.metrics) {
        student_top.push(slot.student_top);
        teacher_top.push(slot.teacher_top);
      }
    });
    pair = warp_merge<Divergence>(pair, params_.c);
    if (apart) at_1 = warp_merge(at_1, kLog2E);
    if (kOptions && params_.metrics) {
      student_top = warp_top(student_top);
      teacher_top = warp_top(teacher_top);
    }
    if (team_.lane != 0) return;
    WarpSlot& all = team_.all();
    all.pair = pair;
    if constexpr (kOptions) {
      all.student_at_1 = at_1;
      all.student_top = student_top;
      all.teacher_top = teacher_top;
    }
  }

  KD_DEVICE const State& student() const { return pair_.student; }
  KD_DEVICE const State& teacher() const { return pair_.teacher; }

  KD_DEVICE Probabilities probabilities() const {
    return {params_.c, params_.inverse_temperature, student(), teacher()};
  }

  KD_DEVICE void read_entropies() {
    const Probabilities probabilities = this->probabilities();
    Sum student, teacher;
    row_.for_each_of_student([&](const auto&, auto& s) {
      apply(params_.student_transform, s);
      for (float& x : s) x = times_or_zero(probabilities.q(x), probabilities.log_q(x));
      student.add(sum_of(s));
    });
    row_.for_each_of_teacher([&](const auto&, auto& t) {
      apply(params_.teacher_transform, t);
      for (float& x : t) x = times_or_zero(probabilities.p(x), probabilities.log_p(x));
      teacher.add(sum_of(t));
    });
    team_.tell(team_.mine().entropies[0], warp_sum(student.value()));
    team_.tell(team_.mine().entropies[1], warp_sum(teacher.value()));
    team_.arrive();
    team_.wait();
    double sums[2] = {};
    team_.for_slots([&](const WarpSlot& slot) {
      sums[0] += slot.entropies[0];
      sums[1] += slot.entropies[1];
    });
    sums[0] = warp_sum(sums[0]), sums[1] = warp_sum(sums[1]);
    if (pair_.student.valid()) student_entropy_ = (float)-sums[0];
    if (pair_.teacher.valid()) teacher_entropy_ = (float)-sums[1];
  }

  // What the second sweep adds up.
  struct Sums {
    typename Row::Total value, slope, shift;
  };

  KD_DEVICE bool is_far(double divergence) const {
    return divergence > params_.term.far_from() && divergence <= FLT_MAX;
  }

  // Sweep 2, and 3 where the divergence needs one.
  KD_DEVICE void sweep(bool with_gradient) {
    if constexpr (Divergence::kIsKL) {
      const KL kl(pair_, params_.c);
      const double forward = params_.term.forward(), reverse = params_.term.reverse();
      const double value = ((Divergence::kForward ? forward * kl.forward : 0) +
                            (Divergence::kReverse ? reverse * kl.reverse : 0)) *
                           kNatsPerBit;
      if (is_far(value)) {
        divergence_ = Divergence::kAddsEntropy ? value + kl.entropy * kNatsPerBit : value;
        if (with_gradient) kl_gradient(kl);
        return;
      }
    } else if (params_.term.has_far()) {
      const KL kl(pair_, params_.c);
      if (is_far(kl.forward * kNatsPerBit)) {
        const FarProbabilities probabilities(params_.c, pair_, kl, params_.term.far_weights());
        const double slope_sum = term_sweep(probabilities, false);
        divergence_ *= params_.term.far_unit();
        if (is_far(divergence_)) {
          if (with_gradient) gradient_sweep(probabilities, slope_sum);
          return;
        }
        if constexpr (Row::kKeeps) row_.load(), row_.wait_until_loaded();  // slopes took its place
      }
    }
    const Probabilities probabilities = this->probabilities();
    const double slope_sum = term_sweep(probabilities, with_gradient);
    if constexpr (!Divergence::kSlopeSumsToZero)
      if (with_gradient) gradient_sweep(probabilities, slope_sum);
  }

  template <class Points>
  static constexpr bool is_far_v = std::is_same_v<Points, FarProbabilities>;

  KD_DEVICE Term<float> term(const Probabilities&, const Point<float>& point) const {
    return params_.term(point);
  }
  KD_DEVICE Term<float> term(const FarProbabilities&, const Point<float>& point) const {
    return params_.term.far(point);
  }

  // Sets the divergence and returns the sum of the slopes, both in units of far_unit() for a far
  // row. Writes the gradient where the slopes are known to sum to 0.
  template <class Points>
  KD_DEVICE double term_sweep(const Points& probabilities, bool with_gradient) {
    constexpr bool kFeelsShift = Divergence::kFeelsShift && !is_far_v<Points>;
    Sums sums;
    row_.refresh();
    row_.for_each([&](const auto& place, auto& s, auto& t) {
      constexpr int n = std::decay_t<decltype(place)>::kCount;
      float raw[n];
      transform(s, t, raw);
      float values[n], slopes[n];
      [[maybe_unused]] float shifts[n];
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const Point<float> point = probabilities(s[i], t[i]);
        const Term<float> term = this->term(probabilities, point);
        values[i] = term.value;
        slopes[i] = term.slope;
        if constexpr (kFeelsShift) shifts[i] = bregman(point.p, point.q, point.r).difference;
      }
      sums.value.add(sum_of(values));
      if constexpr (!Divergence::kSlopeSumsToZero) sums.slope.add(sum_of(slopes));
      if constexpr (kFeelsShift) sums.shift.add(sum_of(shifts));
      if constexpr (Divergence::kSlopeSumsToZero) {
        if (with_gradient) {
#pragma unroll
          for (int i = 0; i < n; ++i) slopes[i] *= kd_scale_;
          finish_gradient(place, raw, s, slopes);
        }
      } else if constexpr (Row::kKeeps) {
        row_.keep(place, slopes);
      }
    });
    return add_up<is_far_v<Points>>(sums, with_gradient);
  }

  // Sums over the team; returns that of the slopes. A finished gradient leaves in between: before
  // the others are told they would have to wait for it.
  template <bool kFar>
  KD_DEVICE double add_up(const Sums& sums, [[maybe_unused]] bool with_gradient) {
    constexpr bool kFeelsShift = Divergence::kFeelsShift && !kFar;
    constexpr int kCount = kFeelsShift ? 3 : Divergence::kSlopeSumsToZero ? 1 : 2;
    const double mine[] = {sums.value.value(), sums.slope.value(), sums.shift.value()};
    double all[3] = {};
#pragma unroll
    for (int i = 0; i < kCount; ++i) team_.tell(team_.mine().sums[kFar][i], warp_sum(mine[i]));
    team_.arrive();
    if constexpr (Divergence::kSlopeSumsToZero)
      if (with_gradient) row_.store_gradient();
    team_.wait();
    team_.for_slots([&](const WarpSlot& slot) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) all[i] += slot.sums[kFar][i];
    });
#pragma unroll
    for (int i = 0; i < kCount; ++i) all[i] = warp_sum(all[i]);
    divergence_ = all[0];
    // sum q - p is 0; what it comes to is how far rounding of the softmax sums moved all log q.
    if constexpr (kFeelsShift) {
      if (all[1] <= FLT_MAX && all[1] >= -FLT_MAX) divergence_ -= all[2] * all[1];
      if (divergence_ < 0) divergence_ = 0;
    }
    return all[1];
  }

  // Of a far row by a KL divergence: forward (q - p) + reverse q (log q - log p - KL(q || p)).
  KD_DEVICE void kl_gradient(const KL& kl) {
    const float forward = params_.term.forward(), reverse = params_.term.reverse();
    const float reverse_kl = (float)(kl.reverse * kNatsPerBit);
    const float scale =
        kd_scale_ * (Divergence::kReverse ? fit_float16_range(reverse * reverse_kl) : 1);
    const float c = opaque(params_.c), s_shift = opaque(student().shift(c)),
                t_shift = opaque(teacher().shift(c));
    const float s_scale = scale * reciprocal(student().sum);
    const float of_p = scale * forward * reciprocal(teacher().sum);
    const float of_gap = (float)kNatsPerBit * reverse * s_scale;
    float of_q = forward * s_scale;
    if constexpr (Divergence::kReverse) of_q += (float)(kl.offset - kl.reverse) * of_gap;
    row_.refresh();
    row_.for_each([&](const auto& place, auto& s, auto& t) {
      constexpr int n = std::decay_t<decltype(place)>::kCount;
      float raw[n], gradient[n];
      transform(s, t, raw);
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const float s_x = fmaf(s[i], c, -s_shift), t_x = fmaf(t[i], c, -t_shift);
        gradient[i] =
            exp2_approx(s_x) * (Divergence::kReverse ? fmaf(s_x - t_x, of_gap, of_q) : of_q);
        if constexpr (Divergence::kForward)
          gradient[i] = fmaf(-exp2_approx(t_x), of_p, gradient[i]);
      }
      finish_gradient(place, raw, s, gradient);
    });
    row_.store_gradient();
  }

  template <class Points>
  KD_DEVICE void gradient_sweep(const Points& before, double sum) {
    const Points probabilities = before.again();
    // The probabilities sum to 1 up to the rounding of s_inverse.
    const double total = (double)probabilities.s_inverse * student().sum;
    const float slope_sum = (float)(sum * (2 - total));
    // Covers NaN and both infinities: an infinite divergence of q has no gradient.
    if (!(abs(slope_sum) <= FLT_MAX))
      return fill(team_, row_.gradient, row_.dtype(), 0, params_.vocab, NAN);
    float scale = kd_scale_ * fit_float16_range(slope_sum);
    if constexpr (is_far_v<Points>) scale *= (float)params_.term.far_unit();
    row_.refresh();
    if constexpr (Row::kKeeps) {
      row_.for_each_kept([&](const auto& place, auto& s, auto& slopes) {
        constexpr int n = std::decay_t<decltype(place)>::kCount;
        float raw[n];
        transform_student(s, raw);
#pragma unroll
        for (int i = 0; i < n; ++i)
          slopes[i] = (slopes[i] - probabilities.q(s[i]) * slope_sum) * scale;
        finish_gradient(place, raw, s, slopes);
      });
    } else {
      row_.for_each([&](const auto& place, auto& s, auto& t) {
        constexpr int n = std::decay_t<decltype(place)>::kCount;
        float raw[n], gradient[n];
        transform(s, t, raw);
#pragma unroll
        for (int i = 0; i < n; ++i) {
          const Point<float> point = probabilities(s[i], t[i]);
          gradient[i] =
              (term(probabilities, point).slope - probabilities.q(s[i]) * slope_sum) * scale;
        }
        finish_gradient(place, raw, s, gradient);
      });
    }
    row_.store_gradient();
  }

  // The slopes of reverse KL are as large as its value, which has no bound: a float16 row takes
  // another power of two then. Returns the factor for kd_scale_ and applies it to the rest.
  KD_DEVICE float fit_float16_range(float slope_sum) {
    if (!params_.row_scale || abs(slope_sum) < 1) return 1;
    range_factor_ = exp2f((float)-ilogbf(slope_sum));
    ce_scale_ *= range_factor_;
    return range_factor_;
  }

  KD_DEVICE void hard_label_gradient() {
    row_.refresh();
    row_.for_each_of_student([&](const auto& place, auto& s) {
      constexpr int n = std::decay_t<decltype(place)>::kCount;
      float raw[n], gradient[n] = {};
      transform_student(s, raw);
      finish_gradient(place, raw, s, gradient);
    });
    row_.store_gradient();
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

  // Adds the hard-label term, applies the softcap's derivative and hands over.
  template <class Place, int n>
  KD_DEVICE void finish_gradient(const Place& place, const float (&raw)[n], const float (&s)[n],
                                 float (&gradient)[n]) {
    if constexpr (kOptions) {
      if (ce_scale_ != 0) {
        const float scale = ce_scale_ * reciprocal(state_at_1_.sum);
#pragma unroll
        for (int i = 0; i < n; ++i) {
          gradient[i] =
              fmaf(exp2_approx(fmaf(s[i], kLog2E, -state_at_1_.shift(kLog2E))), scale, gradient[i]);
          if (place.column(i) == label()) gradient[i] -= ce_scale_;
        }
      }
      if (student_softcap()) chain_softcap(params_.student_transform, raw, gradient);
    }
    row_.put_gradient(place, gradient);
  }

  KD_DEVICE void write_results(float cross_entropy, bool both_valid) const {
    double loss = 0;  // a term of weight 0 may be infinite
    if (params_.kd_weight != 0) loss += params_.kd_weight * divergence_;
    if (kOptions && params_.ce_weight != 0) loss += (double)params_.ce_weight * cross_entropy;
    params_.loss[index_] = (float)(weight() * loss);
    if (params_.row_scale)
      params_.row_scale[index_] =
          weight() * inverse_normalizer() / (params_.gradient_scale * range_factor_);
    if (!kOptions || !params_.metrics) return;
    metric(kDivergence) = (float)divergence_;
    metric(kCrossEntropy) = cross_entropy;
    metric(kTeacherEntropy) = teacher_entropy_;
    metric(kStudentEntropy) = student_entropy_;
    metric(kAgreement) = both_valid ? agree_ : NAN;
  }

  KD_DEVICE float& metric(Metric which) const {
    return params_.metrics[which * params_.rows + index_];
  }

  const RowsParams<Divergence>& params_;
  const Team& team_;
  Row& row_;
  const int64_t index_;
  float kd_scale_, ce_scale_ = 0;  // what a term's gradient is multiplied by
  float range_factor_ = 1;         // see fit_float16_range
  PairState pair_;
  State state_at_1_;
  bool agree_ = false;
  float student_entropy_ = NAN, teacher_entropy_ = NAN;
  double divergence_ = NAN;
};

}  // namespace kd::cuda
