#pragma once

#include <cstddef>

namespace kd::cpu {

constexpr size_t kLargePage = size_t{2} << 20;

// Advises the system to back a range by large pages, which it finds several times faster than as
// many small ones. Failure changes nothing.
void advise_large_pages(const void* begin, const void* end);

// A large piece of memory with undefined content. When it is destroyed its pages stay with the
// process for the next piece, or several smaller ones, because finding and zeroing new pages takes
// longer than the arithmetic that fills them; the system may take them back meanwhile, where it
// runs short. Pieces in use and kept together are never more than the most that was ever in use.
class Memory {
 public:
  explicit Memory(size_t bytes);  // throws std::bad_alloc
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  char* data() const;
  size_t size() const { return bytes_; }

 private:
  char* begin_;
  size_t bytes_, reserved_;
};

// Gives what is kept back to the system at once; returns its bytes.
size_t release_kept_memory();

}  // namespace kd::cpu
