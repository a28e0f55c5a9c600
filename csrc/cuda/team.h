// The threads that share a row pair: one CTA, or the CTAs of a cluster.
#pragma once

#include <cstddef>

#include "pair.h"
#include "tiles.h"

namespace kd::cuda {

// Sums over the row of a second sweep, see row_pair.h.
struct alignas(16) TermSums {
  double value = 0, slope = 0, shift = 0;
  double largest = 0;  // of the slopes' sizes, where their sum does not tell it
};

struct alignas(16) Entropies {
  double student = 0, teacher = 0;
};

// After the first sweep; the last two for calls with options.
struct alignas(16) WarpStates {
  PairState pair;
  State student_at_1;
  Tops tops;
};

// When warps tell each other something: each at most once a row.
enum Exchange { kOfStates, kOfEntropies, kOfNearSums, kOfFarSums, kExchanges };

// What one warp tells the others. Every exchange has a place of its own here, and an mbarrier of
// its own: a fast CTA may be one exchange ahead of a slow one. Calls without options have no memory
// for what only those with options tell.
struct alignas(16) WarpSlot {
  TermSums sums[2];  // of near and of far terms: a row may need both
  WarpStates states;
  Entropies entropies;
};
static_assert(sizeof(WarpSlot) == kSlotBytes);
static_assert(offsetof(WarpSlot, states) + sizeof(PairState) == kPlainSlotBytes);

// Every warp writes its slot in every CTA; then one warp, or every warp, waits and reads all slots
// of its own CTA in the same order, so that all have the same bits. In a cluster an mbarrier of
// each CTA counts the bytes that it is told: nobody waits for another CTA but for these, and none
// exits before it has them all.
class Team {
 public:
  KD_DEVICE Team(unsigned size, bool options)
      : size(size),
        lane(threadIdx.x % 32),
        warps(blockDim.x / 32),
        stride(size * blockDim.x),
        slots_(shared_memory<char>()),
        slot_bytes_(options ? kSlotBytes : kPlainSlotBytes) {}

  // Of this CTA. Asked for anew each time, as no register is left to keep it in.
  KD_DEVICE unsigned rank() const { return size == 1 ? 0 : cluster_rank(); }
  // This thread's number in the team.
  KD_DEVICE unsigned thread() const { return rank() * blockDim.x + threadIdx.x; }

  // No CTA may write into another's shared memory before that one has started and has its
  // mbarriers.
  KD_DEVICE void enter() const {
    if (size == 1) return;
    if (threadIdx.x == 0) {
#pragma unroll
      for (int i = 0; i < kExchanges; ++i) mbarrier_init(arrived((Exchange)i), 1);
      fence_mbarrier_init();
    }
    __syncwarp();
    cluster_arrive_relaxed();
  }
  KD_DEVICE void wait_until_all_entered() const {
    if (size > 1) cluster_wait();
  }

  KD_DEVICE WarpSlot& mine() const { return slot(rank() * warps + threadIdx.x / 32); }

  // Writes `value`, the same in every lane, at `place` of mine() in every CTA: all that this warp
  // tells in this exchange.
  template <class T>
  KD_DEVICE void tell(Exchange which, T& place, const T& value) const {
    if (size == 1) {
      if (lane == 0) place = value;
      return;
    }
    if (threadIdx.x == 0) mbarrier_expect_bytes(arrived(which), size * warps * sizeof(T));
    if (lane < size) store_async(&place, value, arrived(which), lane);
  }

  // A warp sees what every warp told once all warps of its CTA have called meet(), and it has
  // called wait_for().
  KD_DEVICE void meet() const {
    if (size == 1) __syncthreads();
  }
  KD_DEVICE void wait_for(Exchange which) const {
    if (size > 1) mbarrier_wait(arrived(which), 0);
  }
  KD_DEVICE void wait(Exchange which) const {
    meet();
    wait_for(which);
  }

  // Calls read(slot) for this lane's share of all warps' slots.
  template <class Read>
  KD_DEVICE void for_slots(Read read) const {
#pragma unroll 1  // a few slots a lane, while a row may fill all other registers
    for (unsigned i = lane; i < size * warps; i += 32) read(slot(i));
  }

  // What each CTA's first warp fills for the others, in the place of one more slot.
  KD_DEVICE bool in_first_warp() const { return threadIdx.x < 32; }
  template <class T>
  KD_DEVICE T& summary() const {
    static_assert(sizeof(T) + kExchanges * sizeof(uint64_t) <= sizeof(WarpSlot));
    return reinterpret_cast<T&>(slot(size * warps));
  }

  KD_DEVICE char* end_of_slots() const {
    return slots_ + size * warps * slot_bytes_ + sizeof(WarpSlot);
  }

  const unsigned size;         // CTAs
  const unsigned lane, warps;  // of this CTA
  const unsigned stride;       // threads in the team

 private:
  // The mbarrier of an exchange, at the end of that slot; used once, so its phase is the first.
  KD_DEVICE uint64_t* arrived(Exchange which) const {
    return reinterpret_cast<uint64_t*>(end_of_slots()) - kExchanges + which;
  }

  KD_DEVICE WarpSlot& slot(unsigned i) const {
    return *reinterpret_cast<WarpSlot*>(slots_ + i * slot_bytes_);
  }

  char* const slots_;
  const unsigned slot_bytes_;
};

// Merges a state of each warp of the only CTA and calls write(state) in one thread. Shared memory
// has room for a state a warp, and may be used again afterwards.
template <class T, class Write>
KD_DEVICE void merge_in_cta(const Team& team, const T& of_warp, float c, Write write) {
  T* const slots = shared_memory<T>();
  if (team.lane == 0) slots[threadIdx.x / 32] = of_warp;
  __syncthreads();
  if (threadIdx.x == 0) {
    T all;
    for (unsigned i = 0; i < team.warps; ++i) all.merge(slots[i], c);
    write(all);
  }
  __syncthreads();
}

}  // namespace kd::cuda
