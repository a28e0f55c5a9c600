// What the instructions of translated PTX do on the emulator's threads. Addresses in shared memory
// are offsets.
#pragma once

#include <xmmintrin.h>

#include "../scheduler.h"
#include "numbers.h"

using kd::emulator::Where;

template <size_t kSize>
struct Bytes {
  static_assert(kSize > 16, "smaller structs are passed in registers");
  alignas(8) char bytes[kSize];
};

// Instructions say themselves which subnormal numbers are 0; to the emulator all are.
inline void keep_subnormals() { _mm_setcsr(_mm_getcsr() & ~0x8040u); }

// A function that runs a kernel, whose arguments lie at the addresses x.
#define KD_LAUNCH(kernel)                                                                        \
  extern "C" void launch_##kernel(unsigned grid, unsigned block, size_t shared, const void* x) { \
    kd::emulator::run({grid, block, 1, shared}, kernel, x);                                      \
  }

// ---- Memory ----

constexpr uint64_t kSharedMemory = 0;

inline uint64_t address(const char* base, int64_t offset) { return (uint64_t)base + offset; }
inline uint64_t address(uint64_t base, int64_t offset) { return base + offset; }

inline uint64_t to_global(uint64_t x) { return x; }
inline uint64_t from_global(uint64_t x) { return x; }
inline uint64_t to_local(uint64_t x) { return x; }
inline uint64_t from_local(uint64_t x) { return x; }
inline uint64_t to_param(uint64_t x) { return x; }
inline uint64_t from_param(uint64_t x) { return x; }
inline uint64_t to_shared(uint64_t x) { return x - (uint64_t)kd::emulator::shared_memory(); }
inline uint64_t from_shared(uint64_t x) { return x + (uint64_t)kd::emulator::shared_memory(); }

KD_CALL char* generic(uint64_t address, size_t bytes, Where where) {
  kd::emulator::check_aligned((void*)address, bytes, "an access", where);
  return (char*)address;
}
KD_CALL char* global(uint64_t address, size_t bytes, Where where) {
  return generic(address, bytes, where);
}
KD_CALL char* local(uint64_t address, size_t bytes, Where where) {
  return generic(address, bytes, where);
}
inline char* param(uint64_t address, size_t, Where) { return (char*)address; }
KD_CALL char* shared(uint64_t address, size_t bytes, Where where) {
  const size_t size = kd::emulator::state.launch.shared_bytes;
  if ((uint32_t)address + bytes > size)
    kd::emulator::fail(where, "%zu bytes at %u of %zu bytes of shared memory", bytes,
                       (uint32_t)address, size);
  return generic((uint64_t)kd::emulator::shared_memory() + (uint32_t)address, bytes, where);
}

template <class T>
T load(const char* from, int which) {
  T x;
  std::memcpy(&x, from + which * sizeof(T), sizeof x);
  return x;
}
template <class T>
void store(char* to, int which, T x) {
  std::memcpy(to + which * sizeof(T), &x, sizeof x);
}

// ---- Threads together ----

inline void sync_threads(uint32_t threads, Where where) {
  if (threads != blockDim.x)
    kd::emulator::fail(where, "a barrier of %u of %u threads", threads, blockDim.x);
  kd::emulator::sync_threads(where);
}

struct Shuffled {
  uint32_t value;
  bool inside;
};
// The bits of `segment`: the last lane to read from, or the first one, and the lanes' segments.
inline Shuffled shuffled(const char* what, uint32_t x, uint32_t source, bool inside, uint32_t mask,
                         Where where) {
  const uint32_t from = inside ? source : threadIdx.x % 32;
  return {(uint32_t)kd::emulator::exchange(what, mask, x, (int)from, where).value, inside};
}
struct Segment {
  uint32_t lane = threadIdx.x % 32, first, last;
  explicit Segment(uint32_t bits)
      : first(lane & (bits >> 8 & 31)), last(first | (bits & 31 & ~(bits >> 8))) {}
};
KD_CALL Shuffled shuffle_bfly(uint32_t x, uint32_t by, uint32_t bits, uint32_t mask, Where where) {
  const Segment segment(bits);
  const uint32_t source = segment.lane ^ by;
  return shuffled("shfl.bfly", x, source, source <= segment.last, mask, where);
}
KD_CALL Shuffled shuffle_idx(uint32_t x, uint32_t by, uint32_t bits, uint32_t mask, Where where) {
  const Segment segment(bits);
  const uint32_t source = segment.first | (by & 31 & ~(bits >> 8));
  return shuffled("shfl.idx", x, source, source <= segment.last, mask, where);
}
KD_CALL Shuffled shuffle_down(uint32_t x, uint32_t by, uint32_t bits, uint32_t mask, Where where) {
  const Segment segment(bits);
  const uint32_t source = segment.lane + by;
  return shuffled("shfl.down", x, source, source <= segment.last, mask, where);
}
KD_CALL Shuffled shuffle_up(uint32_t x, uint32_t by, uint32_t bits, uint32_t mask, Where where) {
  const Segment segment(bits);
  const int source = (int)segment.lane - (int)by;
  return shuffled("shfl.up", x, (uint32_t)source, source >= (int)segment.last, mask, where);
}

inline bool vote_all(bool x, uint32_t mask, Where where) {
  return kd::emulator::exchange("vote", mask, x, -1, where).ballot == mask;
}
inline bool vote_any(bool x, uint32_t mask, Where where) {
  return kd::emulator::exchange("vote", mask, x, -1, where).ballot != 0;
}
inline uint32_t vote_ballot(bool x, uint32_t mask, Where where) {
  return kd::emulator::exchange("vote", mask, x, -1, where).ballot;
}

template <class T, class Step>
T reduce(T x, uint32_t mask, Step step, Where where) {
  T result{};
  bool first = true;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const T other = (T)kd::emulator::exchange("redux", mask, (UnsignedOf<T>)x, lane, where).value;
    result = first ? other : step(result, other);
    first = false;
  }
  return result;
}

// A lane's two numbers of 16 bits of the 8 x 8 matrix whose rows eight lanes have the addresses of.
KD_CALL uint32_t matrix_part(uint64_t row, int matrix, Where where) {
  const int lane = (int)threadIdx.x % 32;
  const uint64_t mine =
      kd::emulator::exchange("ldmatrix", ~0u, row, 8 * matrix + lane / 4, where).value;
  return load<uint32_t>(shared(mine + 4 * (lane % 4), sizeof(uint32_t), where), 0);
}

// ---- Clusters: an address in another CTA's shared memory has its rank above 24 bits ----

inline uint32_t address_in_cluster(uint32_t address, uint32_t rank) {
  return (address & 0xffffff) | (rank + 1) << 24;
}
inline void store_async(uint64_t to, uint64_t first, uint64_t second, uint64_t barrier,
                        Where where) {
  const uint64_t value[2] = {first, second};
  char* const shared = kd::emulator::shared_memory();
  if ((uint32_t)to >> 24 != (uint32_t)barrier >> 24 || !((uint32_t)to >> 24))
    kd::emulator::fail(where, "st.async that is not told of one other CTA");
  kd::emulator::store_async(shared + (to & 0xffffff), value, sizeof value,
                            (uint64_t*)(shared + (barrier & 0xffffff)), (uint32_t)(to >> 24) - 1,
                            where);
}
