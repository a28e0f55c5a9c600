// The threads that share a row pair: one CTA, or the CTAs of a cluster.
#pragma once

#include "softmax.h"

namespace kd::cuda {

// What one warp tells the others.
struct alignas(16) WarpSlot {
  State student, teacher, student_at_1;
  Top student_top, teacher_top;
  double sums[3], entropies[2];
};

constexpr int64_t slot_bytes(int cluster, int threads) {
  return (int64_t)sizeof(WarpSlot) * cluster * (threads / 32);
}

// Every warp writes its slot in every CTA, all wait once, and every warp reads all slots of its own
// CTA, in the same order: no second wait, and the same bits everywhere.
class Team {
 public:
  KD_DEVICE explicit Team(unsigned size)
      : size(size),
        rank(size == 1 ? 0 : cluster_rank()),
        lane(threadIdx.x % 32),
        warps(blockDim.x / 32),
        first(rank * blockDim.x + threadIdx.x),
        stride(size * blockDim.x),
        slots_(shared_memory<WarpSlot>()) {}

  // No CTA may write into another's shared memory before that one has started.
  KD_DEVICE void enter() const {
    if (size > 1) cluster_arrive_relaxed();
  }
  KD_DEVICE void wait_until_all_entered() const {
    if (size > 1) cluster_wait();
  }

  // After wait(), every thread sees what every thread told before it arrived.
  KD_DEVICE void arrive() const {
    if (size > 1) cluster_arrive();
  }
  KD_DEVICE void wait() const {
    if (size > 1)
      cluster_wait();
    else
      __syncthreads();
  }

  KD_DEVICE WarpSlot& mine() const { return slots_[rank * warps + threadIdx.x / 32]; }

  // Writes `value`, the same in every lane, at `place` of mine() in every CTA.
  template <class T>
  KD_DEVICE void tell(T& place, T value) const {
    if (size == 1) {
      if (lane == 0) place = value;
    } else if (lane < size) {
      store_remote(&place, value, lane);
    }
  }
  KD_DEVICE void tell(State& place, const State& state) const {
    tell(place.max, state.max);
    tell(place.shift, state.shift);
    tell(place.sum, state.sum);
  }
  KD_DEVICE void tell(Top& place, const Top& top) const {
    tell(place.logit, top.logit);
    tell(place.column, top.column);
  }

  // Calls read(slot) for this lane's share of all warps' slots.
  template <class Read>
  KD_DEVICE void for_slots(Read read) const {
#pragma unroll 1  // a few slots a lane, while a row may fill all other registers
    for (unsigned i = lane; i < size * warps; i += 32) read(slots_[i]);
  }

  const unsigned size;         // CTAs
  const unsigned rank;         // of this CTA
  const unsigned lane, warps;  // of this CTA
  const unsigned first;        // this thread's number in the team
  const unsigned stride;       // threads in the team

 private:
  WarpSlot* const slots_;
};

}  // namespace kd::cuda
