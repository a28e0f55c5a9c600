// What the C++ tests share: a count of failures, and a look at how a faulty kernel ends.
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "emulator.h"

namespace kd::tests {

#if defined(__SANITIZE_THREAD__)
inline constexpr bool kThreadSanitizer = true;
#else
inline constexpr bool kThreadSanitizer = false;
#endif

inline int checks = 0, failures = 0;

inline void expect(bool holds, const char* format, ...) __attribute__((format(printf, 2, 3)));
inline void expect(bool holds, const char* format, ...) {
  ++checks;
  if (holds) return;
  ++failures;
  va_list arguments;
  va_start(arguments, format);
  std::printf("FAILED (%s, seed %d): ", emulator::options.label, (int)emulator::options.seed);
  std::vprintf(format, arguments);
  std::printf("\n");
  va_end(arguments);
}

// What a process of its own prints while it runs `body`, and whether it failed.
struct Ending {
  bool failed;
  std::string output;
};
template <class Body>
Ending ending_of(Body body) {
  std::fflush(stdout);
  int ends[2];
  if (pipe(ends)) std::abort();
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], 1);
    dup2(ends[1], 2);
    close(ends[0]);
    close(ends[1]);
    failures = 0;
    body();
    std::fflush(stdout);
    _exit(failures != 0);
  }
  close(ends[1]);
  Ending ending;
  char buffer[4096];
  for (ssize_t n; (n = read(ends[0], buffer, sizeof buffer)) > 0;) ending.output.append(buffer, n);
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  ending.failed = status != 0;
  return ending;
}

// Runs a faulty `body` with each seed. It must fail with at least `least` of them, with a message
// that holds `message`, or with wrong results where that is null.
template <class Body>
void expect_caught(const char* label, const char* message, int seeds, int least, Body body) {
  emulator::options.label = label;
  int caught = 0;
  std::string last, told;
  for (int seed = 0; seed < seeds; ++seed) {
    emulator::options.seed = seed;
    const Ending ending = ending_of(body);
    last = ending.output;
    const size_t found = message ? last.find(message) : ending.failed ? 0 : std::string::npos;
    if (!ending.failed || found == std::string::npos) continue;
    ++caught;
    const size_t begin = last.rfind('\n', found) + 1;
    told = last.substr(begin, last.find('\n', found) - begin);
  }
  emulator::options.seed = 0;
  if (caught)
    std::printf("%s: caught by %d of %d seeds: %s\n", label, caught, seeds,
                told.substr(0, 300).c_str());
  expect(caught >= least, "%s: caught by %d of %d seeds only; the last said: %s", label, caught,
         seeds, last.c_str());
}

inline int finish() {
  std::printf(failures ? "%d FAILED\n" : "all passed\n", failures);
  return failures != 0;
}

}  // namespace kd::tests
