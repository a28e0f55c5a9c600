// The emulator's own tests: small kernels in the style of csrc/cuda, right ones and ones with a
// fault that the emulator has to name.
#include <cstdarg>
#include <memory>
#include <vector>

#include "harness.h"

namespace kd::cuda {

enum class Fault {
  kNone,
  kNoBarrier,
  kTooFar,
  kSharedTooFar,
  kLaneMissing,
  kMaskWithoutCaller,
  kMisaligned,
  kNoWait,
  kNoLastWait,
  kTooFewBytes,
  kTooManyBytes,
  kBarrierInBranch,
  kNoFirstBarrier,
  kSameElement,
  kUninitialised,
  kTwoBarriers,
  kWrongParity,
  kOnePlace,
  kNoFence,
};

struct SumParams {
  const float* x;  // (count,)
  int count;
  float* total;  // (1,)
};

__device__ inline float warp_sum(float x) {
  for (int bits = 16; bits > 0; bits /= 2) x += __shfl_xor_sync(~0u, x, bits);
  return x;
}

template <Fault fault>
__global__ void block_sum(const SumParams params) {
  float* partial = shared_memory<float>();
  float sum = 0;
  for (int i = threadIdx.x; i < params.count; i += blockDim.x) sum += params.x[i];
  if (fault == Fault::kTooFar && threadIdx.x == 0) sum += params.x[params.count];
  if (fault == Fault::kLaneMissing && threadIdx.x == 7) return;
  if (fault == Fault::kMaskWithoutCaller) __syncwarp(0xffff);
  sum = warp_sum(sum);
  const unsigned warps = blockDim.x / 32, warp = threadIdx.x / 32;
  if (threadIdx.x % 32 == 0) partial[warp] = sum;
  if (fault == Fault::kSharedTooFar && threadIdx.x == 0) partial[warps] = sum;
  if (fault == Fault::kBarrierInBranch && warp == 1) return;
  if (fault == Fault::kTwoBarriers && threadIdx.x == 5)
    __syncthreads();
  else if (fault != Fault::kNoBarrier)
    __syncthreads();
  if (warp != 0) return;
  sum = warp_sum(threadIdx.x < warps ? partial[threadIdx.x] : 0.0f);
  if (threadIdx.x == 0) *params.total = sum;
}

// The CTAs of a cluster tell each other their sums by asynchronous stores, over several rounds. Two
// places for what arrives: a fast CTA is at most one round ahead of a slow one.
template <Fault fault>
__global__ void told_sum(const SumParams params) {
  struct alignas(16) Share {
    float sum, unused[3];
  };
  struct Shared {
    Share shares[2][16];
    uint64_t told[2];
  };
  Shared& shared = *shared_memory<Shared>();
  constexpr int kRounds = 5;
  const unsigned lane = threadIdx.x, rank = cluster_rank(), size = cluster_size();
  if (lane == 0) {
    for (uint64_t& barrier : shared.told)
      if (fault != Fault::kUninitialised) mbarrier_init(&barrier, 1);
    if (fault != Fault::kNoFence) fence_mbarrier_init();
  }
  if (fault != Fault::kNoFirstBarrier) {
    cluster_arrive_relaxed();
    cluster_wait();
  }
  float total = 0;
  for (int round = 0; round < kRounds; ++round) {
    const int place = fault == Fault::kOnePlace ? 0 : round % 2;
    const int parity = (fault == Fault::kOnePlace ? round : round / 2) % 2;
    Share share{};
    for (int i = rank + round * size; i < params.count; i += size * kRounds)
      share.sum += params.x[i];
    const unsigned bytes =
        (size + (fault == Fault::kTooManyBytes) - (fault == Fault::kTooFewBytes)) * sizeof share;
    if (lane == 0) mbarrier_expect_bytes(&shared.told[place], bytes);
    if (lane < size) store_async(&shared.shares[place][rank], share, &shared.told[place], lane);
    if (fault == Fault::kNoLastWait && round == kRounds - 1) return;
    if (fault != Fault::kNoWait)
      mbarrier_wait(&shared.told[place], fault == Fault::kWrongParity ? !parity : parity);
    for (unsigned i = 0; i < size; ++i) total += shared.shares[place][i].sum;
    __syncwarp();
  }
  if (lane == 0) params.total[fault == Fault::kSameElement ? 0 : blockIdx.x] = total;
}

// One warp, each thread of which reads what it copies itself.
template <Fault fault>
__global__ void copied_sum(const SumParams params) {
  float* mine = shared_memory<float>() + 4 * threadIdx.x;
  float sum = 0;
  for (int i = threadIdx.x; i < params.count / 4; i += blockDim.x) {
    copy_16(mine, params.x + i * 4 + (fault == Fault::kMisaligned));
    if (fault != Fault::kNoWait) wait_for_copies();
    sum += mine[0] + mine[1] + mine[2] + mine[3];
  }
  sum = warp_sum(sum);
  if (threadIdx.x == 0) *params.total = sum;
}

// A total of 1 for each thread.
__global__ void warps(const SumParams params) {
  const unsigned lane = threadIdx.x % 32;
  const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
  bool right = __shfl_sync(~0u, lane, 5) == 5;
  right &= __shfl_xor_sync(half, (uint64_t)lane, 3) == (lane ^ 3);
  right &= __shfl_xor_sync(~0u, (double)lane, 25) == (lane ^ 25);
  // A warp's own exchange through shared memory.
  int* shared = shared_memory<int>();
  shared[threadIdx.x] = lane;
  __syncwarp();
  right &= shared[threadIdx.x ^ 1] == (int)(lane ^ 1);
  params.total[blockIdx.x * blockDim.x + threadIdx.x] = right;
}

}  // namespace kd::cuda

