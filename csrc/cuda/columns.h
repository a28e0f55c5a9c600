// How the threads of a team share out the columns of a row.
#pragma once

#include "rows_params.h"
#include "team.h"

namespace kd::cuda {

// n columns, `step` apart, from `begin` on.
template <int n>
struct Place {
  static constexpr int kCount = n;
  int slot;  // where the row is held, see held_row.h
  int begin, step;

  KD_DEVICE int column(int i) const { return begin + i * step; }
};

// Vectors of kCount neighbours at addresses that are multiples of 16 in every tensor, with a few
// columns left over at either end, one for a thread; or, where the tensors' rows are aligned
// differently, single columns, neighbours in neighbouring threads.
template <int kCount>
struct Columns {
  int vocab;
  bool aligned;
  int begin, end;  // this thread's places begin in [begin, end)
  int stride;      // threads in the team
  int edge = -1;   // this thread's left-over column

  KD_DEVICE Columns(const Team& team, const LaunchParams& params, const char* student,
                    const char* teacher, const char* gradient)
      : vocab((int)params.vocab), stride(team.stride) {
    int head = params.head;
    if (head == LaunchParams::kByRow)
      head = head_of(student, params.student.dtype, teacher, params.teacher.dtype, gradient);
    aligned = head >= 0;
    const int thread = team.thread();
    begin = thread;
    end = vocab;
    if (!aligned) return;
    head = head < vocab ? head : vocab;
    begin = head + thread * kCount;
    end = head + (vocab - head) / kCount * kCount;
    if (thread < head)
      edge = thread;
    else if (thread - head < vocab - end)
      edge = end + thread - head;
  }

  // From one of a thread's places to the next.
  KD_DEVICE int pace() const { return kCount * stride; }
  KD_DEVICE Place<kCount> place(int slot) const {
    return {slot, begin + slot * pace(), aligned ? 1 : stride};
  }

  KD_DEVICE Place<1> edge_place() const { return {0, edge, 1}; }

  KD_DEVICE bool holds(const Place<kCount>& place) const { return place.begin < end; }
};

// The vectors of 16 bytes that lie in columns [begin, end) of a row: columns [head, tail).
struct WholeVectors {
  char* row;
  int shift;
  int64_t head, tail, count;

  KD_DEVICE WholeVectors(char* row, DType dtype, int64_t begin, int64_t end)
      : row(row), shift(log2_lanes(dtype)) {
    const int64_t misaligned = -(uintptr_t)(row + begin * (16 >> shift)) % 16 >> (4 - shift);
    head = begin + misaligned < end ? begin + misaligned : end;
    count = (end - head) >> shift;
    tail = head + (count << shift);
  }

  KD_DEVICE char* operator[](int64_t i) const { return row + (head << (4 - shift)) + i * 16; }
};

// Not inlined: rows without a softmax and padding are rare, and must not cost kernels registers.
KD_DEVICE_CALL void fill_share(int64_t first, int stride, char* row, DType dtype, int64_t begin,
                               int64_t end, float value) {
  const WholeVectors vectors(row, dtype, begin, end);
  for (int64_t i = begin + first; i < vectors.head; i += stride) store_1(row, i, dtype, value);
  for (int64_t i = vectors.tail + first; i < end; i += stride) store_1(row, i, dtype, value);
  const uint32_t word = dtype == DType::kFloat32    ? bits_as<uint32_t>(value)
                        : dtype == DType::kBFloat16 ? pack_bfloat16x2(value, value)
                                                    : pack_float16x2(value, value);
  for (int64_t i = first; i < vectors.count; i += stride)
    store_16(vectors[i], {word, word, word, word});
}

// Columns [begin, end) of a row of the gradient become `value`, 16 bytes at a time.
KD_DEVICE void fill(const Team& team, char* row, DType dtype, int64_t begin, int64_t end,
                    float value) {
  fill_share(team.thread(), team.stride, row, dtype, begin, end, value);
}

}  // namespace kd::cuda
