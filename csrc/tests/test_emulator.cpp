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
  kNoLastBarrier,
  kTooFar,
  kSharedTooFar,
  kLaneMissing,
  kMaskWithoutCaller,
  kMisaligned,
  kNoWait,
  kTooFewBytes,
  kNoEmptyWait,
  kBarrierInBranch,
  kNoFirstBarrier,
  kSameElement,
  kUninitialised,
  kRelaxed,
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
  if (fault == Fault::kBarrierInBranch && warp == 1)
    while (!__any_sync(~0u, 1)) continue;
  if (threadIdx.x % 32 == 0) partial[warp] = sum;
  if (fault == Fault::kSharedTooFar && threadIdx.x == 0) partial[warps] = sum;
  if (fault == Fault::kBarrierInBranch && warp == 1) return;
  if (fault == Fault::kTwoBarriers && threadIdx.x == 5)
    __syncthreads();
  else if (fault != Fault::kNoBarrier)
    __syncthreads();
  if (warp != 0) return;
  sum = warp_sum(threadIdx.x < warps ? partial[threadIdx.x] : 0.0f);
  if (threadIdx.x == 0) atomicAdd(params.total, sum);
}

// Every CTA adds a slice; all add up the slices' sums from distributed shared memory.
template <Fault fault>
__global__ void cluster_sum(const SumParams params) {
  float* mine = shared_memory<float>();
  if (threadIdx.x == 0) {
    float sum = 0;
    for (int i = cluster_rank(); i < params.count; i += cluster_size()) sum += params.x[i];
    *mine = sum;
  }
  if (fault == Fault::kNoFirstBarrier) store_remote(mine, 0.0f, cluster_rank() ^ 1);
  if (fault == Fault::kRelaxed) {
    cluster_arrive_relaxed();
    cluster_wait();
  } else if (fault != Fault::kNoBarrier) {
    cluster_arrive();
    cluster_wait();
  }
  float total = 0;
  if (threadIdx.x == 0)
    for (unsigned rank = 0; rank < cluster_size(); ++rank) total += load_remote(mine, rank);
  if (fault != Fault::kNoLastBarrier) {
    cluster_arrive();
    cluster_wait();
  }
  if (threadIdx.x == 0) params.total[fault == Fault::kSameElement ? 0 : blockIdx.x] = total;
}

// The same by asynchronous stores, a share of every slice a round. Two places for what arrives: a
// fast CTA is at most one round ahead of a slow one.
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
    for (uint64_t& barrier : shared.told) mbarrier_init(&barrier, 1);
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
    const unsigned bytes = size * sizeof share - (fault == Fault::kTooFewBytes ? 16 : 0);
    if (lane == 0) mbarrier_expect_bytes(&shared.told[place], bytes);
    if (lane < size) store_async(&shared.shares[place][rank], share, &shared.told[place], lane);
    if (fault != Fault::kNoWait)
      mbarrier_wait(&shared.told[place], fault == Fault::kWrongParity ? !parity : parity);
    for (unsigned i = 0; i < size; ++i) total += shared.shares[place][i].sum;
    __syncwarp();
  }
  if (lane == 0) params.total[blockIdx.x] = total;
}

// One thread feeds a ring of stages by bulk copies, all add up what arrives.
template <Fault fault>
__global__ void pipeline_sum(const SumParams params) {
  constexpr int kStages = 3, kFloats = 64;
  struct Shared {
    float x[kStages][kFloats];
    uint64_t full[kStages], empty[kStages];
    float partial[32];
  };
  Shared& shared = *shared_memory<Shared>();
  const int tiles = params.count / kFloats;
  const auto load = [&](int tile) {
    const int stage = tile % kStages;
    const unsigned bytes = sizeof shared.x[stage] - (fault == Fault::kTooFewBytes ? 16 : 0);
    mbarrier_expect_bytes(&shared.full[stage], sizeof shared.x[stage]);
    copy_bulk_async(shared.x[stage], params.x + tile * kFloats + (fault == Fault::kMisaligned),
                    bytes, &shared.full[stage]);
  };
  if (threadIdx.x == 0 && fault != Fault::kUninitialised) {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(&shared.full[i], 1);
      mbarrier_init(&shared.empty[i], blockDim.x);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0)
    for (int tile = 0; tile < kStages && tile < tiles; ++tile) load(tile);
  float sum = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    const int stage = tile % kStages, parity = tile / kStages % 2;
    if (fault != Fault::kNoWait) mbarrier_wait(&shared.full[stage], parity);
    for (int i = threadIdx.x; i < kFloats; i += blockDim.x) sum += shared.x[stage][i];
    mbarrier_arrive(&shared.empty[stage]);
    if (threadIdx.x == 0 && tile + kStages < tiles) {
      if (fault != Fault::kNoEmptyWait) mbarrier_wait(&shared.empty[stage], parity);
      load(tile + kStages);
    }
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) atomicAdd(params.total, sum);
}

// Each thread reads what it copies itself.
template <Fault fault>
__global__ void copied_sum(const SumParams params) {
  float4* mine = shared_memory<float4>() + threadIdx.x;
  float sum = 0;
  for (int i = threadIdx.x; i < params.count / 4; i += blockDim.x) {
    copy_16(mine, params.x + i * 4 + (fault == Fault::kMisaligned));
    if (fault != Fault::kNoWait) wait_for_copies();
    sum += mine->x + mine->y + mine->z + mine->w;
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) atomicAdd(params.total, sum);
}