namespace {

using namespace kd::cuda;
using kd::tests::expect;
using kd::tests::expect_caught;
using kd::tests::kThreadSanitizer;

constexpr int kCount = 64 * 7;  // no multiple of what a round of a kernel above reads

// Adds 0 to count - 1, and compares each total.
void run(void (*kernel)(SumParams), const Grid& grid, int totals = 1) {
  void* memory;
  if (posix_memalign(&memory, 16, kCount * sizeof(float))) std::abort();
  float* x = (float*)memory;
  std::vector<float> total(totals);
  for (int i = 0; i < kCount; ++i) x[i] = i;
  launch(kernel, grid, nullptr, SumParams{x, kCount, total.data()});
  for (const float sum : total) expect(sum == kCount * (kCount - 1) / 2, "a sum of %g", sum);
  std::free(memory);
}

template <Fault fault = Fault::kNone>
void run_block() {
  run(block_sum<fault>, {1, 96, 1, 3 * sizeof(float)});
}
template <Fault fault = Fault::kNone>
void run_told() {
  for (const unsigned size : {2, 4, 8, 16, 1})
    run(told_sum<fault>, {2 * size, 32, size, 2 * 16 * 16 + 2 * 8}, 2 * size);
}
template <Fault fault = Fault::kNone>
void run_copied() {
  run(copied_sum<fault>, {1, 32, 1, 32 * 4 * sizeof(float)});
}

void run_warps() {
  std::vector<float> right(3 * 64);
  launch(warps, {3, 64, 1, 64 * sizeof(int)}, nullptr, SumParams{nullptr, 0, right.data()});
  for (const float one : right) expect(one == 1, "%g of a thread", one);
}

void check_conversions() {
  for (uint32_t bits = 0; bits < 1 << 16; ++bits) {
    const float half = from_float16(bits), brain = from_bfloat16(bits);
    if (!std::isnan(half)) expect(to_float16(half) == bits, "float16 %04x", bits);
    if (!std::isnan(brain)) expect(to_bfloat16(brain) == bits, "bfloat16 %04x", bits);
    // The midpoint to the next number goes to the even one.
    if ((bits & 0x7fff) >= 0x7bff) continue;
    const float middle = (half + from_float16(bits + 1)) / 2;
    expect(to_float16(middle) == bits + (bits & 1), "float16 midpoint %g", middle);
    const double next = from_bfloat16(bits + 1);
    const float between = (float)((brain + next) / 2);
    expect(to_bfloat16(between) == bits + (bits & 1), "bfloat16 midpoint %g", between);
  }
  expect(to_float16(65519) == 0x7bff && to_float16(65520) == 0x7c00, "float16 overflow");
  for (float x = -30; x < 30; x += 0.37f) {
    expect(std::fabs(exp2_approx(x) / std::exp2((double)x) - 1) < 0x1.1p-22, "exp2_approx(%g)", x);
  }
  expect(exp2_approx(-INFINITY) == 0 && exp2_approx(-127) == 0 && exp2_approx(0) == 1, "limits");
}

// By AddressSanitizer, or by the emulator itself with either sanitizer.
void check_faults() {
  expect_caught("a lane has returned", "has exited", 4, 4, run_block<Fault::kLaneMissing>);
  expect_caught("a mask without the caller", "without the caller", 4, 4,
                run_block<Fault::kMaskWithoutCaller>);
  expect_caught("a barrier that some threads skip", "wait in __syncthreads at test_emulator.cpp", 4,
                4, run_block<Fault::kBarrierInBranch>);
  expect_caught("two barriers in one warp", "of this warp are at", 4, 4,
                run_block<Fault::kTwoBarriers>);
  expect_caught("an mbarrier that nobody initialised", "no mbarrier has been initialised", 4, 4,
                run_told<Fault::kUninitialised>);
  expect_caught("fewer bytes than expected", "wait in mbarrier_wait", 4, 4,
                run_told<Fault::kTooManyBytes>);
  expect_caught("an mbarrier without a fence", "without a fence", 4, 4, run_told<Fault::kNoFence>);
  expect_caught("no first cluster barrier", nullptr, 20, 18, run_told<Fault::kNoFirstBarrier>);
  expect_caught("a misaligned copy of its own", "4 bytes beyond a multiple of 16", 4, 4,
                run_copied<Fault::kMisaligned>);
  expect_caught("no wait for a copy of its own", "before a copy_16 of its own has arrived", 4, 4,
                run_copied<Fault::kNoWait>);
  if (kThreadSanitizer) return;
  expect_caught("no __syncthreads", nullptr, 20, 10, run_block<Fault::kNoBarrier>);
  expect_caught("no wait for the last that is told", "exit", 20, 18, run_told<Fault::kNoLastWait>);
  expect_caught("no wait for what is told", "use-after-poison", 20, 10, run_told<Fault::kNoWait>);
  expect_caught("a wait for the other parity", nullptr, 20, 18, run_told<Fault::kWrongParity>);
  expect_caught("one place for all rounds", nullptr, 20, 18, run_told<Fault::kOnePlace>);
  expect_caught("fewer bytes than are told", nullptr, 20, 18, run_told<Fault::kTooFewBytes>);
  expect_caught("one element read too far", "heap-buffer-overflow", 4, 4,
                run_block<Fault::kTooFar>);
  expect_caught("one element of shared memory too far", "heap-buffer-overflow", 4, 4,
                run_block<Fault::kSharedTooFar>);
}

void check_races() {
  constexpr const char* kRace = "SUMMARY: ThreadSanitizer: data race";
  expect_caught("race: no __syncthreads", kRace, 4, 4, run_block<Fault::kNoBarrier>);
  expect_caught("race: clusters write one element", kRace, 4, 4, run_told<Fault::kSameElement>);
  expect_caught("race: no wait for what is told", kRace, 4, 4, run_told<Fault::kNoWait>);
  expect_caught("race: a wait for the other parity", nullptr, 4, 4, run_told<Fault::kWrongParity>);
  expect_caught("race: one place for all rounds", nullptr, 4, 4, run_told<Fault::kOnePlace>);
}

}  // namespace

int main() {
  check_conversions();
  // Before this process has fibers: ThreadSanitizer is blind in forks of a process with threads.
  check_faults();
  if (kThreadSanitizer) check_races();
  for (int seed = 0; seed < (kThreadSanitizer ? 8 : 40); ++seed) {
    kd::emulator::options = {(uint64_t)seed, "sums"};
    run_block();
    run_told();
    run_copied();
    run_warps();
  }
  return kd::tests::finish();
}
