#include "memory.h"

#include <sys/mman.h>

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

// Whole large pages, from a border between such pages: giving back a part of one would break it up.
struct Piece {
  char* begin;
  size_t size;

  char* end() const { return begin + size; }
};

// Pieces out of use, in order of address and none beside another, and sizes of all there are.
class Keeper {
 public:
  // A part of the smallest kept piece that is large enough, or new memory.
  char* take(size_t size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    kept_.reserve(kept_.size() + pieces_used_ + 1);  // so that put() never allocates
    auto best = kept_.end();
    for (auto it = kept_.begin(); it != kept_.end(); ++it)
      if (it->size >= size && (best == kept_.end() || it->size < best->size)) best = it;
    char* begin = nullptr;
    if (best != kept_.end()) {
      begin = best->begin;
      cut(best, size);
    } else {
      const size_t most_used = std::max(most_used_, used_ + size);
      drop_to(most_used - used_ - size);
      begin = map(size);
      if (!begin) {
        drop_to(0);
        begin = map(size);
      }
      if (!begin) throw std::bad_alloc();
      most_used_ = most_used;
    }
    used_ += size;
    ++pieces_used_;
    return begin;
  }

  void put(Piece piece) {
    const std::lock_guard<std::mutex> lock(mutex_);
    used_ -= piece.size;
    --pieces_used_;
#if defined(MADV_FREE)
    if (madvise(piece.begin, piece.size, MADV_FREE) == 0) return keep(piece);
#endif
    munmap(piece.begin, piece.size);
  }

  size_t release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    const size_t bytes = kept_bytes_;
    drop_to(0);
    most_used_ = used_;
    return bytes;
  }

 private:
  using Place = std::vector<Piece>::iterator;

  static char* map(size_t size) {
    // With a large page to spare, so as to begin at one.
    void* const all = mmap(nullptr, size + kLargePage, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) return nullptr;
    const size_t head = -(uintptr_t)all % kLargePage;
    char* const begin = (char*)all + head;
    if (head) munmap(all, head);
    munmap(begin + size, kLargePage - head);
    advise_large_pages(begin, begin + size);
    return begin;
  }

  void keep(Piece piece) {
    const auto above = std::find_if(kept_.begin(), kept_.end(),
                                    [&](const Piece& kept) { return kept.begin > piece.begin; });
    kept_bytes_ += piece.size;
    const auto place = kept_.insert(above, piece);
    if (const auto next = place + 1; next != kept_.end() && next->begin == place->end()) {
      place->size += next->size;
      kept_.erase(next);
    }
    if (place == kept_.begin()) return;
    if (const auto before = place - 1; before->end() == place->begin) {
      before->size += place->size;
      kept_.erase(place);
    }
  }

  // Takes the first bytes of a kept piece from what is kept.
  void cut(Place piece, size_t size) {
    kept_bytes_ -= size;
    piece->begin += size;
    piece->size -= size;
    if (piece->size == 0) kept_.erase(piece);
  }

  // Gives the rest back to the system, small pieces first.
  void drop_to(size_t bytes) {
    while (kept_bytes_ > bytes) {
      const auto smallest =
          std::min_element(kept_.begin(), kept_.end(),
                           [](const Piece& a, const Piece& b) { return a.size < b.size; });
      const size_t size = std::min(smallest->size, kept_bytes_ - bytes);
      munmap(smallest->begin, size);
      cut(smallest, size);
    }
  }

  std::mutex mutex_;
  std::vector<Piece> kept_;
  size_t kept_bytes_ = 0, used_ = 0, most_used_ = 0, pieces_used_ = 0;
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
  reserved_ = (bytes + kOffset + kLargePage - 1) / kLargePage * kLargePage;
  begin_ = keeper().take(reserved_);
}

Memory::~Memory() { keeper().put({begin_, reserved_}); }

char* Memory::data() const { return begin_ + kOffset; }

size_t release_kept_memory() { return keeper().release(); }

}  // namespace kd::cpu