__global__ void warps(const SumParams params) {
  const unsigned lane = threadIdx.x % 32;
  const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
  bool right = __ballot_sync(~0u, lane % 3 == 0) == 0x49249249u;
  right &=
      __all_sync(half, lane < 16) == (lane < 16) && __any_sync(half, lane == 20) == (lane > 15);
  right &= __shfl_sync(~0u, lane, 5, 8) == (lane & ~7u) + 5;
  right &= __shfl_up_sync(~0u, lane, 2, 16) == (lane % 16 < 2 ? lane : lane - 2);
  right &= __shfl_down_sync(half, (uint64_t)lane, 3, 16) == (lane % 16 > 12 ? lane : lane + 3);
  right &= __shfl_xor_sync(~0u, (double)lane, 9) == (lane ^ 9);
  // A warp's own exchange through shared memory.
  int* shared = shared_memory<int>();
  shared[threadIdx.x] = lane;
  __syncwarp();
  right &= shared[threadIdx.x ^ 1] == (int)(lane ^ 1);
  if (right) atomicAdd(params.total, 1.0f);
}

}  // namespace kd::cuda

namespace {

using namespace kd::cuda;
using kd::tests::expect;
using kd::tests::expect_caught;
using kd::tests::kThreadSanitizer;

constexpr int kCount = 64 * 7;  // heads, tails and stages of every kernel above

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
void run_cluster() {
  for (const unsigned size : {2, 4, 8, 16, 1})
    run(cluster_sum<fault>, {2 * size, 32, size, 4}, 2 * size);
}
template <Fault fault = Fault::kNone>
void run_told() {
  for (const unsigned size : {2, 4, 8, 16, 1})
    run(told_sum<fault>, {2 * size, 32, size, 2 * 16 * 16 + 2 * 8}, 2 * size);
}
template <Fault fault = Fault::kNone>
void run_pipeline() {
  run(pipeline_sum<fault>, {1, 64, 1, 3 * 64 * 4 + 6 * 8 + 32 * 4});
}

template <Fault fault = Fault::kNone>
void run_copied() {
  run(copied_sum<fault>, {1, 64, 1, 64 * sizeof(float4)});
}

void run_warps() {
  float right = 0;
  launch(warps, {3, 64, 1, 64 * sizeof(int)}, nullptr, SumParams{nullptr, 0, &right});
  expect(right == 3 * 64, "%g of %d threads", right, 3 * 64);
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
  expect_caught("no last cluster barrier", "which has exited", 20, 10,
                run_cluster<Fault::kNoLastBarrier>);
  expect_caught("remote memory without a first cluster barrier", "before it starts", 20, 10,
                run_cluster<Fault::kNoFirstBarrier>);
  expect_caught("an mbarrier that nobody initialised", "no mbarrier has been initialised", 4, 4,
                run_pipeline<Fault::kUninitialised>);
  expect_caught("a misaligned bulk copy", "4 bytes beyond a multiple of 16", 4, 4,
                run_pipeline<Fault::kMisaligned>);
  expect_caught("fewer bytes than expected", "wait in mbarrier_wait", 4, 4,
                run_pipeline<Fault::kTooFewBytes>);
  expect_caught("an mbarrier without a fence", "without a fence", 4, 4, run_told<Fault::kNoFence>);
  expect_caught("a remote mbarrier without a first cluster barrier", nullptr, 20, 18,
                run_told<Fault::kNoFirstBarrier>);
  expect_caught("a misaligned copy of its own", "4 bytes beyond a multiple of 16", 4, 4,
                run_copied<Fault::kMisaligned>);
  expect_caught("no wait for a copy of its own", "before a copy_16 of its own has arrived", 4, 4,
                run_copied<Fault::kNoWait>);
  if (kThreadSanitizer) return;
  expect_caught("no __syncthreads", nullptr, 20, 10, run_block<Fault::kNoBarrier>);
  expect_caught("no cluster barrier", nullptr, 20, 18, run_cluster<Fault::kNoBarrier>);
  expect_caught("no wait for a copy", "use-after-poison", 20, 10, run_pipeline<Fault::kNoWait>);
  expect_caught("no wait for an empty stage", nullptr, 20, 10, run_pipeline<Fault::kNoEmptyWait>);
  expect_caught("no wait for what is told", nullptr, 20, 18, run_told<Fault::kNoWait>);
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
  expect_caught("race: no cluster barrier", nullptr, 4, 4, run_cluster<Fault::kNoBarrier>);
  expect_caught("race: a relaxed arrival", kRace, 4, 4, run_cluster<Fault::kRelaxed>);
  expect_caught("race: no last cluster barrier", nullptr, 4, 4, run_cluster<Fault::kNoLastBarrier>);
  expect_caught("race: clusters write one element", kRace, 4, 4, run_cluster<Fault::kSameElement>);
  expect_caught("race: no wait for what is told", nullptr, 4, 4, run_told<Fault::kNoWait>);
  expect_caught("race: a wait for the other parity", nullptr, 4, 4, run_told<Fault::kWrongParity>);
  expect_caught("race: one place for all rounds", nullptr, 4, 4, run_told<Fault::kOnePlace>);
  expect_caught("race: no wait for a copy", kRace, 4, 4, run_pipeline<Fault::kNoWait>);
  expect_caught("race: no wait for an empty stage", kRace, 4, 4, run_pipeline<Fault::kNoEmptyWait>);
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
    run_cluster();
    run_told();
    run_pipeline();
    run_copied();
    run_warps();
  }
  return kd::tests::finish();
}
