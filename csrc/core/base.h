// Namespace and inlining macros shared by all headers.
#pragma once

#if defined(__CUDACC__)
#define KD_INLINE __host__ __device__ __forceinline__
#else
#define KD_INLINE inline __attribute__((always_inline))
#endif

// Each CPU instruction set compiles these headers into a namespace of its own, so that the linker
// can never hand code built for one instruction set to another.
#ifndef KD_NAMESPACE
#define KD_NAMESPACE generic
#endif

namespace kd::KD_NAMESPACE {

constexpr double kNatsPerBit = 0.69314718055994531;
constexpr double kBitsPerNat = 1.4426950408889634;
constexpr float kLog2E = (float)kBitsPerNat;

// x in every lane of F.
template <class F>
KD_INLINE F splat(float x) {
  return x + F{};
}

}  // namespace kd::KD_NAMESPACE
