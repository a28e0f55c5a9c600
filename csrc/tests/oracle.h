// What a kernel should compute, row by row in float64, from the definitions: plain sums over the
// vocabulary, differentiated by dual numbers. Nothing here is shared with csrc/core but the structs
// that describe a call.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "../core/params.h"

namespace kd::tests {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

// ---- A function of log q and its derivative ----

struct Dual {
  double value, slope;
  Dual(double value, double slope = 0) : value(value), slope(slope) {}
};
inline Dual operator+(Dual x, Dual y) { return {x.value + y.value, x.slope + y.slope}; }
inline Dual operator-(Dual x, Dual y) { return {x.value - y.value, x.slope - y.slope}; }
// 0 where x is 0, whatever y is.
inline Dual operator*(Dual x, Dual y) {
  if (x.value == 0) return {0, 0};
  return {x.value * y.value, (x.slope == 0 ? 0 : x.slope * y.value) + x.value * y.slope};
}
inline Dual exp(Dual x) {
  const double value = std::exp(x.value);
  return {value, value == 0 ? 0 : value * x.slope};
}
inline Dual log(Dual x) { return {std::log(x.value), x.slope / x.value}; }

// ---- The definitions ----

inline Dual kl(Dual p, Dual log_p, Dual log_q) { return p * (log_p - log_q); }

inline Dual alpha_beta(double a, double b, double log_p, Dual log_q) {
  if (log_p == -kInf && log_q.value == -kInf) return 0;
  const auto power = [&](double x, double y) {  // p^x q^y
    return exp((x == 0 ? Dual(0) : Dual(x * log_p)) + (y == 0 ? Dual(0) : Dual(y) * log_q));
  };
  const Dual d = Dual(log_p) - log_q;
  if (a == 0 && b == 0) return Dual(0.5) * d * d;
  if (a == 0) return Dual(1 / (b * b)) * (power(b, 0) - power(0, b) - Dual(b) * power(0, b) * d);
  if (b == 0) return Dual(1 / (a * a)) * (power(0, a) - power(a, 0) + Dual(a) * power(a, 0) * d);
  if (a + b == 0) return Dual(1 / (a * a)) * (power(a, b) - Dual(1) - Dual(a) * d);
  return Dual(-1 / (a * b)) *
         (power(a, b) - Dual(a / (a + b)) * power(a + b, 0) - Dual(b / (a + b)) * power(0, a + b));
}

// The parameters of a divergence that weighs teacher and student.
constexpr std::array<double, 2> weights(double x) { return {x, 1 - x}; }

// A vocabulary entry's term; x and y are the divergence's parameters.
inline Dual term(const std::string& divergence, double x, double y, double log_p, double of_q) {
  const Dual p(std::exp(log_p)), log_q(of_q, 1), q = exp(log_q);
  const auto mixture = [&](Dual u, Dual v) { return log(Dual(x) * u + Dual(y) * v); };
  if (divergence == "forward_kl") return kl(p, log_p, log_q);
  if (divergence == "reverse_kl") return kl(q, log_q, log_p);
  if (divergence == "jsd")
    return Dual(x) * kl(p, log_p, mixture(p, q)) + Dual(y) * kl(q, log_q, mixture(p, q));
  if (divergence == "skew_forward_kl") return kl(p, log_p, mixture(p, q));
  if (divergence == "skew_reverse_kl") return kl(q, log_q, mixture(q, p));
  if (divergence == "symmetric_kl")
    return Dual(x) * kl(p, log_p, log_q) + Dual(y) * kl(q, log_q, log_p);
  if (divergence == "tvd") {
    const double sign = p.value > q.value ? 1 : p.value < q.value ? -1 : 0;
    return Dual(sign / 2) * (p - q);
  }
  if (divergence == "alpha_beta") return alpha_beta(x, y, log_p, log_q);
  if (divergence == "soft_cross_entropy") return Dual(0) - p * log_q;
  return {kNaN, kNaN};
}

// ---- A row ----

inline double decode(const char* data, DType dtype, int64_t index) {
  if (dtype == DType::kFloat32) return ((const float*)data)[index];
  const int bits = ((const uint16_t*)data)[index];
  const int digits = dtype == DType::kBFloat16 ? 7 : 10,
            bias = dtype == DType::kBFloat16 ? 127 : 15;
  const int exponent = (bits & 0x7fff) >> digits, mantissa = bits & ((1 << digits) - 1);
  double size = exponent == 0 ? std::ldexp(mantissa, 1 - bias - digits)
                              : std::ldexp(mantissa + (1 << digits), exponent - bias - digits);
  if (exponent == 2 * bias + 1) size = mantissa ? kNaN : kInf;
  return bits & 0x8000 ? -size : size;
}

struct Softmax {
  std::vector<double> log;  // log-probabilities; NaN throughout for a row that has none

