// A few cases in many orders of threads, each in a process of its own, of kernels that hold a
// planted fault: fails unless enough of them fail. Arguments: what the fault is, and what must be
// said of it, or nothing where wrong results are enough. See .ci/check_emulator.
#include "rows_case.h"

int main(int count, char** arguments) {
  using namespace kd;
  const char* const message = count > 2 && *arguments[2] ? arguments[2] : nullptr;
  tests::expect_caught(arguments[1], message, 20, 5, [] {
    const uint64_t seed = emulator::options.seed;
    tests::Case c;
    c.first_seed = seed;
    c.rows = 5;
    c.vocab = 301;
    c.tile = {cuda::Kernel::kStreaming, 1, 64};
    tests::check(c);
    c.tile = {cuda::Kernel::kRegisters, 4, 32};
    tests::check(c);
    c.tile = {cuda::Kernel::kShared, 2, 64};
    tests::check(c);
    c.misaligned[1] = 3;  // unlike the others
    c.labels = true;
    c.ce_weight = 1;
    c.metrics = true;
    c.student = c.teacher = DType::kBFloat16;
    c.tile = {cuda::Kernel::kShared, 2, 64};
    tests::check(c);
  });
  return tests::finish();
}
