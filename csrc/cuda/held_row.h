// A row pair of one dtype that its team reads once and then holds, in registers or in shared
// memory. A thread holds what it computes, so that no thread waits for another's part.
#pragma once

#include "columns.h"

namespace kd::cuda {

// 16-byte vectors in registers; loops over them are unrolled.
template <int kVectors>
class Registers {
 public:
  static constexpr bool kKeeps = false;

  KD_DEVICE explicit Registers(const Team&) {}

  template <class Columns, class Step>
  KD_DEVICE void for_each_place(const Columns& columns, Step step) const {
#pragma unroll
    for (int slot = 0; slot < kVectors; ++slot) {
      const auto place = columns.place(slot);
      if (columns.holds(place)) step(place);
    }
  }

  template <class Columns, class Step>
  KD_DEVICE void for_each_new_place(const Columns& columns, Step step) {
    for_each_place(columns, step);
  }

  KD_DEVICE uint4& student(int slot) { return student_[slot]; }
  KD_DEVICE uint4& teacher(int slot) { return teacher_[slot]; }

  KD_DEVICE static void load(uint4& vector, const char* from) { vector = load_16(from); }
  KD_DEVICE static void wait() {}

 private:
  uint4 student_[kVectors], teacher_[kVectors];
};

// 16-byte vectors of a slot in shared memory: student, teacher and, where slopes are kept and do
// not fit the teacher's place, one more.
KD_INLINE constexpr int vectors_of_slot(int item_size, bool keeps) {
  return keeps && item_size == 2 ? 3 : 2;
}

// As many slots as the launch has shared memory for, after what the warps tell each other.
template <int kItem, bool kKeepsSlopes>
class Shared {
  static constexpr int kVectors = vectors_of_slot(kItem, kKeepsSlopes);

 public:
  static constexpr bool kKeeps = kKeepsSlopes;

  KD_DEVICE explicit Shared(const Team& team)
      : mine_(team.end_of_slots() + 16 * threadIdx.x), pace_(16 * blockDim.x) {}

  // The first loop over the thread's places finds where its slots end.
  template <class Columns, class Step>
  KD_DEVICE void for_each_new_place(const Columns& columns, Step step) {
    auto place = columns.place(0);
    for (; columns.holds(place); advance(place, columns)) step(place);
    end_ = place.slot;
  }

  template <class Columns, class Step>
  KD_DEVICE void for_each_place(const Columns& columns, Step step) const {
    for (auto place = columns.place(0); place.slot < end_; advance(place, columns)) step(place);
  }

  // A slot is the offset of its first vector.
  KD_DEVICE uint4& student(int slot) { return vector(slot, 0); }
  KD_DEVICE uint4& teacher(int slot) { return vector(slot, 1); }

  // All vectors are on their way at once; there after wait().
  KD_DEVICE static void load(uint4& vector, const char* from) { copy_16(&vector, from); }
  KD_DEVICE static void wait() { wait_for_copies(); }

  KD_DEVICE void keep(int slot, const float (&slopes)[kLanes<kItem>]) {
#pragma unroll
    for (int i = 0; i < kLanes<kItem>; i += 4)
      vector(slot, 1 + i / 4) =
          pack<4>({slopes[i], slopes[i + 1], slopes[i + 2], slopes[i + 3]}, false);
  }
  KD_DEVICE void kept(int slot, float (&slopes)[kLanes<kItem>]) {
#pragma unroll
    for (int i = 0; i < kLanes<kItem>; i += 4) {
      float four[4];
      unpack<4>(vector(slot, 1 + i / 4), false, four);
#pragma unroll
      for (int j = 0; j < 4; ++j) slopes[i + j] = four[j];
    }
  }

 private:
  // Counted up, as a product for every address costs more.
  template <class Place, class Columns>
  KD_DEVICE void advance(Place& place, const Columns& columns) const {
    place.slot += kVectors * pace_;
    place.begin += columns.pace();
  }

  KD_DEVICE uint4& vector(int slot, int i) {
    return *reinterpret_cast<uint4*>(mine_ + slot + i * pace_);
  }

  char* const mine_;
  const int pace_;  // bytes that the CTA's threads hold of one vector each
  int end_;
};

// Asks the last-level cache for the CTA's share of a row, of its whole 16-byte vectors.
KD_DEVICE void fetch_share(const Team& team, const char* row, uint32_t bytes) {
  const uint32_t head = -(uintptr_t)row % 16;
  if (bytes < head) return;
  const uint32_t vectors = (bytes - head) / 16;
  const uint32_t share = (vectors + team.size - 1) >> (31 - __clz(team.size));
  const uint32_t first = team.rank() * share;
  if (first >= vectors) return;
  fetch_into_cache(row + head + first * 16,
                   16 * (vectors - first < share ? vectors - first : share));
}

template <int kItem, class Storage>
class HeldRow {
  static constexpr int kCount = kLanes<kItem>;

