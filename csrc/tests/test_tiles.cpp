// The chooser of csrc/cuda/tiles.h: what it returns for the vocabularies of today's models, and
// that whatever it returns can hold the row.
#include "../cuda/tiles.h"

#include <cstdio>
#include <cstdlib>
#include <initializer_list>

using namespace kd::cuda;

namespace {

constexpr Device kAmpere{8, 0, 163 * 1024, 108, 40 << 20}, kHopper{9, 0, 227 * 1024, 132, 50 << 20};

constexpr Problem forward_kl(int64_t vocab, int item_size) {
  return {vocab, item_size, true, false, 10, 2, 512};
}
constexpr Problem jsd(int64_t vocab, int item_size) {
  return {vocab, item_size, true, false, 0, item_size == 2 ? 3 : 2, 512};
}
constexpr Problem tvd(int64_t vocab, int item_size) {
  return {vocab, item_size, true, false, 8, 2, 512};
}
constexpr Problem alpha_beta(int64_t vocab, int item_size) {
  return {vocab, item_size, true, false, 0, item_size == 2 ? 3 : 2, 256};
}
constexpr Problem with_options(Problem problem) {
  problem.options = true;
  return problem;
}
constexpr Problem mixed(Problem problem) {
  problem.same_dtypes = false;
  return problem;
}

constexpr bool is(const Tile& tile, Kernel kernel, int cluster, int threads) {
  return tile.kernel == kernel && tile.cluster == cluster && tile.threads == threads;
}
constexpr Tile on_hopper(const Problem& problem) { return choose(problem, kHopper); }

static_assert(is(on_hopper(forward_kl(32000, 2)), Kernel::kRegisters, 2, 256));
static_assert(is(on_hopper(forward_kl(50257, 2)), Kernel::kRegisters, 4, 256));
static_assert(is(on_hopper(forward_kl(128256, 2)), Kernel::kRegisters, 8, 256));
static_assert(is(on_hopper(forward_kl(151936, 2)), Kernel::kRegisters, 8, 256));
static_assert(is(on_hopper(forward_kl(256000, 2)), Kernel::kRegisters, 16, 256));
static_assert(is(on_hopper(forward_kl(128256, 4)), Kernel::kRegisters, 16, 256));
static_assert(is(on_hopper(forward_kl(256000, 4)), Kernel::kRegisters, 16, 512));
static_assert(is(on_hopper(forward_kl(19, 2)), Kernel::kRegisters, 1, 32));
static_assert(is(on_hopper(forward_kl(1000, 2)), Kernel::kRegisters, 1, 64));
static_assert(on_hopper(forward_kl(1 << 20, 4)).kernel == Kernel::kStreaming);
// Shared memory where registers do not hold the row.
static_assert(is(on_hopper(tvd(262144, 4)), Kernel::kShared, 16, 256));

// A part of a device, or another one, may have no clusters of 16, or none but of one CTA.
template <int kMost>
struct AtMost {
  constexpr bool operator()(const Tile& tile) const { return tile.cluster <= kMost; }
};
template <int kMost>
constexpr Tile on_part(const Problem& problem) {
  return choose(problem, kHopper, AtMost<kMost>());
}
static_assert(is(on_part<8>(forward_kl(128256, 2)), Kernel::kRegisters, 8, 256));
static_assert(is(on_part<8>(forward_kl(256000, 2)), Kernel::kRegisters, 8, 512));
static_assert(is(on_part<8>(jsd(151936, 2)), Kernel::kShared, 8, 256));
static_assert(is(on_part<8>(jsd(256000, 2)), Kernel::kShared, 8, 256));
static_assert(on_part<1>(forward_kl(128256, 2)).kernel == Kernel::kStreaming);

// Two CTAs of an SM fit beside each other.
static_assert(2 * (one_of_two(kHopper) + 1024) <= 228 * 1024);
static_assert(is(on_hopper(jsd(128256, 2)), Kernel::kShared, 8, 256));
static_assert(is(on_hopper(jsd(256000, 2)), Kernel::kShared, 16, 256));
static_assert(shared_bytes(jsd(256000, 2), {Kernel::kShared, 16, 256}) <= one_of_two(kHopper));
static_assert(on_hopper(with_options(forward_kl(128256, 2))).kernel == Kernel::kShared);

static_assert(on_hopper(mixed(forward_kl(32000, 2))).kernel == Kernel::kStreaming);
// Two row pairs for each SM while the cache holds them; then one, of as many threads.
constexpr Tile on_ampere(const Problem& problem) { return choose(problem, kAmpere); }
static_assert(is(on_ampere(forward_kl(1000, 2)), Kernel::kStreaming, 1, 64));
static_assert(is(on_ampere(forward_kl(32000, 2)), Kernel::kStreaming, 1, 256));
static_assert(is(on_ampere(forward_kl(128256, 2)), Kernel::kStreaming, 1, 512));
static_assert(is(on_ampere(alpha_beta(128256, 2)), Kernel::kStreaming, 1, 256));
static_assert(!holds(alpha_beta(1000, 2), {Kernel::kStreaming, 1, 512}, kAmpere));
static_assert(!holds(forward_kl(1000, 2), {Kernel::kRegisters, 1, 256}, kAmpere));

void check(bool condition, const Problem& problem, const Tile& tile) {
  if (condition) return;
  std::printf("wrong: vocab %lld, item size %d -> kernel %d, %d x %d\n", (long long)problem.vocab,
              problem.item_size, (int)tile.kernel, tile.cluster, tile.threads);
  std::exit(1);
}

void check_any(const Problem& problem) {
  const Tile tile = on_hopper(problem);
  check(holds(problem, tile, kHopper), problem, tile);
  check(tile.threads % 32 == 0 && tile.threads >= 32, problem, tile);
  const int most = tile.kernel == Kernel::kRegisters ? kMaxRegisterThreads
                   : tile.kernel == Kernel::kShared  ? kMaxSharedThreads
                                                     : kMaxStreamingThreads;
  check(tile.threads <= most, problem, tile);
  if (tile.kernel == Kernel::kStreaming) return;
  // Every column has its place, also where columns are dealt out one by one.
  const int64_t team = (int64_t)tile.cluster * tile.threads, lanes = 16 / problem.item_size;
  check(vectors_per_thread(problem, team) * team * lanes >= problem.vocab, problem, tile);
  // No smaller cluster would do.
  const Tile smaller{tile.kernel, tile.cluster / 2, tile.threads};
  if (tile.cluster > 1 && tile.threads == 256)
    check(!holds(problem, smaller, one_of_two(kHopper)), problem, tile);
}

}  // namespace

int main() {
  for (const int item_size : {2, 4}) {
    for (int64_t vocab = 1; vocab < 2000000; vocab += 1 + vocab / 97) {
      check_any(forward_kl(vocab, item_size));
      check_any(jsd(vocab, item_size));
      check_any(tvd(vocab, item_size));
      check_any(alpha_beta(vocab, item_size));
      check_any(with_options(forward_kl(vocab, item_size)));
      check_any(mixed(jsd(vocab, item_size)));
    }
  }
  std::printf("tiles: every row has a kernel that holds it\n");
}
