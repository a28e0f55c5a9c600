// What the row kernels asked the cache for, beside what they have to.
#pragma once

#include <algorithm>
#include <vector>

#include "emulator.h"
#include "harness.h"
#include "rows_of.h"

namespace kd::tests {

// The cache was asked once for the whole 16-byte vectors of every later row that takes part.
inline void check_fetched(const LogitsParams& params, const cuda::Tile& tile,
                          std::vector<emulator::Fetched> fetched) {
  const auto joined = [](std::vector<emulator::Fetched> parts) {
    std::sort(parts.begin(), parts.end(), [](auto& x, auto& y) { return x.from < y.from; });
    std::vector<emulator::Fetched> whole;
    for (const auto& part : parts) {
      if (!whole.empty() && whole.back().from + whole.back().bytes == part.from)
        whole.back().bytes += part.bytes;
      else
        whole.push_back(part);
    }
    return whole;
  };
  std::vector<emulator::Fetched> expected;
  const auto expect_row = [&](const Rows& rows, int64_t row) {
    const uintptr_t begin = ((uintptr_t)rows.row(row) + 15) & ~(uintptr_t)15;
    const uintptr_t end =
        (uintptr_t)(rows.row(row) + params.vocab * item_size(rows.dtype)) & ~(uintptr_t)15;
    if (begin < end) expected.push_back({(const char*)begin, (uint32_t)(end - begin)});
  };
  for (int64_t row = rows_in_flight(params, tile); row < params.rows && tile.ahead; ++row) {
    if (params.token_weight && params.token_weight[row] == 0) continue;
    expect_row(params.student, row);
    if (params.kd_weight != 0 || params.metrics) expect_row(params.teacher, row);
  }
  fetched = joined(fetched), expected = joined(expected);
  bool right = fetched.size() == expected.size();
  for (size_t i = 0; i < expected.size() && right; ++i)
    right = fetched[i].from == expected[i].from && fetched[i].bytes == expected[i].bytes;
  expect(right, "the cache was asked for other memory than that of later rows");
}

}  // namespace kd::tests
