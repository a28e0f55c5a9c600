// The algorithm of one row pair, for any team of threads and any way to hold or re-read the row:
//
//   1. softmax states of student and teacher (row_states.h)
//   2. value and slope of every term; the gradient too where the slopes are known to sum to 0
//   3. otherwise the gradient, once the sum of the slopes is known
//
// The second sweep of a far row (see csrc/core/divergences.h) has simpler terms, or for a KL
// divergence, whose value the first one has, nothing but the gradient.
//
// It follows csrc/cpu/rows.h; options most calls do not use exist in kernels of their own.
#pragma once

#include "row_options.h"

namespace kd::cuda {

template <class Divergence, class Row, bool kOptions>
class RowPair : protected RowOptions<Divergence, Row, kOptions> {
 protected:
  using Base = RowOptions<Divergence, Row, kOptions>;
  using Base::ce_scale_;
  using Base::kd_scale_;
  using Base::label_in_range;
  using Base::params_;
  using Base::range_factor_;
  using Base::row_;
  using Base::state_at_1;
  using Base::student;
  using Base::summary;
  using Base::teacher;
  using Base::team_;
  using Base::uses_cross_entropy;
  using Base::uses_divergence;

 public:
  using Base::Base;

  KD_DEVICE void run() {
    row_.load();
    if constexpr (Row::kHeld) row_.fetch_later(params_, team_, this->index_);
    const float label_logit = this->label_logit();
    row_.wait_until_loaded();
    this->read_states(label_logit);
    this->set_scales();
    const bool both_valid = student().valid() && teacher().valid();
    const bool kd_gradient = row_.gradient && (!kOptions || params_.kd_weight != 0);
    // Filled by other threads than would store it, so nothing may be stored before.
    const bool gradient_is_nan =
        (kd_gradient && !both_valid) ||
        (kOptions && (!label_in_range() || (ce_scale_ != 0 && !state_at_1().valid())));
    const float cross_entropy = uses_cross_entropy() ? this->cross_entropy(label_logit) : 0;
    if (kOptions && params_.metrics)
      this->write_entropies();  // before the gradient may overwrite logits
    if (!uses_divergence())
      divergence_ = 0;
    else if (both_valid)
      sweep(kd_gradient && !gradient_is_nan);

    if (row_.gradient) {
      if (gradient_is_nan)
        fill_vocab_with_nan();
      else if (kOptions && !kd_gradient)
        hard_label_gradient();
      clear_padding();
    }
    if (team_.thread() == 0) this->write_results(divergence_, cross_entropy, both_valid);
  }

 protected:
  KD_DEVICE void fill_vocab_with_nan() const {
    fill(team_, row_.gradient, row_.dtype(), 0, params_.vocab, NAN);
  }
  KD_DEVICE void clear_padding() const {
    if (params_.vocab < params_.gradient.width)
      fill(team_, row_.gradient, row_.dtype(), params_.vocab, params_.gradient.width, 0);
  }

  // What the second sweep adds up.
  struct Sums {
    typename Row::Total value, slope, shift;
    float largest = 0;  // |slope|
  };

  // Sweep 2, and 3 where the divergence needs one.
  KD_DEVICE void sweep(bool with_gradient) {
    if (summary().far) {
      if constexpr (Divergence::kIsKL) {
        divergence_ = summary().divergence;
        if (with_gradient) kl_gradient();
        return;
      } else {
        const double slope_sum = evaluate(read_anew(summary().of_far.points), false);
        if (is_far(divergence_, params_.term.far_from())) {
          if (with_gradient) gradient_sweep(read_anew(summary().of_far.points), slope_sum);
          return;
        }
        if constexpr (Row::kKeeps) row_.reload_teacher();  // slopes took its place
      }
    }
    const Probabilities probabilities = this->probabilities();
    const double slope_sum = evaluate(probabilities, with_gradient);
    if constexpr (!Divergence::kSlopeSumsToZero)
      if (with_gradient)
        gradient_sweep(Row::kHeld ? probabilities.again() : probabilities, slope_sum);
  }

  template <class Points>
  static constexpr bool is_far_v = std::is_same_v<Points, FarProbabilities>;

