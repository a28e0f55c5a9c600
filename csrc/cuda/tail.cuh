// Log-sum-exps of the columns that a sparse teacher does not list, and their gradient: one CTA for
// a row, which it reads once in the forward and once in the backward.
#pragma once

#include "streaming.cuh"

namespace kd::cuda {

constexpr int kTailThreads = 256;
constexpr size_t kTailSharedBytes = kTailThreads / 32 * sizeof(State);

// TailParams with what the host can compute once. The teacher's rows are the student's; nobody
// reads them.
struct TailLaunch : LaunchParams {
  TailParams tail;
  float c;  // log2(e) / temperature

  explicit TailLaunch(const TailParams& params)
      : LaunchParams(rows_of(params)), tail(params), c((float)(kBitsPerNat / params.temperature)) {}

 private:
  static LogitsParams rows_of(const TailParams& params) {
    LogitsParams result;
    result.rows = params.rows;
    result.vocab = params.vocab;
    result.student = result.teacher = params.student;
    result.gradient = params.gradient;
    return result;
  }
};

// The listed columns of a row, as a thread comes by them: its places rise, except for the left-over
// column at an edge.
class ListedColumns {
 public:
  KD_DEVICE ListedColumns(const TailParams& params, int64_t row)
      : next_(params.listed + row * params.listed_size), end_(next_ + params.listed_size) {
    begin_ = next_;
    look();
  }

  // x = -inf where a column is listed.
  template <int n>
  KD_DEVICE void mask(const Place<n>& place, float (&x)[n]) {
    if (n == 1) restart();
    while (column_ < place.begin) advance();
    if (column_ > place.column(n - 1)) return;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      while (column_ < place.column(i)) advance();
      if (column_ == place.column(i)) x[i] = -INFINITY;
    }
  }

 private:
  KD_DEVICE void look() { column_ = next_ < end_ ? *next_ : INT64_MAX; }
  KD_DEVICE void advance() {
    ++next_;
    look();
  }
  KD_DEVICE void restart() {
    next_ = begin_;
    look();
  }

  const int64_t *begin_, *next_, *end_;
  int64_t column_;  // *next_
};

// The sum of a row's tail at one temperature, merged over the CTA.
KD_DEVICE void write_log_sum(const Team& team, const State& mine, float c, float* reference,
                             float* log_sum) {
  merge_in_cta(team, warp_merge(mine, c), c, [&](const State& all) {
    *reference = all.max;
    *log_sum = all.valid() ? all.log_sum(c) : all.sum == 0 ? -INFINITY : NAN;
  });
}

__global__ void __launch_bounds__(kTailThreads) tails_kernel(const TailLaunch launch) {
  const TailParams& params = launch.tail;
  const Team team(1, true);
  const int64_t index = launch.first_row + blockIdx.x;
  float* const reference = params.tails + index;
  float* const log_sum = reference + params.rows;
  float* const log_sum_at_1 = log_sum + params.rows;
  if (params.kept && !params.kept[index]) {
    if (threadIdx.x != 0) return;
    *reference = 0;
    *log_sum = -INFINITY;
    if (params.at_1) *log_sum_at_1 = -INFINITY;
    return;
  }
  StreamingRow row(launch, team, index);
  row.reads_teacher = false;
  ListedColumns listed(params, index);
  Running<Sum> tail(launch.c), tail_at_1(kLog2E);
  row.for_each([&](const auto& place, const auto& raw, const auto&) {
    constexpr int n = std::remove_reference_t<decltype(place)>::kCount;
    float x[n];
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] = raw[i];
    apply(params.transform, x);
    listed.mask(place, x);
    tail.push(x);
    if (params.at_1) tail_at_1.push(x);
  });
  write_log_sum(team, tail.state(), launch.c, reference, log_sum);
  if (params.at_1) write_log_sum(team, tail_at_1.state(), kLog2E, reference, log_sum_at_1);
}

// What a row's exponentials 2^(x c - shift) are multiplied by to be their part of the gradient.
struct TailFactor {
  float c, shift, factor;

  KD_DEVICE TailFactor(const TailParams& params, int64_t row, int which, float c,
                       float inverse_temperature)
      : c(c) {
    const float reference = params.tails[row];
    const float log_sum = params.tails[(1 + which) * params.rows + row];
    const float gradient = params.grad_tails[which * params.rows + row];
    const State state{reference, 0};
    shift = state.shift(c);
    factor = gradient * 0;  // NaN stays NaN
    if (gradient == 0 || log_sum == -INFINITY) return;
    // A softcap's derivative has the scale.
    const float scale = params.transform.softcap > 0 ? 1 : params.transform.scale;
    factor = gradient * scale * inverse_temperature *
             exp(-(log_sum + (float)(kNatsPerBit * state.excess(c))));
  }

  KD_DEVICE float operator()(float x) const { return exp2_approx(fmaf(x, c, -shift)) * factor; }
};

__global__ void __launch_bounds__(kTailThreads) tails_gradient_kernel(const TailLaunch launch) {
  const TailParams& params = launch.tail;
  const Team team(1, true);
  const int64_t index = launch.first_row + blockIdx.x;
  StreamingRow row(launch, team, index);
  row.reads_teacher = false;
  const TailFactor tail(params, index, 0, launch.c, 1 / params.temperature);
  const bool at_1 = params.at_1;
  const TailFactor tail_at_1(params, index, at_1, at_1 ? kLog2E : launch.c, 1);
  const float both = tail.factor + (at_1 ? tail_at_1.factor : 0);
  if (both != both) {
    fill(team, row.gradient, row.dtype(), 0, params.vocab, both);
  } else if (tail.factor != 0 || (at_1 && tail_at_1.factor != 0)) {
    row.for_each([&](const auto& place, const auto& raw, const auto&) {
      constexpr int n = std::remove_reference_t<decltype(place)>::kCount;
      float x[n], g[n];
#pragma unroll
      for (int i = 0; i < n; ++i) x[i] = raw[i];
      apply(params.transform, x);
#pragma unroll
      for (int i = 0; i < n; ++i) g[i] = tail(x[i]);
      if (at_1) {
#pragma unroll
        for (int i = 0; i < n; ++i) g[i] += tail_at_1(x[i]);
      }
      if (params.transform.softcap > 0) chain_softcap(params.transform, raw, g);
      row.store_gradient(place, g);
    });
  } else {
    fill(team, row.gradient, row.dtype(), 0, params.vocab, 0);
  }
  fill(team, row.gradient, row.dtype(), params.vocab, params.gradient.width, 0);
  __syncthreads();  // what was written for listed columns is overwritten
  const int64_t* const listed = params.listed + index * params.listed_size;
  const float* const of_listed = params.grad_listed + index * params.listed_size;
  for (int64_t i = threadIdx.x; i < params.listed_size; i += blockDim.x)
    if (listed[i] >= 0) store_1(row.gradient, listed[i], row.dtype(), of_listed[i]);
}

}  // namespace kd::cuda
