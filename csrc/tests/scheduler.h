// The scheduler's own header: fibers, the state of a launch, and how a thread waits.
#pragma once

#include <vector>

#include "emulator.h"

// What the sanitizers bring, null without them.
extern "C" {
#define KD_WEAK __attribute__((weak))
KD_WEAK void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
KD_WEAK void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
KD_WEAK void __asan_poison_memory_region(const volatile void* address, size_t size);
KD_WEAK void __asan_unpoison_memory_region(const volatile void* address, size_t size);
KD_WEAK void* __asan_region_is_poisoned(void* begin, size_t size);
KD_WEAK void* __tsan_get_current_fiber();
KD_WEAK void* __tsan_create_fiber(unsigned flags);
KD_WEAK void __tsan_destroy_fiber(void* fiber);
KD_WEAK void __tsan_switch_to_fiber(void* fiber, unsigned flags);
KD_WEAK void __tsan_set_fiber_name(void* fiber, const char* name);
KD_WEAK void __tsan_acquire(void* address);
KD_WEAK void __tsan_release(void* address);
KD_WEAK void AnnotateIgnoreReadsBegin(const char* file, int line);
KD_WEAK void AnnotateIgnoreReadsEnd(const char* file, int line);
KD_WEAK void AnnotateIgnoreWritesBegin(const char* file, int line);
KD_WEAK void AnnotateIgnoreWritesEnd(const char* file, int line);
}

namespace kd::emulator {

constexpr int kMaxStores = 1024;
constexpr size_t kMaxStored = 128;  // bytes of one store_async

struct Cta;

struct OpenExchange {
  const char* what = nullptr;  // null: free
  Where where{};
  unsigned mask = 0, arrived = 0, left = 0, ballot = 0;
  uint64_t value[32] = {};
};

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  size_t stack_bytes = 0;
  void* asan_fake_stack = nullptr;
  void* tsan_fiber = nullptr;
};

// Of those that a thread starts, some are late, up to this many at a time.
constexpr unsigned kMaxLate = 32;

struct Thread {
  Fiber* fiber = nullptr;
  Cta* cta = nullptr;
  unsigned index = 0;
  bool exited = false;
  bool cluster_arrived = false;
  unsigned cluster_phase = 0;  // of the last arrival
  bool fence_due = false;      // for mbarriers it initialised
  OwnCopy late[kMaxLate];
  unsigned late_copies = 0;
  // What it waits for; null where it can run.
  const char* waits_in = nullptr;
  Where where{};
  const volatile void* waits_for = nullptr;
};

// A place whose parity gives ThreadSanitizer another address for every other phase, so that a
// thread that is late to leave does not see what others do after they left.
struct Barrier {
  unsigned arrived = 0, phase = 0;
  char address[2] = {};
};

// The lanes of a warp on their way through a barrier.
struct Together {
  unsigned lanes = 0;
  Where where{};
};

struct Warp {
  OpenExchange exchanges[32];                  // at most one a lane
  Together in_barrier, in_arrive, in_wait[2];  // the last by phase: no lane waits there for others
};

struct Cta {
  unsigned index = 0, rank = 0, exited = 0;
  bool started = false;
  char* shared = nullptr;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier barrier;
  char exits = 0;
};

// On its way to the shared memory of a CTA.
struct Store {
  const Cta* to = nullptr;
  char* shared = nullptr;
  size_t bytes = 0;  // 0: free
  uint64_t* barrier = nullptr;
  void* tsan_fiber = nullptr;  // a thread of its own, which begins where the store is issued
  Where where{};
  char value[kMaxStored] = {};
};

// Whatever can happen next: a thread goes on, or a store completes.
struct Event {
  uint64_t key;
  Thread* thread;
  Store* store;
  bool operator<(const Event& other) const { return key < other.key; }
};

struct State {
  Launch launch{};
  void (*thread)(const void*) = nullptr;
  const void* arguments = nullptr;
  uint64_t random = 0;
  Fiber main;
  std::vector<Fiber> fibers;  // lent to the threads of one cluster after the other
  Thread* current = nullptr;
  std::vector<Cta> ctas;  // of the running cluster
  unsigned exited = 0;
  Barrier cluster_barrier;
  std::vector<Event> events;  // a heap; never grows, so that no fiber allocates memory
  Store stores[kMaxStores];
  char begin = 0, ends = 0, fences = 0;
};
extern State state;

// What ThreadSanitizer is told: an acquire sees what came before the releases.
inline void release(const volatile void* address) {
  if (__tsan_release) __tsan_release(const_cast<void*>(address));
}
inline void acquire(const volatile void* address) {
  if (__tsan_acquire) __tsan_acquire(const_cast<void*>(address));
}

uint64_t random();
const char* base_name(const char* path);
inline bool same(Where x, Where y) { return x.line == y.line && !std::strcmp(x.file, y.file); }

// The running thread waits for an object until it is woken, or lets others run first.
void wait(const char* what, const volatile void* object, Where where);
void wake(const volatile void* object);
void yield();
void make_ready(Thread& thread);

// A store completes when its turn comes: at once for the largest key.
void push(Event event);
void complete(Store& store);

}  // namespace kd::emulator
