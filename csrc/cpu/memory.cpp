#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <new>
#include <vector>

namespace kd::cpu {
namespace {

// Where malloc puts large tensors in a page. Rows of a gradient that begin elsewhere in their pages
// than those of the logits cost 10 %, by loads that seem to depend on stores.
constexpr size_t kOffset = 64;

struct Mapping {
  void* begin;
  size_t size;
};

// Mappings out of use, oldest first, and sizes of all there are.
class Keeper {
 public:
  // The smallest kept one that is large enough, unless most of it would lie idle, or a new one.
  Mapping take(size_t size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto best = kept_.end();
    for (auto it = kept_.begin(); it != kept_.end(); ++it)
      if (it->size >= size && it->size / 2 <= size &&
          (best == kept_.end() || it->size < best->size))
        best = it;
    Mapping mapping{nullptr, size};
    if (best != kept_.end()) {
      mapping = *best;
      kept_.erase(best);
      kept_bytes_ -= mapping.size;
    } else {
      most_used_ = std::max(most_used_, used_ + size);
      drop_to(most_used_ - used_ - size);
      mapping.begin = map(size);
      if (!mapping.begin) {
        drop_to(0);
        mapping.begin = map(size);
      }
      if (!mapping.begin) throw std::bad_alloc();
      kept_.reserve(++mappings_);  // so that put() never allocates
    }
    used_ += mapping.size;
    return mapping;
  }

  void put(Mapping mapping) {
    const std::lock_guard<std::mutex> lock(mutex_);
    used_ -= mapping.size;
#if defined(MADV_FREE)
    if (madvise(mapping.begin, mapping.size, MADV_FREE) == 0) {
      kept_.push_back(mapping);
      kept_bytes_ += mapping.size;
      return;
    }
#endif
    unmap(mapping);
  }

  size_t release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    const size_t bytes = kept_bytes_;
    drop_to(0);
    most_used_ = used_;
    return bytes;
  }

 private:
  static void* map(size_t size) {
    void* const begin =
        mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (begin == MAP_FAILED) return nullptr;
    advise_large_pages(begin, (char*)begin + size);
    return begin;
  }

  void unmap(Mapping mapping) {
    munmap(mapping.begin, mapping.size);
    --mappings_;
  }

  void drop_to(size_t bytes) {
    while (kept_bytes_ > bytes) {
      unmap(kept_.front());
      kept_bytes_ -= kept_.front().size;
      kept_.erase(kept_.begin());
    }
  }

  std::mutex mutex_;
  std::vector<Mapping> kept_;
  size_t kept_bytes_ = 0, used_ = 0, most_used_ = 0, mappings_ = 0;
};

// Never destroyed: the process may end with tensors that still hold memory.
Keeper& keeper() {
  static Keeper& instance = *new Keeper;
  return instance;
}

}  // namespace

void advise_large_pages([[maybe_unused]] const void* begin, [[maybe_unused]] const void* end) {
#if defined(MADV_HUGEPAGE)
  const uintptr_t first = ((uintptr_t)begin + kLargePage - 1) & ~(kLargePage - 1);
  const uintptr_t last = (uintptr_t)end & ~(kLargePage - 1);
  if (first < last) madvise((void*)first, last - first, MADV_HUGEPAGE);
#endif
}

Memory::Memory(size_t bytes) : bytes_(bytes) {
  if (bytes > SIZE_MAX / 2) throw std::bad_alloc();
  const size_t page = (size_t)sysconf(_SC_PAGESIZE);
  const Mapping mapping = keeper().take((bytes + kOffset + page - 1) / page * page);
  mapping_ = mapping.begin;
  mapped_ = mapping.size;
}

Memory::~Memory() { keeper().put({mapping_, mapped_}); }

char* Memory::data() const { return (char*)mapping_ + kOffset; }

size_t release_kept_memory() { return keeper().release(); }

}  // namespace kd::cpu
