// Runs the CUDA kernels of csrc/cuda on the CPU. Include this before a .cuh: it provides what a
// kernel uses of CUDA, and the wrappers that csrc/cuda/ptx.h and launch.h provide on a device.
//
// The threads of a cluster are fibers on one OS thread (emulator.cpp). They run in an order drawn
// from a seed, until they have to wait. What a device would punish, at times, is always an error
// here: a lane missing from a *_sync call, a misaligned access, a wait that never ends, remote
// shared memory of a CTA that has exited or does so before it arrives, shared memory that nobody
// wrote (NaN), or to which a store is under way. AddressSanitizer sees this last and memory
// overruns, since tests allocate exact sizes; ThreadSanitizer sees missing barriers, since it is
// told of the order that barriers make and of no other.
#pragma once

#define KD_EMULATE 1

#include <cfloat>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "../cuda/tiles.h"

namespace kd::emulator {

// The line of a kernel that calls one of the functions below.
struct Where {
  const char* file;
  int line;
  static constexpr Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// The last argument of whatever can fail: the line that calls it.
#define KD_HERE kd::emulator::Where where = kd::emulator::Where::here()

struct Options {
  uint64_t seed = 0;       // of the order of threads, clusters and stores
  const char* label = "";  // what messages call the launch
};
extern Options options;

// Prints what went wrong, and where, and aborts.
[[noreturn]] void fail(Where where, const char* format, ...) __attribute__((format(printf, 2, 3)));
void check_aligned(const volatile void* address, size_t bytes, const char* what, Where where);

struct Launch {
  unsigned grid, block, cluster;
  size_t shared_bytes;
};
void run(const Launch& launch, void (*thread)(const void*), const void* arguments);

// What the running thread does; all of it but the first may let others run.
char* shared_memory();
void sync_threads(Where where);
struct Exchange {
  uint64_t value;   // of the source lane
  unsigned ballot;  // the lanes whose value is not 0
};
Exchange exchange(const char* what, unsigned mask, uint64_t value, int source, Where where);
void sync_warp(unsigned mask, Where where);
unsigned cluster_rank();
unsigned cluster_size();
void cluster_arrive(Where where);
void cluster_wait(Where where);
void mbarrier_init(uint64_t* barrier, unsigned arrivals, Where where);
void fence_mbarrier_init();
void mbarrier_arrive(uint64_t* barrier, int64_t expected_bytes, Where where);
void mbarrier_wait(uint64_t* barrier, unsigned parity, Where where);
void store_async(const void* mine, const void* value, size_t bytes, uint64_t* barrier,
                 unsigned rank, Where where);
// A thread's own copies of 16 bytes: put off until it waits, or else to be done at once.
struct OwnCopy {
  void* shared = nullptr;
  const void* global = nullptr;
};
bool put_off(OwnCopy copy, Where where);
OwnCopy next_put_off();  // of the running thread; null where there is none
// Nothing but a note in `fetched`, which is null or a test's.
struct Fetched {
  const char* from;
  uint32_t bytes;
};
extern std::vector<Fetched>* fetched;
void fetch_into_cache(const void* from, uint32_t bytes, Where where);

}  // namespace kd::emulator

// ---- CUDA ----

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

// One-dimensional, as our kernels are.
struct Index {
  unsigned x;
};
extern Index threadIdx, blockIdx, blockDim, gridDim;

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};

inline void __syncthreads(KD_HERE) { kd::emulator::sync_threads(where); }
inline void __syncwarp(unsigned mask = ~0u, KD_HERE) { kd::emulator::sync_warp(mask, where); }
inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
inline uint64_t __umul64hi(uint64_t x, uint64_t y) {
  return (uint64_t)((unsigned __int128)x * y >> 64);
}

