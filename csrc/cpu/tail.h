// Log-sum-exps over the columns of a row that a sparse teacher does not list, and their gradient.
// Such a teacher needs nothing else of the whole vocabulary: the rest of its loss is a function of
// these and of the listed logits, which are few.
#pragma once

#include <cmath>

#include "softmax.h"

#include "kernel.h"

namespace kd::KD_NAMESPACE {

class TailRow {
 public:
  TailRow(const TailParams& params, int64_t row, bool streams)
      : params_(params),
        row_(row),
        logits_(params.student, row, params.transform),
        upcoming_(params.student, row),
        gradient_(params.gradient, row, streams),
        listed_(params.listed + row * params.listed_size) {
    while (first_ < params.listed_size && listed_[first_] < 0) ++first_;
  }

  void write_tails() {
    result(0) = 0;
    for (int i = 0; i < temperatures(); ++i) result(1 + i) = -kInfinity;
    if (params_.kept && !params_.kept[row_]) return;
    const int64_t vocab = params_.vocab;
    if (!read(sample_of(vocab))) read(vocab);
    result(0) = tails_[0].reference();
    for (int i = 0; i < temperatures(); ++i) result(1 + i) = log_sum(tails_[i]);
  }

  void write_gradient() {
    start(result(0));
    const float factors[2] = {factor(0), params_.at_1 ? factor(1) : 0};
    const float both = factors[0] + factors[1];
    if (both != both || (factors[0] == 0 && factors[1] == 0))
      gradient_.fill(0, params_.vocab, both);
    else
      for_blocks(params_.vocab, [&](int64_t begin, int n) {
        if (logits_.is_plain_bfloat16() && n % kPair == 0) {
          const auto g = gradient_.plain(begin, gradient_block_);
          write_exponentials(logits_.plain(begin), begin, n, factors, g);
          return gradient_.flush(begin, n, gradient_block_);
        }
        const View<DType::kFloat32> x{const_cast<float*>(logits_.block(begin, n, block_))};
        float* const direct = logits_.has_softcap() ? nullptr : gradient_.direct(begin, n);
        float* const g = direct ? direct : gradient_block_;
        write_exponentials(x, begin, n, factors,
                           View<DType::kFloat32>{g, direct && gradient_.streams()});
        if (logits_.has_softcap()) logits_.chain_softcap(begin, n, block_, g);
        if (!direct) gradient_.write(begin, n, g);
      });
    // Overwrites what the listed logits' exponentials, however large, have given.
    gradient_.scatter(listed_ + first_, params_.grad_listed + row_ * params_.listed_size + first_,
                      params_.listed_size - first_);
    gradient_.fill(params_.vocab, gradient_.width(), 0);
  }

 private:
  float& result(int which) const { return params_.tails[which * params_.rows + row_]; }

  // The temperature, and 1 where asked for.
  int temperatures() const { return params_.at_1 ? 2 : 1; }

  void start(float reference) {
    tails_[0] = Softmax(reference, (float)(kBitsPerNat / params_.temperature));
    tails_[1] = Softmax(reference, kLog2E);
  }

  // Relative to the largest of the first `sample` logits.
  bool read(int64_t sample) {
    float reference = -kInfinity;
    for_tail_blocks(sample, [&](int64_t begin, int n, int64_t first, int64_t last) {
      reference = larger(reference, block_max(block(begin, n, first, last, -kInfinity), n));
    });
    start(reference);
    // Listed logits become one that adds next to nothing beside the reference, which is a logit of
    // the tail. Not -inf, which the fast exponential leaves to a slower one.
    const bool hotter = params_.at_1 && params_.temperature < 1;
    const float negligible = 70 * (float)kNatsPerBit * (hotter ? 1 : params_.temperature);
    float hidden = reference - negligible;
    if (reference <= kLowestLogit || reference - hidden < negligible / 2) hidden = -kInfinity;
    bool fits = true;
    for_tail_blocks(params_.vocab, [&](int64_t begin, int n, int64_t first, int64_t last) {
      const auto push = [&](auto x) {
        for (int i = 0; i < temperatures(); ++i)
          fits &= tails_[i].push(x, n, kept_[i], upcoming_, begin + n);
      };
      if (first == last && logits_.is_plain_bfloat16() && n % kPair == 0)
        push(logits_.plain(begin));
      else
        push(View<DType::kFloat32>{block(begin, n, first, last, hidden)});
    });
    return fits;
  }

  // -inf of a tail that is empty or all -inf, NaN of one that holds NaN or +inf.
  static float log_sum(const Softmax& tail) {
    return tail.valid() ? (float)tail.log_sum() : tail.empty() ? -kInfinity : NAN;
  }

  // The factor that makes an exponential its part of the gradient. With a softcap, its derivative
  // has the scale.
  float factor(int which) const {
    const float gradient = params_.grad_tails[which * params_.rows + row_];
    const float log_sum = result(1 + which);
    if (gradient == 0 || log_sum == -kInfinity) return gradient * 0;  // NaN stays NaN
    const double scale = logits_.has_softcap() ? 1 : params_.transform.scale;
    return (float)(gradient * scale / (which == 0 ? params_.temperature : 1) *
                   tails_[which].exponent().correction() * ::exp(-(double)log_sum));
  }

  template <class From, class To>
  void write_exponentials(From x, int64_t begin, int n, const float (&factors)[2], To gradient) {
    for (int i = 0; i < temperatures(); ++i) tails_[i].push(x, n, kept_[i], upcoming_, begin + n);
    const bool at_1 = params_.at_1;
    for (int i = 0; i < n; i += kPair) {
      Vec g[2];
      for (int k = 0; k < 2; ++k) {
        const int at = i + k * kLanes;
        g[k] = load(kept_[0] + at) * factors[0];
        if (at_1) g[k] += load(kept_[1] + at) * factors[1];
      }
      gradient.store(i, {g[0], g[1]});
    }
  }

  // The logits of a block, with what is listed as `hidden`.
  float* block(int64_t begin, int n, int64_t first, int64_t last, float hidden) {
    const float* const x = logits_.block(begin, n, block_);
    if (first == last) return const_cast<float*>(x);
    if (x != block_) std::memcpy(block_, x, n * sizeof(float));
    for (int64_t i = first; i < last; ++i) block_[listed_[i] - begin] = hidden;
    return block_;
  }

  // Calls step(begin, n, first, last) for blocks in which listed_[first] to listed_[last - 1] lie.
  template <class Step>
  void for_tail_blocks(int64_t vocab, Step step) const {
    int64_t first = first_;
    for_blocks(vocab, [&](int64_t begin, int n) {
      int64_t last = first;
      while (last < params_.listed_size && listed_[last] < begin + n) ++last;
      step(begin, n, first, last);
      first = last;
    });
  }

  const TailParams& params_;
  const int64_t row_;
  const Reader logits_;
  const Upcoming upcoming_;
  const Writer gradient_;
  const int64_t* const listed_;  // (listed_size,), ascending
  int64_t first_ = 0;            // of those that are a column
  Softmax tails_[2];
  alignas(64) float block_[kBlock];
  alignas(64) float kept_[2][kBlock];
  alignas(64) float gradient_block_[kBlock];
};

inline void tail_rows(const TailParams& params, int64_t begin, int64_t end, bool streams) {
  for (int64_t row = begin; row < end; ++row) {
    TailRow tail(params, row, streams);
    if (params.gradient.data)
      tail.write_gradient();
    else
      tail.write_tails();
  }
  if (streams) fence();
}

}  // namespace kd::KD_NAMESPACE
