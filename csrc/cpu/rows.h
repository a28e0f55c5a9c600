// The CPU algorithm, once for every instruction set. A row pair is read in blocks, up to three
// times, the later times from cache:
//
//   1. the softmaxes of student and teacher (and at T = 1 for the hard-label term), whose
//      exponentials stay in two scratch rows, and how far the row is from its teacher
//   2. value and slope of every term; the gradient too where the slopes are known to sum to 0
//   3. otherwise the gradient, from slopes, which took the teacher's place in scratch
//
// The second sweep of a far row (see csrc/core/divergences.h) has simpler terms, or for a KL
// divergence, whose value the first one has, nothing but the gradient.
//
// Memory works during the second sweep too: the next row pair is fetched then, or for a KL
// divergence, whose second sweep is short, half of it before.
//
// Options most calls do not use (labels, softcap, metrics) are loops over a block of their own.
#pragma once

#include "row_blocks.h"

namespace kd::KD_NAMESPACE {

template <class Divergence>
class RowPair : protected RowBlocks {
 public:
  RowPair(const LogitsParams& params, const RowPlan& plan, const Divergence& divergence,
          int64_t row, int64_t next, float* scratch)
      : RowBlocks(params, plan, row),
        divergence_(divergence),
        next_(next < params.rows ? next : row),
        student_kept_(scratch),
        teacher_kept_(scratch + scratch_row(params.vocab)) {}

