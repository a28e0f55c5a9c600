// A row pair and its gradient, block by block, with what its call asks for beside the divergence:
// weights, the hard-label term, softcaps, metrics.
#pragma once

#include <cmath>

#include "softmax.h"

#include "kernel.h"

namespace kd::KD_NAMESPACE {

class RowBlocks {
 protected:
  RowBlocks(const LogitsParams& params, const RowPlan& plan, int64_t row)
      : params_(params),
        row_(row),
        weight_(plan.weight[row]),
        student_(params.student, row, params.student_transform),
        teacher_(params.teacher, row, params.teacher_transform),
        gradient_(params.gradient, row, plan.streams) {
    double scale = weight_ / plan.normalizer;
    if (params.row_scale) {
      params.row_scale[row] = (float)(scale / params.gradient_scale);
      scale = params.gradient_scale;
    }
    if (!student_.has_softcap()) scale *= params.student_transform.scale;
    kd_scale_ = (float)(scale * params.kd_weight / params.temperature);
    ce_scale_ = params.labels ? (float)(scale * params.ce_weight) : 0;
    plain_ = student_.is_plain_bfloat16() && teacher_.is_plain_bfloat16() &&
             !reads_student_for_gradient();
  }

  bool reads_student_for_gradient() const { return ce_scale_ != 0 || student_.has_softcap(); }

  int64_t label() const { return params_.labels[row_]; }

  // Slopes, or their sum, may be of any size (reverse KL, alpha-beta): a float16 row takes another
  // power of two then. Returns the factor for kd_scale_ and applies it to the rest.
  float fit_float16_range(float size) {
    if (!params_.row_scale || !(::fabsf(size) >= 1)) return 1;
    const float factor = ::exp2f((float)-::ilogbf(size));
    ce_scale_ *= factor;
    params_.row_scale[row_] /= factor;
    return factor;
  }

  // Where a block of the gradient is computed. Not in place while the student is still needed.
  float* gradient_target(int64_t begin, int n) {
    float* direct = reads_student_for_gradient() ? nullptr : gradient_.direct(begin, n);
    return direct ? direct : gradient_block_;
  }

  // For formulas without infinite logits: what pads the end of a row becomes one finite logit in
  // both models, so low that its powers are 0, as its exponentials are.
  void pad_finitely(int n) {
    for (int i = n; i % kPair != 0; ++i) student_block_[i] = teacher_block_[i] = kLowestLogit;
  }

  // Whether every sweep reads blocks of n straight from memory. What is kept of them then lies in
  // the order of a View.
  bool is_plain(int n) const { return plain_ && n % kPair == 0; }

  // Calls use(view) with a view of a block of transformed logits.
  template <class Use>
  void view(const Reader& logits, int64_t begin, int n, float* buffer, Use use) const {
    if (is_plain(n)) return use(logits.plain(begin));
    use(View<DType::kFloat32>{const_cast<float*>(logits.block(begin, n, buffer))});
  }

  View<DType::kFloat32> float_gradient(float* g) const {
    return {g, gradient_.streams() && g != gradient_block_};
  }

  // Calls use(student, teacher, gradient) with views of a block, and finishes the gradient where
  // there is one. Without kLogits those of the logits are not to be read.
  template <bool kGradient, bool kLogits = true, class Use>
  void view_pair(int64_t begin, int n, Use use) {
    if (is_plain(n)) {
      use(student_.plain(begin), teacher_.plain(begin), gradient_.plain(begin, gradient_block_));
      if (kGradient) gradient_.flush(begin, n, gradient_block_);
      return;
    }
    const bool reads_student = kLogits || ce_scale_ != 0;
    const float* s = reads_student ? student_.block(begin, n, student_block_) : nullptr;
    const float* t = kLogits ? teacher_.block(begin, n, teacher_block_) : nullptr;
    float* g = kGradient ? gradient_target(begin, n) : nullptr;
    using Floats = View<DType::kFloat32>;
    use(Floats{const_cast<float*>(s)}, Floats{const_cast<float*>(t)}, float_gradient(g));
    if (kGradient) finish_gradient(begin, n, s, g);
  }

