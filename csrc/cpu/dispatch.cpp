#include "dispatch.h"

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <system_error>
#include <thread>

#if defined(KD_X86_64)
#include <cpuid.h>
#include <xmmintrin.h>
#endif

#include "../core/shard.h"
#include "kernel.h"
#include "memory.h"

namespace kd::cpu {
namespace {

constexpr const char* kOverride = "KDKERNELS_CPU_ISA";

#define KD_NAME(name, Divergence) #name,
constexpr const char* kNames[] = {KD_DIVERGENCES(KD_NAME)};
#undef KD_NAME

#if defined(KD_X86_64)
// Asked of the processor: not every compiler's __builtin_cpu_supports knows its name.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

std::vector<const InstructionSet*> supported() {
  std::vector<const InstructionSet*> result;
#if defined(KD_X86_64)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    if (__builtin_cpu_supports("avx512bf16")) result.push_back(&kAvx512Bf16);
    result.push_back(&kAvx512);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c())
    result.push_back(&kAvx2);
#endif
  result.push_back(&kBaseline);
  return result;
}

// Each row's weight, 0 for ignored rows.
std::vector<float> row_weights(const LogitsParams& params) {
  std::vector<float> weights(params.rows, 1.0f);
  for (int64_t row = 0; row < params.rows; ++row) {
    if (params.token_weight) weights[row] = params.token_weight[row];
    if (!params.labels) continue;
    const int64_t label = params.labels[row];
    if (label == params.ignore_index) weights[row] = 0;
    if (weights[row] != 0 && (label < 0 || label >= params.vocab))
      throw std::invalid_argument("labels: row " + std::to_string(row) + " holds " +
                                  std::to_string(label) + ", expected 0 to " +
                                  std::to_string(params.vocab - 1) + " or ignore_index (" +
                                  std::to_string(params.ignore_index) + ")");
  }
  return weights;
}

double normalizer_of(const LogitsParams& params, const std::vector<float>& weights) {
  if (params.reduction != Reduction::kMean) return 1;
  if (params.normalizer) return *params.normalizer;
  double total = 0;
  for (const float weight : weights) total += weight;
  return total > 0 || std::isnan(total) ? total : 1;
}

// Whether the gradient is stored past the caches: one of this size would not stay there until a
// backward reads it. One in place is there already.
template <class Params>
bool streams_past_caches(const Params& params) {
#if defined(KD_X86_64)
  constexpr int64_t kPastCaches = int64_t{16} << 20;
#else
  constexpr int64_t kPastCaches = INT64_MAX;  // there are no such stores
#endif
  const Rows& gradient = params.gradient;
  return gradient.data && gradient.data != params.student.data &&
         params.rows * gradient.width * item_size(gradient.dtype) >= kPastCaches;
}

// Memory of this thread's own, kept for its next call; null where there is none left.
float* thread_scratch(size_t bytes) {
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  static thread_local std::unique_ptr<float, Free> memory;
  static thread_local size_t size = 0;
  if (size < bytes) {
    const size_t alignment = bytes < kLargePage / 4 ? 64 : kLargePage;
    size = (bytes + alignment - 1) & ~(alignment - 1);
    memory.reset();
    memory.reset((float*)std::aligned_alloc(alignment, size));
    if (!memory) size = 0;
    if (memory) advise_large_pages(memory.get(), (char*)memory.get() + size);
  }
  return memory.get();
}

// What is too small for a normal float becomes 0 in this thread. Of logits far below the largest
// there are many such exponentials, and processors of Intel take 100 cycles and more for each.
class FlushesSubnormals {
 public:
#if defined(KD_X86_64)
  FlushesSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON); }
  ~FlushesSubnormals() { _mm_setcsr(before_); }

 private:
  const unsigned before_;
#else
  FlushesSubnormals() {}
#endif
};

// Calls work() in so many threads, or in fewer where the system has no more.
template <class Work>
void in_parallel(int threads, Work work) {
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
  work();
#else
  std::vector<std::thread> others;
  others.reserve(threads - 1);
  try {
    while ((int)others.size() < threads - 1) others.emplace_back(work);
  } catch (const std::system_error&) {
  }
  work();
  for (std::thread& other : others) other.join();
#endif
}

