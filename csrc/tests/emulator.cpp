// What the threads of a kernel do: barriers, exchanges in a warp, mbarriers and asynchronous stores
// to other CTAs. To be compiled like scheduler.cpp.
#include <cstdio>

#include "scheduler.h"

namespace kd::emulator {

char* shared_memory() { return state.current->cta->shared; }
unsigned cluster_rank() { return state.current->cta->rank; }
unsigned cluster_size() { return state.launch.cluster; }

namespace {

void pause() {
  if (random() % 4 == 0) yield();
}

Warp& current_warp() { return state.current->cta->warps[state.current->index / 32]; }

// Barriers are instructions of a warp, not of a lane: all its lanes must come from the same line.
void check_warp(Together& together, const char* what, Where where) {
  const unsigned lane = state.current->index % 32, first = state.current->index - lane;
  if (!together.lanes) together.where = where;
  if (!same(together.where, where))
    fail(where, "%s, but lanes %08x of this warp are at %s:%d", what, together.lanes,
         base_name(together.where.file), together.where.line);
  together.lanes |= 1u << lane;
  const size_t lanes = state.launch.block - first;
  if (together.lanes == (lanes < 32 ? (1u << lanes) - 1 : ~0u)) together.lanes = 0;
}

}  // namespace

void sync_threads(Where where) {
  check_warp(current_warp().in_barrier, "__syncthreads", where);
  Cta& cta = *state.current->cta;
  Barrier& barrier = cta.barrier;
  char* const address = &barrier.address[barrier.phase & 1];
  release(address);
  if (++barrier.arrived < cta.threads.size()) {
    wait("__syncthreads", &barrier, where);
  } else {
    barrier.arrived = 0;
    ++barrier.phase;
    wake(&barrier);
    yield();
  }
  acquire(address);
}

namespace {

// The exchange that this lane takes part in, once all lanes of the mask have come; the caller
// leaves it by counting down `left`.
OpenExchange& meet(const char* what, unsigned mask, uint64_t value, Where where, bool ordered) {
  Thread& self = *state.current;
  const unsigned lane = self.index % 32, first = self.index - lane;
  Warp& warp = current_warp();
  if (!(mask >> lane & 1)) fail(where, "%s with mask %08x, without the caller", what, mask);
  OpenExchange* joined = nullptr;
  OpenExchange* unused = nullptr;
  for (OpenExchange& open : warp.exchanges) {
    if (!open.what) unused = &open;
    if (!open.what || open.arrived == open.mask || open.mask != mask) continue;
    if (std::strcmp(open.what, what) || !same(open.where, where))
      fail(where, "%s with mask %08x meets lanes %08x in %s at %s:%d", what, mask, open.arrived,
           open.what, base_name(open.where.file), open.where.line);
    joined = &open;
  }
  if (!joined) {
    for (unsigned i = 0; i < 32; ++i)
      if ((mask >> i & 1) &&
          (first + i >= state.launch.block || self.cta->threads[first + i].exited))
        fail(where, "%s with mask %08x: lane %u has exited or never was", what, mask, i);
    joined = unused;
    joined->what = what;
    joined->where = where;
    joined->mask = mask;
    joined->arrived = joined->ballot = 0;
  }
  joined->value[lane] = value;
  joined->arrived |= 1u << lane;
  if (value) joined->ballot |= 1u << lane;
  if (ordered) release(joined);
  if (joined->arrived != mask) {
    wait(what, joined, where);
  } else {
    joined->left = mask;
    for (unsigned i = 0; i < 32; ++i)
      if ((mask >> i & 1) && i != lane) make_ready(self.cta->threads[first + i]);
    yield();
  }
  if (ordered) acquire(joined);
  return *joined;
}

void leave(OpenExchange& open) {
  open.left &= ~(1u << (state.current->index % 32));
  if (!open.left) open.what = nullptr;
}

}  // namespace

Exchange exchange(const char* what, unsigned mask, uint64_t value, int source, Where where) {
  if (source >= 0 && !(mask >> source & 1))
    fail(where, "%s from lane %d, which is not in the mask %08x", what, source, mask);
  OpenExchange& open = meet(what, mask, value, where, false);
  const Exchange result{source < 0 ? 0 : open.value[source], open.ballot};
  leave(open);
  return result;
}

void sync_warp(unsigned mask, Where where) { leave(meet("__syncwarp", mask, 0, where, true)); }

// ---- Clusters ----

void cluster_arrive(Where where) {
  check_warp(current_warp().in_arrive, "cluster_arrive", where);
  Thread& self = *state.current;
  Barrier& barrier = state.cluster_barrier;
  if (self.cluster_arrived) fail(where, "cluster_arrive twice without cluster_wait");
  if (self.fence_due) fail(where, "cluster_arrive after mbarrier_init without a fence");
  self.cluster_arrived = true;
  self.cluster_phase = barrier.phase;
  if (++barrier.arrived == state.launch.cluster * state.launch.block) {
    barrier.arrived = 0;
    ++barrier.phase;
    wake(&barrier);
  }
  pause();
}

void cluster_wait(Where where) {
  Thread& self = *state.current;
  Barrier& barrier = state.cluster_barrier;
  if (!self.cluster_arrived) fail(where, "cluster_wait without cluster_arrive");
  check_warp(current_warp().in_wait[self.cluster_phase & 1], "cluster_wait", where);
  if (barrier.phase == self.cluster_phase)
    wait("cluster_wait", &barrier, where);
  else
    yield();
  self.cluster_arrived = false;
}

namespace {

// The address in another CTA's shared memory that corresponds to one in our own.
void* remote(const volatile void* mine, size_t bytes, unsigned rank, Where where) {
  pause();
  const Cta& own = *state.current->cta;
  const ptrdiff_t offset = (const volatile char*)mine - own.shared;
  if (offset < 0 || offset + bytes > state.launch.shared_bytes)
    fail(where, "a remote access of %zu bytes at offset %td of %zu bytes of shared memory", bytes,
         offset, state.launch.shared_bytes);
  if (rank >= state.launch.cluster)
    fail(where, "a remote access to rank %u of a cluster of %u", rank, state.launch.cluster);
  const Cta& other = state.ctas[rank];
  if (!other.started) fail(where, "a remote access to CTA %u before it starts", other.index);
  if (other.exited == other.threads.size())
    fail(where, "a remote access to CTA %u, which has exited", other.index);
  check_aligned(other.shared + offset, bytes < 16 ? bytes : 16, "a remote access", where);
  return other.shared + offset;
}

}  // namespace

// ---- A thread's own copies ----

bool put_off(OwnCopy copy, Where where) {
  check_aligned(copy.shared, 16, "copy_16 to shared memory", where);
  check_aligned(copy.global, 16, "copy_16 from global memory", where);
  Thread& self = *state.current;
  const ptrdiff_t offset = (char*)copy.shared - self.cta->shared;
  if (offset < 0 || offset + sizeof(uint4) > state.launch.shared_bytes)
    fail(where, "copy_16 to offset %td of %zu bytes of shared memory", offset,
         state.launch.shared_bytes);
  if (self.late_copies == kMaxLate || random() % 2) return false;
  self.late[self.late_copies++] = copy;
  return true;
}

OwnCopy next_put_off() {
  Thread& self = *state.current;
  return self.late_copies ? self.late[--self.late_copies] : OwnCopy{};
}

// ---- What the cache is asked for ----

std::vector<Fetched>* fetched = nullptr;

void fetch_into_cache(const void* from, uint32_t bytes, Where where) {
  check_aligned(from, 16, "fetch_into_cache", where);
  if (bytes == 0 || bytes % 16) fail(where, "fetch_into_cache of %u bytes", bytes);
  if (__asan_region_is_poisoned && __asan_region_is_poisoned(const_cast<void*>(from), bytes))
    fail(where, "fetch_into_cache of %u bytes, not all of which may be read", bytes);
  if (!fetched) return;
  // One list for all threads, which no barrier orders.
  if (AnnotateIgnoreReadsBegin) AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  if (AnnotateIgnoreWritesBegin) AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  fetched->push_back({(const char*)from, bytes});
  if (AnnotateIgnoreWritesEnd) AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  if (AnnotateIgnoreReadsEnd) AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
}

// ---- mbarriers and asynchronous stores ----

namespace {

// The 64 bits of an mbarrier are opaque to kernels; this is what ours hold.
struct Mbarrier {
  uint64_t magic : 12, expected : 12, pending : 12, phase : 1;
  int64_t bytes : 27;  // that are still to come
};
constexpr uint64_t kMagic = 0x5bd;
static_assert(sizeof(Mbarrier) == 8);

Mbarrier load(const uint64_t* barrier, Where where) {
  check_aligned(barrier, 8, "an mbarrier", where);
  Mbarrier result;
  std::memcpy(&result, barrier, sizeof result);
  if (result.magic != kMagic) fail(where, "no mbarrier has been initialised here");
  return result;
}

const char* phase_address(const uint64_t* barrier, unsigned phase) {
  return (const char*)barrier + (phase & 1);
}

// Stores the barrier, and ends its phase where nothing is pending.
void store(uint64_t* barrier, Mbarrier value) {
  const bool over = value.pending == 0 && value.bytes == 0;
  if (over) {
    value.pending = value.expected;
    value.phase ^= 1;
  }
  std::memcpy(barrier, &value, sizeof value);
  if (over) wake(barrier);
}

}  // namespace

void complete(Store& store) {
  void* const running = __tsan_get_current_fiber ? __tsan_get_current_fiber() : nullptr;
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(store.shared, store.bytes);
  if (running) __tsan_switch_to_fiber(store.tsan_fiber, 1);
  std::memcpy(store.shared, store.value, store.bytes);
  Mbarrier value = load(store.barrier, Where::here());
  release(phase_address(store.barrier, value.phase));
  if (running) {
    __tsan_switch_to_fiber(running, 1);
    __tsan_destroy_fiber(store.tsan_fiber);
  }
  value.bytes -= (int64_t)store.bytes;
  store.bytes = 0;
  kd::emulator::store(store.barrier, value);
}

namespace {

// Puts a store on its way, in a free place: it is there at once, at any time, or only when all else
// waits. Until then nobody may read what it writes to.
void start(const Store& issued) {
  load(issued.barrier, issued.where);
  Store* store = state.stores;
  while (store < state.stores + kMaxStores && store->bytes) ++store;
  const bool full = store == state.stores + kMaxStores;
  Store at_once;
  if (full) store = &at_once;
  *store = issued;
  if (__tsan_create_fiber) {
    store->tsan_fiber = __tsan_create_fiber(0);
    __tsan_set_fiber_name(store->tsan_fiber, "store");
  }
  if (__asan_poison_memory_region) __asan_poison_memory_region(store->shared, store->bytes);
  switch (full ? 0 : random() % 3) {
    case 0:
      complete(*store);
      break;
    case 1:
      push({random(), nullptr, store});
      break;
    default:
      push({0, nullptr, store});
  }
}

}  // namespace

void mbarrier_init(uint64_t* barrier, unsigned arrivals, Where where) {
  check_aligned(barrier, 8, "an mbarrier", where);
  if (arrivals < 1 || arrivals > 1024) fail(where, "an mbarrier for %u arrivals", arrivals);
  Mbarrier value{};
  value.magic = kMagic;
  value.expected = value.pending = arrivals;
  std::memcpy(barrier, &value, sizeof value);
  state.current->fence_due = true;
}

// Orders more than a device would: every fence with every other.
void fence_mbarrier_init() {
  acquire(&state.fences);
  release(&state.fences);
  state.current->fence_due = false;
}

void mbarrier_arrive(uint64_t* barrier, int64_t expected_bytes, Where where) {
  Mbarrier value = load(barrier, where);
  if (value.pending == 0) fail(where, "more arrivals at an mbarrier than it was initialised for");
  release(phase_address(barrier, value.phase));
  value.bytes += expected_bytes;
  --value.pending;
  store(barrier, value);
  pause();
}

void mbarrier_wait(uint64_t* barrier, unsigned parity, Where where) {
  pause();
  while (load(barrier, where).phase == (parity & 1)) wait("mbarrier_wait", barrier, where);
  acquire(phase_address(barrier, parity));
}

void store_async(const void* mine, const void* value, size_t bytes, uint64_t* barrier,
                 unsigned rank, Where where) {
  if (bytes % 16 || bytes > kMaxStored) fail(where, "store_async of %zu bytes", bytes);
  Store store;
  store.to = &state.ctas[rank];
  store.shared = (char*)remote(mine, bytes, rank, where);
  store.bytes = bytes;
  store.barrier = (uint64_t*)remote(barrier, sizeof *barrier, rank, where);
  store.where = where;
  std::memcpy(store.value, value, bytes);
  start(store);
}

}  // namespace kd::emulator
