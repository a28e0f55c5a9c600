// A softmax state in a thread, and merged over the threads that share a row.
#pragma once

#include "elements.h"

#include "../core/softmax_state.h"

namespace kd::cuda {

// Adding this and taking it away rounds to a whole number; in between it is in the low bits.
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23

// 2^d for a whole d <= 0, exactly; 0 below 2^-126.
KD_DEVICE float power_of_two(float d) {
  return bits_as<float>(bits_as<uint32_t>(fmaxf(d, -127.0f) + (kRound + 127.0f)) << 23);
}

// x c as a whole number.
KD_DEVICE float shift_of(float x, float c) { return fmaf(x, c, kRound) - kRound; }

// The sum of 2^(x c - shift) over logits x, where c = log2(e) / T and the shift is max c, rounded.
// An exponent is one multiply-add with one rounding; and since shifts are whole numbers, states
// merge without rounding, which the ratio of two sums, a part of every log q - log p, would feel.
struct alignas(16) State {
  float max = kLowestLogit;
  double sum = 0;

  KD_DEVICE float shift(float c) const { return shift_of(max, c); }

  // The same relative to a larger maximum.
  KD_DEVICE void rise(float to, float c) {
    sum *= power_of_two(shift(c) - shift_of(to, c));
    max = to;
  }

  KD_DEVICE void merge(State other, float c) {
    const float common = fmaxf(max, other.max);
    rise(common, c);
    other.rise(common, c);
    sum += other.sum;
  }

  KD_DEVICE bool valid() const { return is_valid_sum(sum); }

  // max c - shift.
  KD_DEVICE double excess(float c) const { return (double)max * c - shift(c); }

  // The sum with its largest term exact: 2^x is approximate, and of a certain model this term is
  // nearly the whole sum.
  KD_DEVICE double corrected_sum(float c) const {
    const float added = exp2_approx(fmaf(max, c, -shift(c)));
    return sum + (exponential((float)(kNatsPerBit * excess(c))).expm1 - ((double)added - 1));
  }

  // log sum exp((x - max) / T).
  KD_DEVICE float log_sum(float c) const {
    return (float)(logf((float)corrected_sum(c)) - kNatsPerBit * excess(c));
  }
};

// The state of the logits a thread has seen; Total adds up their exponentials.
template <class Total>
struct Running {
  float c;
  float max = kLowestLogit;
  float shift;  // of max; like it, only ever rises
  Total sum;

  KD_DEVICE explicit Running(float c) : c(c), shift(shift_of(max, c)) {}

  template <int n>
  KD_DEVICE void push(const float (&x)[n]) {
    make_room(x);
    float exponents[n], terms[n];
    add(x, exponents, terms);
  }

  template <int n>
  KD_DEVICE void make_room(const float (&x)[n]) {
    const float before = shift;
    rise(max_of(x));
    sum.scale(power_of_two(before - shift));
  }

  // For logits that stay on chip: first the largest, then all of them, for half the instructions.
  KD_DEVICE void rise(float to) {
    max = fmaxf(max, to);
    shift = shift_of(max, c);
  }
  template <int n>
  KD_DEVICE void add(const float (&x)[n], float (&exponents)[n], float (&terms)[n]) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      exponents[i] = fmaf(x[i], c, -shift);
      terms[i] = exp2_approx(exponents[i]);
    }
    sum.add(sum_of(terms));
  }

  KD_DEVICE State state() const { return {max, sum.value()}; }
};

template <class T>
KD_DEVICE T warp_sum(T x) {
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) x += __shfl_xor_sync(~0u, x, bits);
  return x;
}

KD_DEVICE float warp_max(float x) {
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, bits));
  return x;
}

// The states of all lanes merged, the same in every lane.
KD_DEVICE State warp_merge(State mine, float c) {
  const float max = warp_max(mine.max);
  mine.rise(max, c);
  return {max, warp_sum(mine.sum)};
}

// The first largest logit.
struct Top {
  float logit = -INFINITY;
  int column = 0x7fffffff;

  KD_DEVICE void push(const Top& other) {
    if (other.logit > logit || (other.logit == logit && other.column < column)) *this = other;
  }

  template <int n, class Place>
  KD_DEVICE void push(const float (&x)[n], const Place& place) {
#pragma unroll
    for (int i = 0; i < n; ++i) push(Top{x[i], place.column(i)});
  }
};

KD_DEVICE Top warp_top(Top top) {
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) {
    const float logit = __shfl_xor_sync(~0u, top.logit, bits);
    top.push(Top{logit, __shfl_xor_sync(~0u, top.column, bits)});
  }
  return top;
}

struct alignas(16) Tops {
  Top student, teacher;

  KD_DEVICE void merge(const Tops& other) {
    student.push(other.student);
    teacher.push(other.teacher);
  }
};

KD_DEVICE Tops warp_tops(const Tops& mine) {
  return {warp_top(mine.student), warp_top(mine.teacher)};
}

}  // namespace kd::cuda
