// Runs the threads of a cluster as fibers. This file and emulator.cpp must be compiled without
// -fsanitize: they are told of AddressSanitizer and ThreadSanitizer by the symbols that these
// bring, serve either or neither, and their own data, which every fiber touches, stays out of
// sight.
#include "scheduler.h"

#include <sys/mman.h>
#include <xmmintrin.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>

#if !defined(__x86_64__)
#error "the emulator switches stacks on x86-64 only"
#endif
// Saves what a call preserves on the running stack, and goes on where `next` left off.
extern "C" void kd_switch_stack(void** save, void* next);
asm(R"(
.text
.globl kd_switch_stack
.type kd_switch_stack, @function
kd_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

Index threadIdx, blockIdx, blockDim, gridDim;

namespace kd::emulator {

Options options;
State state;

const char* base_name(const char* path) {
  const char* slash = std::strrchr(path, '/');
  return slash ? slash + 1 : path;
}

namespace {

constexpr size_t kStackBytes = 256 << 10, kGuardBytes = 4 << 10;

uint64_t mix(uint64_t x) {  // splitmix64's finalizer
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}
}  // namespace

uint64_t random() { return mix(state.random += 0x9e3779b97f4a7c15u); }

// ---- Order ----

namespace {

// The largest key goes first. By the seed: threads in any order, or whole warps, CTAs or single
// threads that are late throughout, which shows what relies on their being early.
uint64_t key_of(const Thread& thread) {
  const uint64_t policy = options.seed % 4, cta = thread.cta->index + 1;
  if (policy == 0) return random() | 1;
  const uint64_t late = policy == 1   ? cta
                        : policy == 2 ? cta << 32 | (thread.index / 32 + 1) << 16
                                      : cta << 32 | (thread.index + 1);
  return mix(options.seed << 48 ^ late) >> 32 << 32 | random() >> 32 | 1;
}

}  // namespace

void push(Event event) {
  state.events.push_back(event);
  std::push_heap(state.events.begin(), state.events.end());
}

void make_ready(Thread& thread) {
  thread.waits_in = nullptr;
  push({key_of(thread), &thread, nullptr});
}

namespace {

template <class Body>
void for_each_thread(Body body) {
  for (Cta& cta : state.ctas)
    for (Thread& thread : cta.threads) body(thread);
}

}  // namespace

void wake(const volatile void* object) {
  for_each_thread([&](Thread& thread) {
    if (thread.waits_in && thread.waits_for == object) make_ready(thread);
  });
}

// ---- Switching ----

namespace {

void switch_to(Fiber& from, Fiber& to, bool forever = false) {
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(to.tsan_fiber, /*no synchronization*/ 1);
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(forever ? nullptr : &from.asan_fake_stack, to.stack,
                                   to.stack_bytes);
  kd_switch_stack(&from.stack_pointer, to.stack_pointer);
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(from.asan_fake_stack, nullptr, nullptr);
}

[[noreturn]] void report_deadlock() {
  std::fflush(stdout);
  std::fprintf(stderr, "emulator: seed %llu, %s: nothing can run any more\n",
               (unsigned long long)options.seed, options.label);
  for (Cta& cta : state.ctas) {
    const auto same = [](const Thread& x, const Thread& y) {
      return x.exited == y.exited && x.waits_in == y.waits_in && x.where.line == y.where.line &&
             x.waits_for == y.waits_for;
    };
    for (size_t first = 0, end; first < cta.threads.size(); first = end) {
      const Thread& thread = cta.threads[first];
      for (end = first; end < cta.threads.size() && same(thread, cta.threads[end]);) ++end;
      std::fprintf(stderr, "  CTA %u threads %zu to %zu ", cta.index, first, end - 1);
      if (thread.exited)
        std::fprintf(stderr, "have exited\n");
      else
        std::fprintf(stderr, "wait in %s at %s:%d\n", thread.waits_in, base_name(thread.where.file),
                     thread.where.line);
    }
  }
  std::abort();
}

// Runs whatever comes next, which may be the caller.
void run_next(Fiber& caller, bool forever = false) {
  for (;;) {
    if (state.events.empty()) report_deadlock();
    std::pop_heap(state.events.begin(), state.events.end());
    const Event event = state.events.back();
    state.events.pop_back();
    if (event.store) {
      complete(*event.store);
      continue;
    }
    Thread& next = *event.thread;
    state.current = &next;
    next.cta->started = true;
    threadIdx.x = next.index;
    blockIdx.x = next.cta->index;
    if (next.fiber != &caller) switch_to(caller, *next.fiber, forever);
    return;
  }
}

}  // namespace

void wait(const char* what, const volatile void* object, Where where) {
  Thread& self = *state.current;
  self.waits_in = what;
  self.waits_for = object;
  self.where = where;
  run_next(*self.fiber);
}

void yield() {
  Thread& self = *state.current;
  make_ready(self);
  run_next(*self.fiber);
}

namespace {

void exit_thread() {
  Thread& self = *state.current;
  Cta& cta = *self.cta;
  if (self.late_copies) fail(Where::here(), "it exits before a copy_16 of its own has arrived");
  self.exited = true;
  for (OpenExchange& open : cta.warps[self.index / 32].exchanges)
    if (open.what && open.arrived != open.mask && (open.mask >> (self.index % 32) & 1))
      fail(open.where, "%s waits for lane %u, which has exited", open.what, self.index % 32);
  release(&cta.exits);
  if (++cta.exited == cta.threads.size()) {
    for (const Store& store : state.stores)
      if (store.bytes && store.to == &cta)
        fail(store.where, "what it sends to CTA %u is under way when that exits", cta.index);
    // Shared memory ends here: for ThreadSanitizer by a write that must come after every access.
    acquire(&cta.exits);
    std::memset(cta.shared, 0xff, state.launch.shared_bytes);
  }
  release(&state.ends);
  if (++state.exited == state.ctas.size() * cta.threads.size())
    switch_to(*self.fiber, state.main, true);
  else
    run_next(*self.fiber, true);
}

// The first function on a fiber's stack.
void enter() {
  if (__sanitizer_finish_switch_fiber) {
    const void* bottom;
    size_t bytes;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
    if (!state.main.stack) {  // only a fiber can learn where the stack it came from lies
      state.main.stack = (char*)bottom;
      state.main.stack_bytes = bytes;
    }
  }
  acquire(&state.begin);
  state.thread(state.arguments);
  exit_thread();
}

// ---- Launches ----

// Fibers for a cluster of this many threads, and a few more, each above a page that faults.
void prepare_fibers(size_t threads) {
  const size_t old = state.fibers.size(), count = std::max(old, threads + 1 + threads / 32);
  if (__tsan_create_fiber && count > 8000)
    fail(Where::here(), "ThreadSanitizer has 8128 threads, this cluster needs %zu", count);
  state.fibers.resize(count);
  for (size_t i = old; i < count; ++i) {
    Fiber& fiber = state.fibers[i];
    void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) fail(Where::here(), "no memory for %zu stacks", count);
    mprotect(memory, kGuardBytes, PROT_NONE);
    fiber.stack = (char*)memory + kGuardBytes;
    fiber.stack_bytes = kStackBytes - kGuardBytes;
    if (__tsan_create_fiber) fiber.tsan_fiber = __tsan_create_fiber(0);
  }
}

void begin_thread(Thread& thread, Fiber& fiber) {
  thread.fiber = &fiber;
  // A call leaves the stack 8 bytes off 16: the slot that holds enter's address, then 6 registers.
  void** top = (void**)(fiber.stack + fiber.stack_bytes) - 2;
  *top = (void*)enter;
  fiber.stack_pointer = top - 6;
  if (__tsan_set_fiber_name) {
    char name[64];
    std::snprintf(name, sizeof name, "CTA %u thread %u", thread.cta->index, thread.index);
    __tsan_set_fiber_name(fiber.tsan_fiber, name);
  }
  make_ready(thread);
}

void run_cluster(unsigned index, const std::vector<char*>& shared) {
  const Launch& launch = state.launch;
  state.ctas = std::vector<Cta>(launch.cluster);
  state.exited = 0;
  state.cluster_barrier = {};
  state.events.clear();
  // Another fiber than in the cluster before: ThreadSanitizer takes one fiber for one thread.
  size_t fiber = random();
  for (unsigned rank = 0; rank < launch.cluster; ++rank) {
    Cta& cta = state.ctas[rank];
    cta.index = index * launch.cluster + rank;
    cta.rank = rank;
    cta.shared = shared[cta.index];
    cta.warps.resize((launch.block + 31) / 32);
    cta.threads.resize(launch.block);
    for (unsigned i = 0; i < launch.block; ++i) {
      cta.threads[i].cta = &cta;
      cta.threads[i].index = i;
      begin_thread(cta.threads[i], state.fibers[fiber++ % state.fibers.size()]);
    }
  }
  state.current = nullptr;
  run_next(state.main);
}

}  // namespace

void run(const Launch& launch, void (*thread)(const void*), const void* arguments) {
  const auto refuse_unless = [&](bool possible, const char* why) {
    if (!possible)
      fail(Where::here(),
           "a launch that a device refuses: grid %u, block %u, cluster %u, %zu B: %s", launch.grid,
           launch.block, launch.cluster, launch.shared_bytes, why);
  };
  refuse_unless(launch.block >= 1 && launch.block <= 1024, "1 to 1024 threads");
  refuse_unless(launch.cluster >= 1 && launch.cluster <= 16, "a cluster of 1 to 16");
  refuse_unless(launch.grid >= 1 && launch.grid <= 0x7fffffff, "1 to 2^31 - 1 CTAs");
  refuse_unless(launch.grid % launch.cluster == 0, "the grid holds whole clusters");
  refuse_unless(launch.shared_bytes <= 227 << 10, "at most 227 KiB of shared memory");

  state.launch = launch;
  state.thread = thread;
  state.arguments = arguments;
  state.random = mix(options.seed + 1);
  if (__tsan_get_current_fiber) state.main.tsan_fiber = __tsan_get_current_fiber();
  const size_t threads = (size_t)launch.cluster * launch.block;
  state.events.reserve(threads + kMaxStores);
  prepare_fibers(threads);
  blockDim.x = launch.block;
  gridDim.x = launch.grid;

  std::vector<char*> shared(launch.grid);
  for (char*& memory : shared) {  // exact sizes, so that AddressSanitizer sees every overrun
    if (posix_memalign((void**)&memory, 128, launch.shared_bytes)) std::abort();
    std::memset(memory, 0xff, launch.shared_bytes);
  }
  std::vector<unsigned> order(launch.grid / launch.cluster);
  for (size_t i = 0; i < order.size(); ++i) {
    order[i] = i;
    std::swap(order[i], order[random() % (i + 1)]);
  }
  release(&state.begin);
  // Subnormal numbers are 0, as nvcc's -ftz=true has it.
  const unsigned mode = _mm_getcsr();
  _mm_setcsr(mode | 0x8040);
  for (const unsigned cluster : order) run_cluster(cluster, shared);
  _mm_setcsr(mode);
  state.current = nullptr;
  acquire(&state.ends);
  for (char* memory : shared) std::free(memory);
}

void fail(Where where, const char* format, ...) {
  std::fflush(stdout);
  std::fprintf(stderr, "emulator: seed %llu, %s: ", (unsigned long long)options.seed,
               options.label);
  if (state.current)
    std::fprintf(stderr, "CTA %u thread %u ", state.current->cta->index, state.current->index);
  std::fprintf(stderr, "at %s:%d: ", base_name(where.file), where.line);
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "\n");
  std::abort();
}

void check_aligned(const volatile void* address, size_t bytes, const char* what, Where where) {
  const size_t off = (uintptr_t)address % bytes;
  if (off) fail(where, "%s at an address %zu bytes beyond a multiple of %zu", what, off, bytes);
}

}  // namespace kd::emulator