 public:
  // Whether a sweep is cheap, for the row is on chip.
  static constexpr bool kHeld = true;
  // Whether slopes stay, in float32, until the gradient is computed.
  static constexpr bool kKeeps = Storage::kKeeps;
  // What adds up a thread's vectors.
  using Total = ShortSum;

  KD_DEVICE HeldRow(const LaunchParams& params, const Team& team, int64_t row)
      : student(params.student_rows[row]),
        gradient(params.gradient_rows[row]),
        teacher_(params.teacher_rows[row]),
        bfloat16_(params.student.dtype == DType::kBFloat16),
        columns_(team, params, student, teacher_, gradient),
        storage_(team) {}

  KD_DEVICE void load() {
    if (columns_.aligned) {
      storage_.for_each_new_place(columns_, [&](const Place<kCount>& place) {
        const int64_t offset = place.begin * (int64_t)kItem;
        storage_.load(storage_.student(place.slot), student + offset);
        if (reads_teacher)
          storage_.load(storage_.teacher(place.slot), teacher_ + offset);
        else
          storage_.teacher(place.slot) = uint4{};
      });
    } else {
      storage_.for_each_new_place(columns_, [&](const Place<kCount>& place) {
        storage_.student(place.slot) = gather(student, place);
        storage_.teacher(place.slot) = reads_teacher ? gather(teacher_, place) : uint4{};
      });
    }
    if (columns_.edge < 0) return;
    student_edge_[0] = load_1(student, columns_.edge, dtype());
    if (reads_teacher) teacher_edge_[0] = load_1(teacher_, columns_.edge, dtype());
  }
  KD_DEVICE void wait_until_loaded() { storage_.wait(); }

  // Memory works while the CTAs of an SM compute: the row pair that one will hold later is on its
  // way to the last-level cache.
  KD_DEVICE void fetch_later(const LaunchParams& params, const Team& team, int64_t row) const {
    const int64_t later = row + params.ahead;
    if (params.ahead == 0 || later >= params.rows || threadIdx.x != blockDim.x - 1) return;
    if (params.token_weight && params.token_weight[later] == 0) return;
    const uint32_t bytes = columns_.vocab * kItem;
    fetch_share(team, params.student_rows[later], bytes);
    if (reads_teacher) fetch_share(team, params.teacher_rows[later], bytes);
  }

  // After something else took their place.
  KD_DEVICE void reload_teacher() {
    storage_.for_each_place(columns_, [&](const Place<kCount>& place) {
      storage_.teacher(place.slot) = columns_.aligned
                                         ? load_16(teacher_ + place.begin * (int64_t)kItem)
                                         : gather(teacher_, place);
    });
    if (columns_.edge >= 0) teacher_edge_[0] = load_1(teacher_, columns_.edge, dtype());
  }

  // Makes the next sweep unpack again, rather than keep every logit in a register of its own.
  KD_DEVICE void refresh() { bfloat16_ = opaque((int)bfloat16_); }

  // The largest logits of this thread's columns; NaN is lost.
  struct Largest {
    float student, teacher;
  };
  KD_DEVICE Largest largest() {
    Largest x{-INFINITY, -INFINITY};
    if (columns_.edge >= 0) x = {student_edge_[0], teacher_edge_[0]};
    of_dtype([&] {
      LargestOf<kItem> student(bfloat16_), teacher(bfloat16_);
      storage_.for_each_place(columns_, [&](const Place<kCount>& place) {
        student.push(storage_.student(place.slot));
        teacher.push(storage_.teacher(place.slot));
      });
      x = {fmaxf(x.student, student.value()), fmaxf(x.teacher, teacher.value())};
    });
    return x;
  }

  // Calls step(place, logits) for all of this thread's columns; beyond the vocabulary is -inf.
  template <class Step>
  KD_DEVICE void for_each_of_student(Step step) {
    for_each_of([&](int slot) { return storage_.student(slot); }, student_edge_[0], step);
  }
  template <class Step>
  KD_DEVICE void for_each_of_teacher(Step step) {
    for_each_of([&](int slot) { return storage_.teacher(slot); }, teacher_edge_[0], step);
  }

  // Calls step(place, student's logits, teacher's logits).
  template <class Step>
  KD_DEVICE void for_each(Step step) {
    of_dtype([&] {
      storage_.for_each_place(columns_, [&](const Place<kCount>& place) {
        float s[kCount], t[kCount];
        unpack<kItem>(storage_.student(place.slot), bfloat16_, s);
        unpack<kItem>(storage_.teacher(place.slot), bfloat16_, t);
        step(place, s, t);
      });
    });
    float s[1] = {student_edge_[0]}, t[1] = {teacher_edge_[0]};
    if (columns_.edge >= 0) step(columns_.edge_place(), s, t);
  }