  // Adds a term to the sums; returns what its slope is computed from once their sum is known.
  KD_DEVICE float add_term(const Probabilities&, const Point<float>& point,
                           Term<float>& sums) const {
    const Term<float> term = params_.term(point);
    sums.value += term.value, sums.slope += term.slope;
    return term.slope;
  }
  KD_DEVICE float add_term(const FarProbabilities& of, const Point<float>& point,
                           Term<float>& sums) const {
    return params_.term.far(point, of.weights(), sums);
  }

  // Sets the divergence and returns the sum of the slopes.
  template <class Points>
  KD_DEVICE double evaluate(const Points& probabilities, bool with_gradient) {
    const TermSums sums = term_sweep(probabilities, with_gradient);
    divergence_ = sums.value;
    if constexpr (is_far_v<Points>) {
      divergence_ = params_.term.far_value(divergence_, sums.slope, probabilities.weights(),
                                           summary().of_far.rounding);
    } else if constexpr (Divergence::kFeelsShift) {
      // sum q - p is 0; what it comes to is how far rounding of the softmax sums moved all log q.
      if (sums.slope <= FLT_MAX && sums.slope >= -FLT_MAX) divergence_ -= sums.shift * sums.slope;
      if (divergence_ < 0) divergence_ = 0;
    }
    return sums.slope;
  }

  // Sums of all terms. Writes the gradient where slopes are known to sum to 0.
  template <class Points>
  KD_DEVICE TermSums term_sweep(const Points& probabilities, bool with_gradient) {
    constexpr bool kFeelsShift = Divergence::kFeelsShift && !is_far_v<Points>;
    Sums sums;
    row_.refresh();
    const auto add = [&](const auto& place, auto& s, auto& t) {
      constexpr int n = std::decay_t<decltype(place)>::kCount;
      float raw[n];
      this->transform(s, t, raw);
      float slopes[n];
      [[maybe_unused]] float shift = 0;
      Term<float> here{0, 0};
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const Point<float> point = probabilities(s[i], t[i]);
        slopes[i] = add_term(probabilities, point, here);
        if constexpr (kFeelsShift) shift += bregman(point.p, point.q, point.r).difference;
        if constexpr (kFeelsLargest<is_far_v<Points>>)
          sums.largest = fmaxf(sums.largest, abs(slopes[i]));
      }
      sums.value.add(here.value);
      if constexpr (!Divergence::kSlopeSumsToZero) sums.slope.add(here.slope);
      if constexpr (kFeelsShift) sums.shift.add(shift);
      if constexpr (Divergence::kSlopeSumsToZero) {
        if (with_gradient) {
#pragma unroll
          for (int i = 0; i < n; ++i) slopes[i] *= kd_scale_;
          this->finish_gradient(place, raw, s, slopes);
          row_.hold_gradient(place, slopes);
        }
      } else if constexpr (Row::kKeeps) {
        row_.keep(place, slopes);
      }
    };
    if constexpr (Divergence::kSlopeSumsToZero)
      row_.for_each_at_last(add);
    else
      row_.for_each(add);
    return add_up<is_far_v<Points>>(sums, with_gradient);
  }

  // Far slopes are of moderate size.
  template <bool kFar>
  static constexpr bool kFeelsLargest = Divergence::kSlopesCancel && !kFar;

  // Adds up over the team. Meanwhile a finished gradient is stored.
  template <bool kFar>
  KD_DEVICE TermSums add_up(const Sums& sums, [[maybe_unused]] bool with_gradient) {
    constexpr bool kFeelsShift = Divergence::kFeelsShift && !kFar;
    constexpr bool kSlopes = !Divergence::kSlopeSumsToZero;
    TermSums mine{warp_sum(sums.value.value())}, all;
    if constexpr (kSlopes) mine.slope = warp_sum(sums.slope.value());
    if constexpr (kFeelsShift) mine.shift = warp_sum(sums.shift.value());
    if constexpr (kFeelsLargest<kFar>) mine.largest = warp_max(sums.largest);
    constexpr Exchange kExchange = kFar ? kOfFarSums : kOfNearSums;
    team_.tell(kExchange, team_.mine().sums[kFar], mine);
    if constexpr (Divergence::kSlopeSumsToZero)
      if (with_gradient) row_.store_held_gradient();
    team_.wait(kExchange);
    team_.for_slots([&](const WarpSlot& slot) {
      all.value += slot.sums[kFar].value;
      if constexpr (kSlopes) all.slope += slot.sums[kFar].slope;
      if constexpr (kFeelsShift) all.shift += slot.sums[kFar].shift;
      if constexpr (kFeelsLargest<kFar>)
        largest_slope_ = fmaxf(largest_slope_, (float)slot.sums[kFar].largest);
    });
    if constexpr (kFeelsLargest<kFar>) largest_slope_ = warp_max(largest_slope_);
    all.value = warp_sum(all.value);
    if constexpr (kSlopes) all.slope = warp_sum(all.slope);
    if constexpr (kFeelsShift) all.shift = warp_sum(all.shift);
    return all;
  }