// Calls body(begin, end, next, scratch) for ranges that cover the rows; `next` is the row the same
// thread goes on with, or `rows`; scratch holds `floats` floats.
template <class Body>
void for_rows(int64_t rows, int64_t width, int64_t floats, int threads, Body body) {
  constexpr int64_t kElementsWorthAThread = 1 << 14;
  const int64_t chunk = std::max<int64_t>(1, kElementsWorthAThread / std::max<int64_t>(1, width));
  const int64_t chunks = (rows + chunk - 1) / chunk;
  threads = (int)std::min<int64_t>(std::max(1, threads), chunks);
  std::atomic<int64_t> taken{0};
  std::atomic<bool> served{false};
  const auto work = [&] {
    float* const scratch = floats ? thread_scratch(floats * sizeof(float)) : nullptr;
    if (floats && !scratch) return;  // other threads take the rows
    served = true;
    const FlushesSubnormals flushes;
    for (int64_t begin = chunk * taken++, next; begin < rows; begin = next) {
      next = std::min(rows, chunk * taken++);
      body(begin, std::min(rows, begin + chunk), next, scratch);
    }
  };
  // A parallel region of one thread still costs a system call, and the branch predictions with it.
  if (threads <= 1) {
    work();
  } else {
    // Rounding modes belong to a thread: all take the caller's.
    std::fenv_t mode;
    std::fegetenv(&mode);
    in_parallel(threads, [&] {
      std::fenv_t own;
      std::fegetenv(&own);
      std::fesetenv(&mode);
      work();
      std::fesetenv(&own);
    });
  }
  if (!served) throw std::bad_alloc();  // and nothing is written
}

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet* set : supported()) names.push_back(set->name);
  return names;
}

const InstructionSet* chosen() {
  static const std::vector<const InstructionSet*> sets = supported();
  const char* wanted = std::getenv(kOverride);
  if (!wanted || !*wanted) return sets.front();
  std::string known;
  for (const InstructionSet* set : sets) {
    if (std::string(wanted) == set->name) return set;
    known += std::string(known.empty() ? "" : ", ") + set->name;
  }
  throw std::invalid_argument(std::string(kOverride) + "=" + wanted +
                              " is not an instruction set of this machine and build; it has " +
                              known);
}

std::vector<std::string> divergences() { return {kNames, kNames + kDivergences}; }

void logits(const LogitsParams& params, const InstructionSet* set, int threads) {
  const std::vector<float> weights = row_weights(params);
  const double normalizer = normalizer_of(params, weights);
  const bool with_gradient = params.gradient.data != nullptr;
  const RowsFunction rows = (with_gradient ? set->loss_and_gradient : set->loss)[params.divergence];

  std::vector<double> row_loss(params.rows);
  const RowPlan plan{weights.data(), normalizer, row_loss.data(), streams_past_caches(params)};
  for_rows(params.rows, params.vocab, 2 * scratch_row(params.vocab), threads,
           [&](int64_t begin, int64_t end, int64_t next, float* scratch) {
             rows(params, plan, begin, end, next, scratch);
           });

  // Summed in row order whatever the number of threads.
  double total = 0;
  for (int64_t row = 0; row < params.rows; ++row) {
    if (params.reduction == Reduction::kNone) params.loss[row] = (float)row_loss[row];
    total += row_loss[row];
  }
  if (params.reduction != Reduction::kNone) *params.loss = (float)(total / normalizer);
}

bool shard(const ShardParams& params, const InstructionSet* set, int threads) {
  const ShardFunction rows = set->shard[params.divergence];
  const RowPlan plan{params.token_weight, 1, nullptr, streams_past_caches(params)};
  for_rows(params.rows, params.vocab, 2 * scratch_row(params.vocab), threads,
           [&](int64_t begin, int64_t end, int64_t next, float* scratch) {
             rows(params, plan, begin, end, next, scratch);
           });
  return KD_NAMESPACE::writes_gradient(params);
}

void tail(const TailParams& params, const InstructionSet* set, int threads) {
  const TailFunction rows = set->tail;
  const bool streams = streams_past_caches(params);
  for_rows(params.rows, params.vocab, 0, threads,
           [&](int64_t begin, int64_t end, int64_t, float*) { rows(params, begin, end, streams); });
}

void scale(const ScaleParams& params, const InstructionSet* set, int threads) {
  if (params.rows == 0) return;
  if (!params.row_scale && params.grad_output_stride == 0 && *params.grad_output == 1) return;
  const ScaleFunction rows = set->scale;
  for_rows(params.rows, params.gradient.width, 0, threads,
           [&](int64_t begin, int64_t end, int64_t, float*) { rows(params, begin, end); });
}

}  // namespace kd::cpu
