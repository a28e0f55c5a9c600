// What the sweeps need of a softmax, block by block: its state, entropy and top token.
#pragma once

#include <cmath>

#include "blocks.h"

#include "../core/softmax_state.h"

namespace kd::KD_NAMESPACE {

using State = SoftmaxState<double>;

// exp((x - max) / T) as 2^y with one rounding in y: a multiply-add whose constant is rounded moves
// every result of a row by the same factor, which `correction` takes back.
struct Exponent {
  Exponent(float max, float c)
      : c(c),
        shift(kFusedMultiplyAdd ? max * c : max),
        correction(kFusedMultiplyAdd ? ::exp2((double)shift - (double)max * c) : 1) {}

  KD_INLINE Vec operator()(Vec x) const {
    return exp2(kFusedMultiplyAdd ? x * c - shift : (x - shift) * c);
  }

  float c, shift;
  double correction;
};

// The largest of n logits; NaN may be lost.
template <class Source>
float block_max(const Source& x, int n) {
  Vec even = splat<Vec>(-kInfinity), odd = even;
  int i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    even = max(even, x(i));
    odd = max(odd, x(i + kLanes));
  }
  for (; i < n; i += kLanes) even = max(even, x(i));
  return largest(max(even, odd));
}

// Adds n logits to a softmax state at temperature log2(e) / c, in one pass: exponentials are
// relative to the largest logit seen before the block, and done again only where the block exceeds
// that by so much that they might overflow. Fetches what comes next meanwhile.
template <class Source>
void push_block(State& state, const Source& x, int n, float c, const Upcoming& upcoming) {
  constexpr float kHeadroom = 40;  // in powers of two
  if (state.sum == 0) state.max = larger(block_max(x, n), kLowestLogit);
  for (;;) {
    const Exponent exponent(state.max, c);
    // What rounding takes from the sum is summed apart: the ratio of two sums enters every
    // log q - log p, where it must not drown close logits.
    Vec total = {}, lost = {}, tops[4];
    for (Vec& top : tops) top = splat<Vec>(-kInfinity);
    const auto add = [&](Vec term) {
      const Vec sum = total + term;
      lost += term - (sum - total);
      total = sum;
    };
    int i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
      Vec terms[4];
      for (int k = 0; k < 4; ++k) {
        const Vec y = x(i + k * kLanes);
        terms[k] = exponent(y);
        tops[k] = max(tops[k], y);
        upcoming.fetch(i + k * kLanes);
      }
      add((terms[0] + terms[1]) + (terms[2] + terms[3]));
    }
    for (; i < n; i += kLanes) {
      const Vec y = x(i);
      add(exponent(y));
      tops[0] = max(tops[0], y);
    }
    const float top = largest(max(max(tops[0], tops[1]), max(tops[2], tops[3])));
    if (!((top - state.max) * c > kHeadroom)) {
      state.sum += (sum(total) + sum(lost)) * exponent.correction;
      return;
    }
    state.sum *= ::exp2(((double)state.max - top) * c);
    state.max = top;
  }
}

// sum y 2^y with y = (x - max) c over a block: the part of an entropy that needs a sweep.
inline double entropy_block(const float* x, int n, float max, float c) {
  Vec total = {};
  for (int i = 0; i < n; i += kLanes) {
    const Vec y = (load(x + i) - max) * c;
    total += times_or_zero(exp2(y), y);
  }
  return sum(total);
}

template <class Step>
KD_INLINE void for_blocks(int64_t vocab, Step step) {
  for (int64_t begin = 0; begin < vocab; begin += kBlock)
    step(begin, vocab - begin < kBlock ? (int)(vocab - begin) : kBlock);
}

// The position of the first largest raw logit.
inline int64_t top_token(const Reader& reader, int64_t vocab, float* buffer) {
  int64_t top = 0;
  float top_logit = -kInfinity;
  for_blocks(vocab, [&](int64_t begin, int n) {
    const float* x = reader.raw(begin, n, buffer);
    const float block_top = block_max(View<DType::kFloat32>{(const char*)x}, n);
    if (!(block_top > top_logit)) return;
    top_logit = block_top;
    for (top = begin; x[top - begin] != block_top && top < begin + n - 1;) ++top;
  });
  return top;
}

}  // namespace kd::KD_NAMESPACE