  Softmax(const std::vector<double>& logits, double temperature) : log(logits) {
    double top = -kInf, sum = 0;
    for (const double x : logits) top = x > top || x != x ? x : top;  // NaN stays
    for (const double x : logits) sum += std::exp((x - top) / temperature);
    for (double& x : log) x = (x - top) / temperature - std::log(sum);
  }
  bool valid() const { return log[0] == log[0]; }
  double entropy() const {
    double sum = 0;
    for (const double x : log) sum -= x == -kInf ? 0 : std::exp(x) * x;
    return sum;
  }
};

// A row's logits, scaled and softcapped; `raw` as they are in memory.
struct RowLogits {
  std::vector<double> raw, transformed;

  RowLogits(const Rows& rows, const Transform& transform, int64_t row, int64_t vocab) {
    const double scale = transform.scale, cap = transform.softcap;
    for (int64_t i = 0; i < vocab; ++i) {
      const double x = decode(rows.row(row), rows.dtype, i);
      raw.push_back(x);
      transformed.push_back(cap == 0     ? scale * x
                            : x == -kInf ? -kInf
                                         : cap * std::tanh(scale * x / cap));
    }
  }
  int64_t top() const {
    size_t best = 0;
    for (size_t i = 1; i < raw.size(); ++i)
      if (raw[i] > raw[best]) best = i;
    return best;
  }
};

struct Expected {
  double loss = 0;                 // times the row's weight
  std::vector<double> gradient;    // (student width,)
  double metrics[kMetrics] = {0};  // 0 where not asked for
};

// `weight` is the row's, 0 where it takes no part; the gradient is divided by `normalizer`.
inline Expected oracle(const LogitsParams& params, const std::string& divergence, int64_t row,
                       double weight, double normalizer) {
  Expected result;
  result.gradient.resize(params.student.width);
  if (weight == 0) return result;
  const int64_t vocab = params.vocab;
  const double temperature = params.temperature;

  const RowLogits t(params.teacher, params.teacher_transform, row, vocab);
  const RowLogits s(params.student, params.student_transform, row, vocab);
  std::vector<double> gradient(vocab);
  if (params.kd_weight != 0 || params.metrics) {
    const Softmax p(t.transformed, temperature), q(s.transformed, temperature);
    double value = kNaN, slopes = kNaN;
    std::vector<double> slope(vocab, kNaN);
    if (p.valid() && q.valid()) {
      value = slopes = 0;
      for (int64_t i = 0; i < vocab; ++i) {
        const Dual dual =
            term(divergence, params.parameters[0], params.parameters[1], p.log[i], q.log[i]);
        value += dual.value;
        slopes += slope[i] = dual.slope;
      }
      value = value < 0 ? 0 : value;  // by rounding alone
      if (!std::isfinite(slopes)) slopes = kNaN;
    }
    for (int64_t i = 0; i < vocab && params.kd_weight != 0; ++i)
      gradient[i] += params.kd_weight * (slope[i] - std::exp(q.log[i]) * slopes) / temperature;
    if (params.kd_weight != 0) result.loss += params.kd_weight * value;
    if (params.metrics) {
      result.metrics[kDivergence] = value;
      result.metrics[kTeacherEntropy] = p.entropy();
      result.metrics[kStudentEntropy] = q.entropy();
      result.metrics[kAgreement] = p.valid() && q.valid() ? s.top() == t.top() : kNaN;
    }
  }
  const int64_t label = params.labels ? params.labels[row] : 0;
  const bool inside = label >= 0 && label < vocab;
  if (params.labels && (params.ce_weight != 0 || params.metrics)) {
    const Softmax q(s.transformed, 1);
    const double loss = inside ? -q.log[label] : kNaN;
    if (params.ce_weight != 0) result.loss += params.ce_weight * loss;
    if (params.metrics) result.metrics[kCrossEntropy] = loss;
    for (int64_t i = 0; i < vocab && params.ce_weight != 0; ++i)
      gradient[i] += params.ce_weight * (std::exp(q.log[i]) - (i == label));
  }
  if (!inside) {  // also where it only says that the row takes part
    result.loss = kNaN;
    gradient.assign(vocab, kNaN);
  }
  result.loss *= weight;
  const double cap = params.student_transform.softcap, scale = params.student_transform.scale;
  for (int64_t i = 0; i < vocab; ++i) {
    const double cosh = cap == 0 ? 1 : std::cosh(scale * s.raw[i] / cap);
    const double derivative = scale / (cosh * cosh);
    if (derivative != 0 || gradient[i] != gradient[i])
      result.gradient[i] = gradient[i] * derivative * weight / normalizer;
  }
  return result;
}

}  // namespace kd::tests