namespace kd::emulator {

template <class T>
T shuffle(const char* what, unsigned mask, T value, int source, Where where) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(what, mask, bits, source, where).value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace kd::emulator

template <class T>
T __shfl_sync(unsigned mask, T value, int source, KD_HERE) {
  return kd::emulator::shuffle("__shfl_sync", mask, value, source, where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, KD_HERE) {
  return kd::emulator::shuffle("__shfl_xor_sync", mask, value, threadIdx.x % 32 ^ bits, where);
}

// ---- csrc/cuda/ptx.h and launch.h ----

namespace kd::cuda {

// An error up to the 2^-22 that PTX allows the approximations, less what rounding to float adds;
// its sign and share are drawn from x.
inline double allowed_error(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits = (bits ^ (bits >> 16)) * 0x7feb352du;
  bits = (bits ^ (bits >> 15)) * 0x846ca68bu;
  return std::ldexp(0.75 * (int32_t)(bits ^ (bits >> 16)), -31 - 22);
}

inline float flush_subnormal(float x) {
  return std::fabs(x) < FLT_MIN ? std::copysign(0.0f, x) : x;
}

inline float exp2_approx(float x) {
  if (flush_subnormal(x) == 0) return 1;
  return flush_subnormal((float)(std::exp2((double)x) * (1 + allowed_error(x))));
}

inline float log2_approx(float x) {
  x = flush_subnormal(x);
  const double exact = std::log2((double)x);
  if (!std::isfinite(exact)) return (float)exact;
  return (float)(exact + allowed_error(x) * (0.5f < x && x < 2 ? 1 : std::fabs(exact)));
}

inline float reciprocal_approx(float x) {
  return flush_subnormal((float)((1 + 0.25 * allowed_error(x)) / (double)flush_subnormal(x)));
}

inline float fma_saturated(float x, float y, float z) {
  return std::fmin(std::fmax(std::fma(flush_subnormal(x), y, z), 0.0f), 1.0f);
}

inline uint4 load_16(const void* address, KD_HERE) {
  emulator::check_aligned(address, 16, "load_16", where);
  return *static_cast<const uint4*>(address);
}

inline uint4 load_16_at_last(const void* address, KD_HERE) { return load_16(address, where); }

inline void load_32(const char* address, uint4& first, uint4& second, KD_HERE) {
  first = load_16(address, where);
  second = load_16(address + 16, where);
}

inline void copy_16(void* shared, const void* global, KD_HERE) {
  if (!emulator::put_off({shared, global}, where))
    *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global);
}

// Nothing comes of it but that all of it must be memory.
inline void fetch_into_cache(const void* from, uint32_t bytes, KD_HERE) {
  emulator::fetch_into_cache(from, bytes, where);
}

inline void wait_for_copies() {
  for (emulator::OwnCopy copy; (copy = emulator::next_put_off()).shared;)
    *static_cast<uint4*>(copy.shared) = *static_cast<const uint4*>(copy.global);
}

inline void store_16(void* address, uint4 value, KD_HERE) {
  emulator::check_aligned(address, 16, "store_16", where);
  *static_cast<uint4*>(address) = value;
}

inline uint32_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return std::isnan(x) ? 0x7fff : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

inline float from_bfloat16(uint32_t x) {
  x <<= 16;
  float result;
  std::memcpy(&result, &x, sizeof x);
  return result;
}

inline uint32_t to_float16(float x) {
  if (std::isnan(x)) return 0x7fff;
  const uint32_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (size >= 65520) return sign | 0x7c00;
  if (size < 0x1p-14f) return sign | (uint32_t)std::nearbyint(size * 0x1p24f);  // carries to normal
  const int exponent = std::ilogb(size);
  const uint32_t mantissa = (uint32_t)std::nearbyint(std::ldexp(size, 10 - exponent));
  return sign | (((uint32_t)(exponent + 14) << 10) + mantissa);  // the leading 1 counts in both
}

inline float from_float16(uint32_t x) {
  const int exponent = (x >> 10) & 31, mantissa = x & 1023;
  const float size = exponent == 31  ? (mantissa ? NAN : INFINITY)
                     : exponent == 0 ? std::ldexp((float)mantissa, -24)
                                     : std::ldexp((float)(mantissa + 1024), exponent - 25);
  return x & 0x8000 ? -size : size;
}

// The first argument goes to the lower half, the lower address.
inline uint32_t pack_bfloat16x2(float low, float high) {
  return to_bfloat16(low) | to_bfloat16(high) << 16;
}
inline uint32_t pack_float16x2(float low, float high) {
  return to_float16(low) | to_float16(high) << 16;
}
inline float2 unpack_bfloat16x2(uint32_t x) {
  return {from_bfloat16(x & 0xffff), from_bfloat16(x >> 16)};
}
inline float2 unpack_float16x2(uint32_t x) {
  return {from_float16(x & 0xffff), from_float16(x >> 16)};
}

inline uint32_t max_bfloat16x2(uint32_t x, uint32_t y) {
  const float2 a = unpack_bfloat16x2(x), b = unpack_bfloat16x2(y);
  return pack_bfloat16x2(std::fmax(a.x, b.x), std::fmax(a.y, b.y));
}
inline uint32_t max_float16x2(uint32_t x, uint32_t y) {
  const float2 a = unpack_float16x2(x), b = unpack_float16x2(y);
  return pack_float16x2(std::fmax(a.x, b.x), std::fmax(a.y, b.y));
}

template <class T>
T* shared_memory() {
  return reinterpret_cast<T*>(emulator::shared_memory());
}

inline unsigned cluster_rank() { return emulator::cluster_rank(); }
inline unsigned cluster_size() { return emulator::cluster_size(); }
inline unsigned cluster_index() { return blockIdx.x / emulator::cluster_size(); }
inline void cluster_arrive_relaxed(KD_HERE) { emulator::cluster_arrive(where); }
inline void cluster_wait(KD_HERE) { emulator::cluster_wait(where); }

inline void mbarrier_init(uint64_t* barrier, unsigned arrivals, KD_HERE) {
  emulator::mbarrier_init(barrier, arrivals, where);
}
// Arrives, and lets the phase last until that many bytes more have come.
inline void mbarrier_expect_bytes(uint64_t* barrier, unsigned bytes, KD_HERE) {
  emulator::mbarrier_arrive(barrier, bytes, where);
}
// Returns when the phase of this parity is over.
inline void mbarrier_wait(uint64_t* barrier, unsigned parity, KD_HERE) {
  emulator::mbarrier_wait(barrier, parity, where);
}
template <class T>
void store_async(T* mine, const T& value, uint64_t* barrier, unsigned rank, KD_HERE) {
  emulator::store_async(mine, &value, sizeof(T), barrier, rank, where);
}
inline void fence_mbarrier_init() { emulator::fence_mbarrier_init(); }

using Grid = emulator::Launch;

template <class Params>
void launch(void (*kernel)(Params), const Grid& grid, void* /*stream*/, const Params& params) {
  struct Arguments {
    void (*kernel)(Params);
    const Params& params;
  } arguments{kernel, params};
  emulator::run(
      grid,
      [](const void* pointer) {
        const auto& arguments = *static_cast<const Arguments*>(pointer);
        arguments.kernel(arguments.params);
      },
      &arguments);
}

inline void use_device(int) {}

struct Capturable {
  Capturable() {}
};

template <class Params>
Device device_of(void (*)(Params), int) {
  return {9, 0, 227 * 1024, 1, 50 << 20};  // of one SM, so that few rows are in flight
}

template <class Params>
std::string why_not(void (*)(Params), int) {
  return "";
}

// So many that a case with a few rows has some beyond them, and another number than a device's.
template <class Params>
int clusters_at_once(void (*)(Params), const Grid& grid) {
  return grid.cluster > 2 ? 1 : 3;
}

}  // namespace kd::cuda
