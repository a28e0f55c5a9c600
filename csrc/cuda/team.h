// The threads that share a row pair: one CTA, or the CTAs of a cluster.
#pragma once

#include "pair.h"

namespace kd::cuda {

// Sums over the row of a second sweep, see row_pair.h.
struct alignas(16) TermSums {
  double value = 0, slope = 0, shift = 0;
};

struct alignas(16) Entropies {
  double student = 0, teacher = 0;
};

// What one warp tells the others.
struct alignas(16) WarpSlot {
  PairState pair;
  State student_at_1;
  Tops tops;
  TermSums sums[2];  // of near and of far terms: a row may need both
  Entropies entropies;
};

// Every warp writes its slot in every CTA, all wait, and then one warp, or every warp, reads all
// slots of its own CTA, in the same order, so that all have the same bits.
class Team {
 public:
  KD_DEVICE explicit Team(unsigned size)
      : size(size),
        lane(threadIdx.x % 32),
        warps(blockDim.x / 32),
        stride(size * blockDim.x),
        slots_(shared_memory<WarpSlot>()) {}

  // Of this CTA. Asked for anew each time, as no register is left to keep it in.
  KD_DEVICE unsigned rank() const { return size == 1 ? 0 : cluster_rank(); }
  // This thread's number in the team.
  KD_DEVICE unsigned first() const { return rank() * blockDim.x + threadIdx.x; }

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

  KD_DEVICE WarpSlot& mine() const { return slots_[rank() * warps + threadIdx.x / 32]; }

  // Writes `value`, the same in every lane, at `place` of mine() in every CTA.
  template <class T>
  KD_DEVICE void tell(T& place, const T& value) const {
    if (size == 1) {
      if (lane == 0) place = value;
    } else if (lane < size) {
      store_remote(&place, value, lane);
    }
  }

  // Calls read(slot) for this lane's share of all warps' slots.
  template <class Read>
  KD_DEVICE void for_slots(Read read) const {
#pragma unroll 1  // a few slots a lane, while a row may fill all other registers
    for (unsigned i = lane; i < size * warps; i += 32) read(slots_[i]);
  }

  // What each CTA's first warp fills for the others, in the place of one more slot.
  KD_DEVICE bool in_first_warp() const { return threadIdx.x < 32; }
  template <class T>
  KD_DEVICE T& summary() const {
    static_assert(sizeof(T) <= sizeof(WarpSlot));
    return *reinterpret_cast<T*>(slots_ + size * warps);
  }

  const unsigned size;         // CTAs
  const unsigned lane, warps;  // of this CTA
  const unsigned stride;       // threads in the team

 private:
  WarpSlot* const slots_;
};

}  // namespace kd::cuda
