// Every PTX instruction and NVIDIA intrinsic the kernels use, as functions. The emulator of
// csrc/tests provides the same names for the CPU.
#pragma once

#include <cstdint>
#include <cstring>

#define KD_DEVICE __device__ __forceinline__

#if defined(KD_EMULATE)

#define KD_DEVICE_CALL static __attribute__((noinline))

#else

#define KD_DEVICE_CALL static __device__ __noinline__

namespace kd::cuda {

// 2^x, relative error below 2^-22, subnormal results are 0.
KD_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log2(x), absolute error below 2^-22 in (1/2, 2), relative elsewhere.
KD_DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x, error of at most one unit in the last place; for x up to 2^126, subnormal x give infinity.
KD_DEVICE float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// x y + z, or the nearer one of 0 and 1 beyond these.
KD_DEVICE float fma_saturated(float x, float y, float z) {
  float sum;
  asm("fma.rn.ftz.sat.f32 %0, %1, %2, %3;" : "=f"(sum) : "f"(x), "f"(y), "f"(z));
  return sum;
}

// 16 bytes past the first-level cache. Not through the non-coherent path, which is for memory that
// a kernel never writes: an in-place gradient overwrites what was loaded.
KD_DEVICE uint4 load_16(const void* from) {
  uint4 x;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(from));
  return x;
}

// 16 bytes that this kernel does not read again: the first to be evicted.
KD_DEVICE uint4 load_16_at_last(const void* from) {
  uint4 x;
  asm volatile("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(from));
  return x;
}

// 32 bytes. Through the first-level cache: the halves of a warp's 32-byte sectors are asked for in
// turn, and the second ones are to find what the first ones brought.
KD_DEVICE void load_32(const char* from, uint4& first, uint4& second) {
  const auto load = [](const char* from, uint4& x) {
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(from));
  };
  load(from, first);
  load(from + 16, second);
}

// Starts a copy of 16 bytes to shared memory, past the first-level cache and registers: all of a
// thread's copies are on their way at once. It may read them after wait_for_copies().
KD_DEVICE void copy_16(void* shared, const void* global) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((uint32_t)__cvta_generic_to_shared(shared)),
      "l"(global)
      : "memory");
}

KD_DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Asks the last-level cache for memory, whose address and size are multiples of 16. From sm_90 on;
// nobody waits for it.
KD_DEVICE void fetch_into_cache(const void* from, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(from)),
               "r"(bytes)
               : "memory");
#endif
}

// 16 bytes that this kernel does not read again: the first to be evicted.
KD_DEVICE void store_16(void* to, uint4 x) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x.x), "r"(x.y),
               "r"(x.z), "r"(x.w)
               : "memory");
}

// Two floats to two 16-bit ones, to nearest even; `low` is the first in memory.
KD_DEVICE uint32_t pack_bfloat16x2(float low, float high) {
  uint32_t x;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  return x;
}

KD_DEVICE uint32_t pack_float16x2(float low, float high) {
  uint32_t x;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  return x;
}

KD_DEVICE float2 unpack_bfloat16x2(uint32_t x) {
  return {__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u)};
}

KD_DEVICE float2 unpack_float16x2(uint32_t x) {
  float2 y;
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
      : "=f"(y.x), "=f"(y.y)
      : "r"(x));
  return y;
}

// The larger of two pairs, half by half; a NaN loses.
KD_DEVICE uint32_t max_bfloat16x2(uint32_t x, uint32_t y) {
  uint32_t larger;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(x), "r"(y));
  return larger;
}

KD_DEVICE uint32_t max_float16x2(uint32_t x, uint32_t y) {
  uint32_t larger;
  asm("max.f16x2 %0, %1, %2;" : "=r"(larger) : "r"(x), "r"(y));
  return larger;
}

template <class T>
KD_DEVICE T* shared_memory() {
  extern __shared__ uint4 memory[];
  return reinterpret_cast<T*>(memory);
}

// Clusters, from sm_90 on; elsewhere a CTA is a cluster of its own.

KD_DEVICE unsigned cluster_rank() {
  unsigned rank = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}

KD_DEVICE unsigned cluster_size() {
  unsigned size = 1;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#endif
  return size;
}

// A cluster has a power of two of CTAs. Not %clusterid, which nvcc computes in float: of CTAs from
// 2^24 on it is that of another cluster.
KD_DEVICE unsigned cluster_index() { return blockIdx.x >> (31 - __clz(cluster_size())); }

// All threads of a CTA call these. Memory is not ordered: all that others learn is that a CTA has
// started, and what fence_mbarrier_init() is about.
KD_DEVICE void cluster_arrive_relaxed() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

KD_DEVICE void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

KD_DEVICE uint32_t shared_address(const void* shared) {
  return (uint32_t)__cvta_generic_to_shared(shared);
}

// An mbarrier's phase is over once so many threads have arrived, and the bytes they expect as well.
KD_DEVICE void mbarrier_init(uint64_t* barrier, unsigned arrivals) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
#endif
}

// Before the cluster's barrier, for other CTAs to see what this thread initialised.
KD_DEVICE void fence_mbarrier_init() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// Arrives. Bytes may come before they are expected, as the phase lasts until then.
KD_DEVICE void mbarrier_expect_bytes(uint64_t* barrier, unsigned bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
#endif
}

// Returns when the phase of this parity is over; the first one's is 0. Whole warps call it: lanes
// that left one by one would make every shuffle from there on gather them.
KD_DEVICE void mbarrier_wait(uint64_t* barrier, unsigned parity) {
#if __CUDA_ARCH__ >= 900
  uint32_t over;
  do {
    asm volatile(
        "{ .reg .pred over;\n"
        "  mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 over, [%1], %2;\n"
        "  selp.u32 %0, 1, 0, over; }"
        : "=r"(over)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!__all_sync(~0u, over));
#endif
}

// Stores where `mine` lies, in the shared memory of CTA `rank` of the cluster, and then counts the
// bytes at the mbarrier there. Orders nothing else that this thread has done.
template <class T>
KD_DEVICE void store_async(T* mine, const T& value, uint64_t* barrier, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  static_assert(sizeof(T) % 16 == 0);
  uint32_t to = shared_address(mine), counter = shared_address(barrier);
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(to), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(counter) : "r"(counter), "r"(rank));
#pragma unroll
  for (unsigned i = 0; i < sizeof(T); i += 16) {
    uint64_t bits[2];
    memcpy(bits, (const char*)&value + i, 16);
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b64 [%0], {%1, %2}, [%3];" ::
            "r"(to + i),
        "l"(bits[0]), "l"(bits[1]), "r"(counter)
        : "memory");
  }
#endif
}

}  // namespace kd::cuda

#endif