  // Adds the hard-label term, applies the softcap's derivative and stores a block.
  void finish_gradient(int64_t begin, int n, const float* s, float* g) {
    if (ce_scale_ != 0) {
      const Exponent& exponent = softmax_at_1_.exponent();
      const float scale = (float)(ce_scale_ * softmax_at_1_.scale());
      for (int i = 0; i < n; i += kLanes) store(g + i, load(g + i) + exponent(load(s + i)) * scale);
      const int64_t label = this->label() - begin;
      if (label >= 0 && label < n) g[label] -= ce_scale_;
    }
    if (student_.has_softcap()) student_.chain_softcap(begin, n, student_block_, g);
    if (g == gradient_block_) gradient_.write(begin, n, g);
  }

  void hard_label_gradient() {
    for_blocks(params_.vocab, [&](int64_t begin, int n) {
      for (int i = 0; i < n; i += kLanes) store(gradient_block_ + i, Vec{});
      finish_gradient(begin, n, student_.block(begin, n, student_block_), gradient_block_);
    });
  }

  bool uses_divergence() const { return params_.kd_weight != 0 || params_.metrics; }
  bool uses_cross_entropy() const {
    return params_.labels && (params_.ce_weight != 0 || params_.metrics);
  }

  double cross_entropy() const {
    if (!softmax_at_1_.valid()) return NAN;
    return not_negative(softmax_at_1_.log_sum_exp() - student_.at(label()));
  }

  // All but the divergence, which the sweeps give.
  void write_metrics(double cross_entropy, bool both_valid) {
    metric(kCrossEntropy) = (float)cross_entropy;
    metric(kTeacherEntropy) = entropy(teacher_, teacher_softmax_, teacher_block_);
    metric(kStudentEntropy) = entropy(student_, student_softmax_, student_block_);
    const bool agree = top_token(student_, params_.vocab, student_block_) ==
                       top_token(teacher_, params_.vocab, teacher_block_);
    metric(kAgreement) = both_valid ? agree : NAN;
  }

  float& metric(Metric which) { return params_.metrics[which * params_.rows + row_]; }

  float entropy(const Reader& reader, const Softmax& softmax, float* buffer) const {
    if (!softmax.valid()) return NAN;
    const LogProbability log_p(softmax);
    double total = 0;
    for_blocks(params_.vocab, [&](int64_t begin, int n) {
      total += entropy_block(reader.block(begin, n, buffer), n, log_p);
    });
    return (float)not_negative(total);
  }

  // Of a row that is certain, rounding of its exponentials may leave less than 0.
  static double not_negative(double x) { return x < 0 ? 0 : x; }

  const LogitsParams& params_;
  const int64_t row_;
  const double weight_;
  const Reader student_, teacher_;
  const Writer gradient_;
  float kd_scale_, ce_scale_;  // what a term's gradient is multiplied by
  bool plain_;
  Softmax student_softmax_, teacher_softmax_;
  Softmax softmax_at_1_;  // of the hard-label term
  alignas(64) float student_block_[kBlock];
  alignas(64) float teacher_block_[kBlock];
  alignas(64) float gradient_block_[kBlock];
};

// A row of weight 0: exact zeros, whatever the logits hold.
inline void write_masked_row(const LogitsParams& params, const RowPlan& plan, int64_t row) {
  if (params.gradient.data) {
    const Writer gradient(params.gradient, row, plan.streams);
    gradient.fill(0, gradient.width(), 0);
  }
  if (params.row_scale) params.row_scale[row] = 0;
  if (params.metrics)
    for (int i = 0; i < kMetrics; ++i) params.metrics[i * params.rows + row] = 0;
}

}  // namespace kd::KD_NAMESPACE