  // The row's loss times its weight; its gradient and metrics on the way.
  template <bool kGradient>
  double run() {
    read_softmaxes();
    const bool both_valid = student_softmax_.valid() && teacher_softmax_.valid();
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
      if ((kd_gradient && !both_valid) || (ce_scale_ != 0 && !softmax_at_1_.valid()))
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

 protected:
  void read_softmaxes() {
    const int64_t vocab = params_.vocab;
    if (!read_softmaxes(sample_of(vocab))) read_softmaxes(vocab);
  }

  // Relative to the largest of the first `sample` logits; keeps exponentials. False where another
  // logit is too far above it.
  bool read_softmaxes(int64_t sample) {
    const auto reference = [&](const Reader& reader, float* buffer) {
      return first_reference(reader, sample, params_.vocab, buffer);
    };
    start(reference(student_, student_block_),
          uses_divergence() ? reference(teacher_, teacher_block_) : 0);
    const bool apart = uses_cross_entropy() && params_.temperature != 1;
    KLSums kl;
    const bool fits = push_logits(apart, uses_divergence(), may_be_far() ? &kl : nullptr);
    if (may_be_far() && fits) kl_ = KL(kl, gap(), student_softmax_, teacher_softmax_);
    if (!apart) softmax_at_1_ = student_softmax_;
    return fits;
  }

  // Softmaxes relative to these logits.
  void start(float student_reference, float teacher_reference) {
    student_softmax_ = Softmax(student_reference, c_);
    softmax_at_1_ = Softmax(student_reference, kLog2E);
    teacher_softmax_ = Softmax(teacher_reference, c_);
  }

  // Adds the row pair to the softmaxes, and to the sums of KL divergences if there are some; keeps
  // exponentials. False where a logit is too far above its reference.
  KD_INLINE bool push_logits(bool at_1, bool teacher, KLSums* kl) {
    const Upcoming student_row(params_.student, row_), teacher_row(params_.teacher, row_);
    bool fits = true;
    for_blocks(params_.vocab, [&](int64_t begin, int n) {
      view(student_, begin, n, student_block_, [&](auto s) {
        fits &= student_softmax_.push(s, n, student_kept_ + begin, student_row, begin + n);
        if (at_1) fits &= softmax_at_1_.push(s, n, gradient_block_, student_row, begin + n);
        if (!teacher) return;
        view(teacher_, begin, n, teacher_block_, [&](auto t) {
          fits &= teacher_softmax_.push(t, n, teacher_kept_ + begin, teacher_row, begin + n);
          if (kl) compare(s, t, begin, n, *kl);
        });
      });
    });
    return fits;
  }

  // What the sums of KL divergences are made of: a gap relative to the references, small for top
  // tokens, which weigh most.
  Gap gap() const {
    return {shifts_between(student_softmax_.reference(), teacher_softmax_.reference(), 0)};
  }

  bool may_be_far() const {
    if constexpr (Divergence::kIsKL)
      return true;
    else
      return divergence_.has_far();
  }

  // Adds a block to the sums of the KL divergences that the divergence asks for.
  template <class Student, class Teacher>
  void compare(Student s, Teacher t, int64_t begin, int n, KLSums& kl) {
    pad_finitely(n);
    constexpr int kRun = 4 * kPair;
    const Gap gap = this->gap();
    const float t_reference = teacher_softmax_.reference();
    const float* s_kept = student_kept_ + begin;
    const float* t_kept = teacher_kept_ + begin;
    const Upcoming next_student(params_.student, next_);
    // Terms of either sign: their sums cancel, so what rounding takes from them counts.
    CompensatedSum forward, reverse, entropy;
    for (int i = 0; i < n; i += kRun) {
      Vec of_forward = {}, of_reverse = {}, of_entropy = {};
      for (int at = i; at < i + kRun && at < n; at += kPair) {
        if constexpr (Divergence::kIsKL) next_student.fetch<2>(begin + at, kPair);
        const Pair x = s.pair(at), y = t.pair(at);
        for (int k = 0; k < 2; ++k) {
          const Vec teacher = k ? y.second : y.first, apart = gap(k ? x.second : x.first, teacher);
          const Vec s_e = load(s_kept + at + k * kLanes), t_e = load(t_kept + at + k * kLanes);
          if constexpr (Divergence::kForward) of_forward += t_e * apart;
          if constexpr (Divergence::kReverse) of_reverse += s_e * apart;
          if constexpr (Divergence::kAddsEntropy) of_entropy += t_e * (teacher - t_reference);
        }
      }
      if constexpr (Divergence::kForward) forward.add(of_forward);
      if constexpr (Divergence::kReverse) reverse.add(of_reverse);
      if constexpr (Divergence::kAddsEntropy) entropy.add(of_entropy);
    }
    if constexpr (Divergence::kForward) kl.forward += forward.value();
    if constexpr (Divergence::kReverse) kl.reverse += reverse.value();
    if constexpr (Divergence::kAddsEntropy) kl.entropy += entropy.value();
  }

  // Sweep 2, and 3 where the divergence needs one; returns the divergence.
  template <bool kGradient>
  double sweep() {
    if constexpr (Divergence::kIsKL) {
      const double forward = divergence_.forward(), reverse = divergence_.reverse();
      const double kl = (Divergence::kForward ? forward * kl_.forward : 0) +
                        (Divergence::kReverse ? reverse * kl_.reverse : 0);
      if (is_far(kl, divergence_.far_from()) && ::fabs(kl_.offset) <= kMostCancelled * kl) {
        if constexpr (kGradient) kl_gradient(forward, reverse);
        return Divergence::kAddsEntropy ? kl + kl_.entropy : kl;
      }
    } else if (may_be_far() && is_far(kl_.forward, divergence_.kl_from())) {
      const Sums sums = term_sweep<kGradient, true>();
      if (is_far(sums.value, divergence_.far_from())) {
        if constexpr (kGradient) gradient_sweep<true>(sums);
        return sums.value;
      }
      read_softmaxes();  // slopes took the place of exponentials
    }
    const Sums sums = term_sweep<kGradient, false>();
    if constexpr (kGradient && !Divergence::kSlopeSumsToZero) gradient_sweep<false>(sums);
    return settled(sums);
  }

  struct Sums {
    double value;        // the divergence
    double slope;        // the sum of slopes
    double unit = 1;     // of a slope, in nats
    double largest = 0;  // |slope|, where it may be larger than their sum
    double shift = 0;    // the sum of q - p
  };

  // The divergence from sums of near terms.
  static double settled(const Sums& sums) {
    double value = sums.value;
    // sum q - p is 0; what it comes to is how far rounding of the softmax sums moved all log q.
    if (Divergence::kFeelsShift && ::fabs(sums.slope) <= FLT_MAX) value -= sums.shift * sums.slope;
    return value < 0 ? 0 : value;  // rounding of what nearly cancels
  }

  static KD_INLINE void near_terms(const Divergence& divergence, const Point<Vec> (&x)[2],
                                   Term<Vec> (&term)[2]) {
    if constexpr (Divergence::kHasClose) {
      const float radius = divergence.close_radius;
      if (all((abs(x[0].r) < radius) & (abs(x[1].r) < radius))) {
        for (int k = 0; k < 2; ++k) term[k] = divergence.close(x[k]);
        return;
      }
    }
    for (int k = 0; k < 2; ++k) term[k] = divergence(x[k]);
  }

  // Adds two terms to the sums, and gives what their slopes are computed from.
  template <bool kGradient, bool kFar>
  static KD_INLINE void add_terms(const Divergence& divergence, const Weights& weights,
                                  const Point<Vec> (&x)[2], Term<Vec>& sums, Vec (&slope)[2]) {
    if constexpr (kFar) {
      for (int k = 0; k < 2; ++k) slope[k] = divergence.far(x[k], weights, sums);
    } else {
      Term<Vec> term[2];
      near_terms(divergence, x, term);
      for (int k = 0; k < 2; ++k) {
        slope[k] = term[k].slope;
        // Rounded before they are added, since no product that is stored, or comes from a branch,
        // is fused with the sum: the same bits with a gradient and without.
        sums.value += rounded(term[k].value);
        sums.slope += kGradient ? slope[k] : rounded(slope[k]);
      }
    }
  }

  // Value and slope of every term, and the gradient too where the slopes are known to sum to 0.
  template <bool kGradient, bool kFar>
  Sums term_sweep() {
    constexpr bool kStoresGradient = kGradient && Divergence::kSlopeSumsToZero;
    constexpr bool kFeelsShift = Divergence::kFeelsShift && !kFar;
    constexpr bool kSizes = kGradient && Divergence::kSlopesCancel;
    const Points<kFar> points(student_softmax_, teacher_softmax_);
    double value_sum = 0, slope_sum = 0, shift_sum = 0;
    Vec sizes = {};
    const Upcoming next_student(params_.student, next_), next_teacher(params_.teacher, next_);
    for_blocks(params_.vocab, [&](int64_t begin, int n) {
      view_pair<kStoresGradient>(begin, n, [&](auto s, auto t, auto g) {
        if constexpr (kFar) pad_finitely(n);
        // In registers, as are the sums.
        const Points<kFar> point = points;
        const Divergence divergence = divergence_;
        const float scale = kd_scale_;
        const float* s_kept = student_kept_ + begin;
        float* t_kept = teacher_kept_ + begin;
        Vec value_parts = {}, slope_parts = {}, shift_parts = {};
        for (int i = 0; i < n;) {
          const int end = end_of_part(i, n);
          Term<Vec> sums = {};
          Vec shifts = {};
          for (; i < end; i += kPair) {
            next_student.fetch<2>(begin + i, kPair);
            next_teacher.fetch<2>(begin + i, kPair);
            const Pair x = s.pair(i), y = t.pair(i);
            const Point<Vec> v[] = {
                point(x.first, y.first, load(s_kept + i), load(t_kept + i)),
                point(x.second, y.second, load(s_kept + i + kLanes), load(t_kept + i + kLanes))};
            Vec slope[2];
            add_terms<kGradient, kFar>(divergence, point.weights, v, sums, slope);
            for (int k = 0; k < 2; ++k) {
              if constexpr (kSizes) sizes = max(sizes, abs(slope[k]));
              if constexpr (kFeelsShift) {
                const Vec difference = bregman(v[k].p, v[k].q, v[k].r).difference;
                shifts += difference;
              }
              // The teacher's exponentials are not read again.
              if constexpr (kGradient && !kStoresGradient) store(t_kept + i + k * kLanes, slope[k]);
            }
            if constexpr (kStoresGradient) g.store(i, {slope[0] * scale, slope[1] * scale});
          }
          value_parts += sums.value;
          if constexpr (!Divergence::kSlopeSumsToZero) slope_parts += sums.slope;
          if constexpr (kFeelsShift) shift_parts += shifts;
        }
        value_sum += sum(value_parts);
        if constexpr (!Divergence::kSlopeSumsToZero) slope_sum += sum(slope_parts);
        if constexpr (kFeelsShift) shift_sum += sum(shift_parts);
      });
    });
    Sums sums{value_sum, slope_sum};
    sums.shift = shift_sum;
    if constexpr (kSizes) sums.largest = largest(sizes);
    if constexpr (kFar) {
      sums.unit = divergence_.far_unit(points.weights);
      const Rounding added = rounding_of(points.weights, student_softmax_, teacher_softmax_);
      sums.value = divergence_.far_value(value_sum, slope_sum, points.weights, added);
    }
    return sums;
  }

  // Of a far row by a KL divergence: forward (q - p) + reverse q (log q - log p - KL(q || p)).
  // kFetches: also fetches the next student, which no sweep before has done.
  template <bool kFetches = false>
  void kl_gradient(double forward, double reverse) {
    const double scale =
        kd_scale_ * (Divergence::kReverse ? fit_float16_range((float)(reverse * kl_.reverse)) : 1);
    const double s_scale = scale * student_softmax_.scale();
    const KLFactors of = {
        (float)(scale * teacher_softmax_.scale() * forward),
        (float)(s_scale *
                (Divergence::kReverse ? forward + reverse * (kl_.offset - kl_.reverse) : forward)),
        (float)(s_scale * reverse / student_softmax_.temperature())};
    if constexpr (Divergence::kReverse)
      if (!(::fabsf(of.gap) <= 1)) return write_kl_gradient<kFetches, true>(of);
    write_kl_gradient<kFetches, false>(of);
  }

  struct KLFactors {
    float p, q, gap;  // of exponentials, and of the student's times its gap
  };

  // kOverflows: a gap times its factor may overflow, where q is 0 and a logit is the lowest float.
  template <bool kFetches, bool kOverflows>
  void write_kl_gradient(const KLFactors& factors) {
    const Gap gaps = this->gap();
    const Upcoming next_student(params_.student, next_), next_teacher(params_.teacher, next_);
    for_blocks(params_.vocab, [&](int64_t begin, int n) {
      view_pair<true, Divergence::kReverse>(begin, n, [&](auto s, auto t, auto g) {
        // In registers.
        const Gap gap = gaps;
        const KLFactors of = factors;
        const Upcoming student = next_student, teacher = next_teacher;
        const float* s_kept = student_kept_ + begin;
        const float* t_kept = teacher_kept_ + begin;
        for (int i = 0; i < n; i += kPair) {
          if constexpr (kFetches) student.fetch<2>(begin + i, kPair);
          teacher.fetch<2>(begin + i, kPair);
          Vec result[2];
          Pair x, y;
          if constexpr (Divergence::kReverse) x = s.pair(i), y = t.pair(i);
          for (int k = 0; k < 2; ++k) {
            const int at = i + k * kLanes;
            const Vec s_e = load(s_kept + at);
            if constexpr (Divergence::kReverse) {
              const Vec apart = gap(k ? x.second : x.first, k ? y.second : y.first);
              result[k] =
                  kOverflows ? s_e * of.gap * apart + s_e * of.q : s_e * (apart * of.gap + of.q);
            } else {
              result[k] = s_e * of.q;
            }
            if constexpr (Divergence::kForward) result[k] -= load(t_kept + at) * of.p;
          }
          g.store(i, {result[0], result[1]});
        }
      });
    });
  }

  // slopes - q slope_sum, times their unit.
  template <bool kFar>
  void gradient_sweep(const Sums& sums) {
    constexpr bool kOverQ = Divergence::kFarOverQ && kFar;
    const float slope_sum = (float)(sums.slope * sums.unit);
    // Covers NaN and both infinities: an infinite divergence of q has no gradient.
    if (!(::fabsf(slope_sum) <= FLT_MAX)) return gradient_.fill(0, params_.vocab, NAN);
    const double size = larger(sums.largest, ::fabs(sums.slope));
    const float factor = fit_float16_range((float)(size * sums.unit));
    const float scale = kd_scale_ * (float)sums.unit * factor;
    const float mean = (float)(sums.slope * student_softmax_.scale());
    for_blocks(params_.vocab, [&](int64_t begin, int n) {
      view_pair<true, false>(begin, n, [&](auto, auto, auto g) {
        const float* s_kept = student_kept_ + begin;
        const float* slopes = teacher_kept_ + begin;
        for (int i = 0; i < n; i += kPair) {
          Vec result[2];
          for (int k = 0; k < 2; ++k) {
            const Vec slope = load(slopes + i + k * kLanes), e = load(s_kept + i + k * kLanes);
            result[k] = (kOverQ ? e * (slope - mean) : slope - e * mean) * scale;
          }
          g.store(i, {result[0], result[1]});
        }
      });
    });
  }

  const Divergence& divergence_;
  const int64_t next_;
  float* const student_kept_;  // (vocab,), exponentials
  float* const teacher_kept_;  // (vocab,), exponentials, then slopes
  const float c_ = (float)(kBitsPerNat / params_.temperature);
  KL kl_;
};

template <class Divergence, bool kGradient>
void run_rows(const LogitsParams& params, const RowPlan& plan, int64_t begin, int64_t end,
              int64_t next, float* scratch) {
  const Divergence divergence(params.parameters[0], params.parameters[1]);
  for (int64_t row = begin; row < end; ++row) {
    plan.loss[row] = 0;
    if (plan.weight[row] == 0) {
      write_masked_row(params, plan, row);
    } else {
      const int64_t after = row + 1 < end ? row + 1 : next;
      RowPair<Divergence> pair(params, plan, divergence, row, after, scratch);
      plan.loss[row] = pair.template run<kGradient>();
    }
  }
  if (plan.streams) fence();
}

}  // namespace kd::KD_NAMESPACE
