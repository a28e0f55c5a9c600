// One CTA reads the row pair again in every sweep, from cache where it is still there. Serves every
// vocabulary, dtype and device; the resident kernel is better where it fits.
#pragma once

#include "run_row.h"
#include "tiles.h"

namespace kd::cuda {

class StreamingRow {
  static constexpr int kCount = 8;

 public:
  static constexpr bool kHeld = false;
  static constexpr bool kKeeps = false;
  using Total = Sum;

  KD_DEVICE StreamingRow(const LaunchParams& params, const Team& team, int64_t row)
      : student(params.student_rows[row]),
        gradient(params.gradient_rows[row]),
        teacher_(params.teacher_rows[row]),
        dtype_(params.student.dtype),
        teacher_dtype_(params.teacher.dtype),
        columns_(team, params, student, teacher_, gradient) {}

  KD_DEVICE void load() const {}
  KD_DEVICE void wait_until_loaded() const {}
  KD_DEVICE void refresh() const {}

  // Calls step(place, logits) for all of this thread's columns; what lies beyond the vocabulary is
  // -inf.
  template <class Step>
  KD_DEVICE void for_each_of_student(Step step) const {
    for_each_of(student, dtype_, step);
  }
  template <class Step>
  KD_DEVICE void for_each_of_teacher(Step step) const {
    for_each_of(teacher_, teacher_dtype_, step);
  }

  // Calls step(place, student's logits, teacher's logits), while the next place's are on their way.
  // The last sweep's 16-bit logits are the first to be evicted; float32 ones come in two halves,
  // between which they have to stay.
  template <class Step>
  KD_DEVICE void for_each(Step step) const {
    sweep<false>(step);
  }
  template <class Step>
  KD_DEVICE void for_each_at_last(Step step) const {
    sweep<true>(step);
  }

  KD_DEVICE void store_gradient(const Place<kCount>& place, const float (&x)[kCount]) const {
    if (!columns_.aligned) {
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        if (place.column(i) < columns_.vocab) store_1(gradient, place.column(i), dtype_, x[i]);
    } else if (dtype_ == DType::kFloat32) {
      char* to = gradient + place.begin * (int64_t)4;
      store_16(to, pack<4>({x[0], x[1], x[2], x[3]}, false));
      store_16(to + 16, pack<4>({x[4], x[5], x[6], x[7]}, false));
    } else {
      store_16(gradient + place.begin * (int64_t)2, pack<2>(x, dtype_ == DType::kBFloat16));
    }
  }
  KD_DEVICE void store_gradient(const Place<1>& place, const float (&x)[1]) const {
    store_1(gradient, place.begin, dtype_, x[0]);
  }

  // The same: there is no place to hold it.
  template <class Place, int n>
  KD_DEVICE void hold_gradient(const Place& place, const float (&x)[n]) const {
    store_gradient(place, x);
  }
  KD_DEVICE void store_held_gradient() const {}

  KD_DEVICE DType dtype() const { return dtype_; }

  const char* const student;
  char* const gradient;  // null: loss only
  bool reads_teacher = true;

 private:
  // The 32 or 16 bytes of a place.
  struct Vectors {
    uint4 first, second;
  };

  template <bool kLast, class Step>
  KD_DEVICE void sweep(Step step) const {
    Vectors next_s, next_t;
    const auto fetch_both = [&](const Place<kCount>& place) {
      if (!columns_.holds(place)) return;
      fetch<kLast>(student, dtype_, place, next_s);
      if (reads_teacher) fetch<kLast>(teacher_, teacher_dtype_, place, next_t);
    };
    Place<kCount> place = columns_.place(0);
    fetch_both(place);
    while (columns_.holds(place)) {
      const Place<kCount> here = place;
      float s[kCount], t[kCount] = {};
      read(student, dtype_, here, next_s, s);
      if (reads_teacher) read(teacher_, teacher_dtype_, here, next_t, t);
      place.begin += columns_.pace();
      fetch_both(place);
      step(here, s, t);
    }
    if (columns_.edge < 0) return;
    float s[1] = {load_1(student, columns_.edge, dtype_)}, t[1] = {};
    if (reads_teacher) t[0] = load_1(teacher_, columns_.edge, teacher_dtype_);
    step(columns_.edge_place(), s, t);
  }

  template <class Step>
  KD_DEVICE void for_each_of(const char* row, DType dtype, Step step) const {
    for (int slot = 0; columns_.holds(columns_.place(slot)); ++slot) {
      const Place<kCount> place = columns_.place(slot);
      Vectors vectors;
      float x[kCount];
      fetch<false>(row, dtype, place, vectors);
      read(row, dtype, place, vectors, x);
      step(place, x);
    }
    if (columns_.edge < 0) return;
    float x[1] = {load_1(row, columns_.edge, dtype)};
    step(columns_.edge_place(), x);
  }

  // Loads a place, unless its columns have to be read one by one.
  template <bool kLast>
  KD_DEVICE void fetch(const char* row, DType dtype, const Place<kCount>& place,
                       Vectors& vectors) const {
    if (!columns_.aligned) return;
    const char* from = row + place.begin * item_size(dtype);
    if (dtype == DType::kFloat32)
      load_32(from, vectors.first, vectors.second);
    else
      vectors.first = kLast ? load_16_at_last(from) : load_16(from);
  }

  KD_DEVICE void read(const char* row, DType dtype, const Place<kCount>& place,
                      const Vectors& vectors, float (&x)[kCount]) const {
    if (!columns_.aligned) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int column = place.column(i);
        x[i] = column < columns_.vocab ? load_1(row, column, dtype) : -INFINITY;
      }
    } else if (dtype == DType::kFloat32) {
      float low[4], high[4];
      unpack<4>(vectors.first, false, low);
      unpack<4>(vectors.second, false, high);
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = low[i], x[4 + i] = high[i];
    } else {
      unpack<2>(vectors.first, dtype == DType::kBFloat16, x);
    }
  }

  const char* const teacher_;
  const DType dtype_, teacher_dtype_;
  const Columns<kCount> columns_;
};

template <class Divergence, bool kOptions>
__global__ void __launch_bounds__(kStreamingThreads<Divergence>, 1)
    streaming_kernel(const RowsParams<Divergence> params) {
  const Team team(1, kOptions);
  run_row<StreamingRow, kOptions>(params, team, params.first_row + blockIdx.x);
}

}  // namespace kd::cuda