  KD_DEVICE void kl_gradient() {
    KLGradient of_logits = read_anew(summary().of_far);
    const float range = Divergence::kReverse ? fit_float16_range(of_logits.reverse_kl) : 1;
    of_logits.scale(kd_scale_ * range);
    row_.refresh();
    row_.for_each_at_last([&](const auto& place, auto& s, auto& t) {
      constexpr int n = std::decay_t<decltype(place)>::kCount;
      float raw[n], gradient[n];
      this->transform(s, t, raw);
#pragma unroll
      for (int i = 0; i < n; ++i) gradient[i] = of_logits(params_.term, s[i], t[i]);
      this->finish_gradient(place, raw, s, gradient);
      row_.store_gradient(place, gradient);
    });
  }

  template <class Points>
  KD_DEVICE void gradient_sweep(Points points, double sum) {
    constexpr bool kOverQ = Divergence::kFarOverQ && is_far_v<Points>;
    double unit = 1;  // of a slope, in nats
    if constexpr (is_far_v<Points>) unit = params_.term.far_unit(points.weights());
    const float mean = (float)(sum * points.inverse_of_total(student().sum));
    // Covers NaN and both infinities: an infinite divergence of q has no gradient.
    if (!(abs(mean) <= FLT_MAX)) return fill_vocab_with_nan();
    float scale = kd_scale_ * (float)unit * fit_float16_range((float)(sum * unit));
    if constexpr (kOverQ) scale = points.take_power_of_two(scale);
    const float mean_scale = mean * scale;
    const auto gradient_of = [&](float slope, float q) {
      return kOverQ ? q * fmaf(slope, scale, -mean_scale) : (slope - q * mean) * scale;
    };
    row_.refresh();
    if constexpr (Row::kKeeps) {
      row_.for_each_kept([&](const auto& place, auto& s, auto& slopes) {
        constexpr int n = std::decay_t<decltype(place)>::kCount;
        float raw[n];
        this->transform_student(s, raw);
#pragma unroll
        for (int i = 0; i < n; ++i) slopes[i] = gradient_of(slopes[i], points.q_of(s[i]));
        this->finish_gradient(place, raw, s, slopes);
        row_.store_gradient(place, slopes);
      });
    } else {
      row_.for_each_at_last([&](const auto& place, auto& s, auto& t) {
        constexpr int n = std::decay_t<decltype(place)>::kCount;
        float raw[n], gradient[n];
        this->transform(s, t, raw);
        Term<float> unused{};
#pragma unroll
        for (int i = 0; i < n; ++i)
          gradient[i] =
              gradient_of(add_term(points, points(s[i], t[i]), unused), points.q_of(s[i]));
        this->finish_gradient(place, raw, s, gradient);
        row_.store_gradient(place, gradient);
      });
    }
  }

  // Slopes, or their sum, may be of any size (reverse KL, alpha-beta): a float16 row takes another
  // power of two then. Returns the factor for kd_scale_ and applies it to the rest.
  KD_DEVICE float fit_float16_range(float slope_sum) {
    const float size = fmaxf(abs(slope_sum), largest_slope_);
    if (!params_.row_scale || size < 1) return 1;
    range_factor_ = exp2f((float)-ilogbf(size));
    ce_scale_ *= range_factor_;
    return range_factor_;
  }

  KD_DEVICE void hard_label_gradient() {
    row_.refresh();
    row_.for_each_of_student([&](const auto& place, auto& s) {
      constexpr int n = std::decay_t<decltype(place)>::kCount;
      float raw[n], gradient[n] = {};
      this->transform_student(s, raw);
      this->finish_gradient(place, raw, s, gradient);
      row_.store_gradient(place, gradient);
    });
  }

  float largest_slope_ = 0;  // in size, where slopes may cancel
  double divergence_ = NAN;
};

}  // namespace kd::cuda
