// Which kernel serves a call, and with how many threads: a pure function of shape, dtypes,
// divergence and device, so that tuning is data.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

namespace kd::cuda {

struct Device {
  int major = 0, minor = 0;  // compute capability
  int64_t shared_bytes = 0;  // that a CTA may have
  int sms = 0;
  int64_t cache_bytes = 0;  // of the last level
};

enum class Kernel { kRegisters, kShared, kStreaming };

struct Tile {
  Kernel kernel = Kernel::kStreaming;
  int cluster = 1;     // CTAs that share a row pair
  int threads = 0;     // of a CTA
  bool ahead = false;  // fetches a later row pair into the last-level cache; not for kStreaming
};

struct Problem {
  int64_t vocab;
  int item_size;          // of a logit
  bool same_dtypes;       // student and teacher
  bool options;           // see uses_options
  int register_vectors;   // 16-byte vectors of each tensor that a thread can hold in registers
  int shared_vectors;     // that it needs in shared memory for one of each tensor
  int streaming_threads;  // the most of its streaming kernel
};

// Threads of a CTA, by the kernel's launch bounds.
constexpr int kMaxRegisterThreads = 512, kMaxSharedThreads = 256, kMaxStreamingThreads = 512;
constexpr int kMaxShardThreads = 256;  // as streaming_threads() has them

// Columns are counted in 32 bits, with room for a team's stride.
constexpr int64_t kMaxVocab = 1 << 30;

// Rows are found by numbers of 32 bits.
constexpr int64_t kMaxRows = ((int64_t)1 << 32) - 1;

// Rows of a launch: the grid's first dimension holds 2^31 - 1 CTAs, a row needs up to 16.
constexpr int64_t kRowsPerLaunch = 1 << 26;

constexpr int kClusters[] = {1, 2, 4, 8, 16};

constexpr int64_t divide_up(int64_t x, int64_t by) { return (x + by - 1) / by; }

// 16-byte vectors of each tensor for one thread of `threads`. One more than a row has in all,
// since its columns may be dealt out one by one.
constexpr int64_t vectors_per_thread(const Problem& problem, int64_t threads) {
  return divide_up(problem.vocab * problem.item_size / 16 + 1, threads);
}

// Shared memory of a CTA for its part of a row pair.
constexpr int64_t row_bytes(const Problem& problem, const Tile& tile) {
  if (tile.kernel != Kernel::kShared) return 0;
  return vectors_per_thread(problem, tile.cluster * tile.threads) * tile.threads *
         problem.shared_vectors * 16;
}

// What warps tell each other lies before it: a slot for each of the team's, and a whole one for
// all. A call without options has no use for the end of a slot.
constexpr int kSlotBytes = 176, kPlainSlotBytes = 128;  // see WarpSlot
constexpr int64_t slots_bytes(int64_t warps, bool options) {
  return warps * (options ? kSlotBytes : kPlainSlotBytes) + kSlotBytes;
}

constexpr int64_t shared_bytes(const Problem& problem, const Tile& tile) {
  return slots_bytes(tile.cluster * (tile.threads / 32), problem.options) +
         row_bytes(problem, tile);
}

constexpr bool holds(const Problem& problem, const Tile& tile, int64_t shared) {
  if (tile.kernel == Kernel::kStreaming) return tile.threads <= problem.streaming_threads;
  if (!problem.same_dtypes) return false;
  if (tile.kernel == Kernel::kShared) return shared_bytes(problem, tile) <= shared;
  return !problem.options &&
         vectors_per_thread(problem, tile.cluster * tile.threads) <= problem.register_vectors;
}

// The fewest threads of a CTA, then the fewest CTAs, that hold the row and leave room on an SM for
// a second CTA, whose loads overlap the first one's arithmetic: 256 threads of 128 registers, or
// half of the shared memory. One CTA alone only where nothing else holds the row. One warp takes
// the shortest rows, whose fixed cost is each warp's.
constexpr Tile resident_tile(const Problem& problem, Kernel kernel, int most_ctas, int64_t half) {
  for (int threads = 32; threads < 256; threads *= 2) {
    const Tile tile{kernel, 1, threads};
    const int64_t most = threads == 32 ? 2 : 8;
    if (vectors_per_thread(problem, threads) <= most && holds(problem, tile, half)) return tile;
  }
  for (const int cluster : kClusters) {
    const Tile tile{kernel, cluster, 256, true};
    if (cluster <= most_ctas && holds(problem, tile, half)) return tile;
  }
  return {kernel, most_ctas, kernel == Kernel::kRegisters ? 512 : 256, true};
}

constexpr int streaming_threads(int64_t vocab) {
  int threads = 32;
  while (threads < 256 && threads * 16 < vocab) threads *= 2;
  return threads;
}

// Two CTAs on an SM, or one of twice the threads where the cache cannot keep two row pairs for
// each SM from one sweep to the next.
constexpr Tile streaming_tile(const Problem& problem, const Device& device) {
  const int threads = streaming_threads(problem.vocab);
  const int64_t pair_bytes = 2 * problem.vocab * problem.item_size;
  const bool alone = threads == 256 && 2 * device.sms * pair_bytes > device.cache_bytes;
  return {Kernel::kStreaming, 1, alone ? problem.streaming_threads : threads};
}

// Shared memory of one of two CTAs on an SM.
constexpr int64_t one_of_two(const Device& device) {
  constexpr int64_t kReserved = 1024;  // by the system, of each CTA
  return (device.shared_bytes - kReserved) / 2;
}

// Whether a tile can serve a problem at all.
constexpr bool holds(const Problem& problem, const Tile& tile, const Device& device) {
  return (tile.kernel == Kernel::kStreaming ? !tile.ahead : device.major >= 9) &&
         holds(problem, tile, device.shared_bytes);
}

struct AlwaysFits {
  constexpr bool operator()(const Tile&) const { return true; }
};

// fits(tile) says whether the device has room for such a cluster: those of 16 exist on some only.
template <class Fits = AlwaysFits>
constexpr Tile choose(const Problem& problem, const Device& device, Fits fits = {}) {
  if (device.major >= 9) {
    for (const Kernel kernel : {Kernel::kRegisters, Kernel::kShared}) {
      for (const int most_ctas : {16, 8}) {
        const Tile tile = resident_tile(problem, kernel, most_ctas, one_of_two(device));
        if (holds(problem, tile, device) && fits(tile)) return tile;
      }
    }
  }
  return streaming_tile(problem, device);
}

}  // namespace kd::cuda