  // Like any other sweep, as the row is on chip.
  template <class Step>
  KD_DEVICE void for_each_at_last(Step step) {
    for_each(step);
  }

  // Takes the place of the teacher's logits.
  KD_DEVICE void keep(const Place<kCount>& place, const float (&slopes)[kCount]) {
    storage_.keep(place.slot, slopes);
  }
  KD_DEVICE void keep(const Place<1>&, const float (&slopes)[1]) { teacher_edge_[0] = slopes[0]; }

  // Calls step(place, student's logits, slopes).
  template <class Step>
  KD_DEVICE void for_each_kept(Step step) {
    of_dtype([&] {
      storage_.for_each_place(columns_, [&](const Place<kCount>& place) {
        float s[kCount], slopes[kCount];
        unpack<kItem>(storage_.student(place.slot), bfloat16_, s);
        storage_.kept(place.slot, slopes);
        step(place, s, slopes);
      });
    });
    float s[1] = {student_edge_[0]}, slopes[1] = {teacher_edge_[0]};
    if (columns_.edge >= 0) step(columns_.edge_place(), s, slopes);
  }

  // Stores it at once: memory writes while the rest is computed. Not where a thread may still have
  // to read, or others wait for what this one tells them.
  KD_DEVICE void store_gradient(const Place<kCount>& place, const float (&x)[kCount]) {
    store(place, pack<kItem>(x, bfloat16_));
  }
  KD_DEVICE void store_gradient(const Place<1>&, const float (&x)[1]) {
    store_1(gradient, columns_.edge, dtype(), x[0]);
  }

  // It takes the place of the student's logits until store_held_gradient().
  KD_DEVICE void hold_gradient(const Place<kCount>& place, const float (&x)[kCount]) {
    storage_.student(place.slot) = pack<kItem>(x, bfloat16_);
  }
  KD_DEVICE void hold_gradient(const Place<1>&, const float (&x)[1]) { student_edge_[0] = x[0]; }

  KD_DEVICE void store_held_gradient() {
    storage_.for_each_place(
        columns_, [&](const Place<kCount>& place) { store(place, storage_.student(place.slot)); });
    if (columns_.edge >= 0) store_1(gradient, columns_.edge, dtype(), student_edge_[0]);
  }

  KD_DEVICE DType dtype() const {
    return kItem == 4 ? DType::kFloat32 : bfloat16_ ? DType::kBFloat16 : DType::kFloat16;
  }

  const char* const student;
  char* const gradient;  // null: loss only
  bool reads_teacher = true;

 private:
  // Calls loop() in a copy for each 16-bit type, so that it need not ask.
  template <class Loop>
  KD_DEVICE void of_dtype(Loop loop) const {
    if constexpr (kItem == 4)
      loop();
    else if (bfloat16_)
      loop();
    else
      loop();
  }

  template <class Vector, class Step>
  KD_DEVICE void for_each_of(Vector vector, float edge, Step step) const {
    storage_.for_each_place(columns_, [&](const Place<kCount>& place) {
      float x[kCount];
      unpack<kItem>(vector(place.slot), bfloat16_, x);
      step(place, x);
    });
    float x[1] = {edge};
    if (columns_.edge >= 0) step(columns_.edge_place(), x);
  }

  // Columns one by one.
  KD_DEVICE uint4 gather(const char* row, const Place<kCount>& place) const {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kItem == 4) {
        words[i] = bits(row, place.column(i));
      } else {
        const uint32_t low = bits(row, place.column(2 * i));
        words[i] = low | bits(row, place.column(2 * i + 1)) << 16;
      }
    }
    return {words[0], words[1], words[2], words[3]};
  }

  KD_DEVICE void store(const Place<kCount>& place, const uint4& packed) const {
    if (columns_.aligned)
      store_16(gradient + place.begin * (int64_t)kItem, packed);
    else
      scatter(packed, place);
  }

  KD_DEVICE void scatter(const uint4& packed, const Place<kCount>& place) const {
    const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (place.column(i) >= columns_.vocab) continue;
      if constexpr (kItem == 4)
        ((uint32_t*)gradient)[place.column(i)] = words[i];
      else
        ((uint16_t*)gradient)[place.column(i)] = (uint16_t)(words[i / 2] >> (i % 2 * 16));
    }
  }

  // -inf beyond the vocabulary.
  KD_DEVICE uint32_t bits(const char* row, int column) const {
    if constexpr (kItem == 4)
      return column < columns_.vocab ? ((const uint32_t*)row)[column] : 0xff800000u;
    else
      return column < columns_.vocab ? ((const uint16_t*)row)[column]
             : bfloat16_             ? 0xff80u
                                     : 0xfc00u;
  }

  const char* const teacher_;
  bool bfloat16_;
  const Columns<kCount> columns_;
  Storage storage_;
  float student_edge_[1], teacher_edge_[1];
};

}  // namespace kd::cuda
