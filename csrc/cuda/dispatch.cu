#include "plan.cuh"
#include "rows_params.h"
#include "scale.cuh"
#include "tail.cuh"

#include "../core/shard.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <optional>
#include <stdexcept>

#include "dispatch.h"
#include "launch.h"

namespace kd::cuda {

// In rows.cuh, compiled in a file per divergence.
template <class Divergence>
void run_rows(const LogitsParams& call, const Device& device, std::optional<Tile> forced,
              void* stream);

// In shard.cuh, likewise.
template <class Divergence>
void run_shard(ShardParams call, void* stream);

namespace {

constexpr const char* kOverride = "KDKERNELS_CUDA_TILE";

void check_vocab(int64_t vocab) {
  if (vocab > kMaxVocab)
    throw std::invalid_argument("a vocabulary of " + std::to_string(vocab) + " is above " +
                                std::to_string(kMaxVocab));
}

void check_rows(int64_t rows) {
  if (rows > kMaxRows)
    throw std::invalid_argument(std::to_string(rows) + " rows are more than " +
                                std::to_string(kMaxRows));
}

using RowsFunction = void (*)(const LogitsParams&, const Device&, std::optional<Tile>, void*);
#define KD_RUN_ROWS(name, Divergence) run_rows<Divergence>,
constexpr RowsFunction kRows[] = {KD_DIVERGENCES(KD_RUN_ROWS)};
#undef KD_RUN_ROWS

using ShardFunction = void (*)(ShardParams, void*);
#define KD_RUN_SHARD(name, Divergence) run_shard<Divergence>,
constexpr ShardFunction kShards[] = {KD_DIVERGENCES(KD_RUN_SHARD)};
#undef KD_RUN_SHARD

}  // namespace

// Such as "registers:8x256", "registers:8x256+ahead" or "streaming:1x256".
std::optional<Tile> forced_tile() {
  const char* wanted = std::getenv(kOverride);
  if (!wanted || !*wanted) return {};
  const std::string text = wanted, name = text.substr(0, text.find(':'));
  Tile tile;
  int max_threads = 0, used = 0;
  const auto is = [&](const char* its_name, Kernel kernel, int its_max_threads) {
    if (name != its_name) return;
    tile.kernel = kernel;
    max_threads = its_max_threads;
  };
  is("registers", Kernel::kRegisters, kMaxRegisterThreads);
  is("shared", Kernel::kShared, kMaxSharedThreads);
  is("streaming", Kernel::kStreaming, kMaxStreamingThreads);
  const int found =
      std::sscanf(wanted + name.size(), ":%dx%d%n", &tile.cluster, &tile.threads, &used);
  const std::string rest = text.substr(name.size() + used);
  tile.ahead = rest == "+ahead" && tile.kernel != Kernel::kStreaming;
  const bool parsed = found == 2 && (rest.empty() || tile.ahead);
  bool cluster = false;
  for (const int known : kClusters) cluster |= tile.cluster == known;
  if (tile.kernel == Kernel::kStreaming) cluster = tile.cluster == 1;
  if (!parsed || !cluster || tile.threads < 32 || tile.threads > max_threads || tile.threads % 32)
    throw std::invalid_argument(
        std::string(kOverride) + " is " + text +
        ", expected KERNEL:CLUSTERxTHREADS such as registers:8x256 or streaming:1x256 (at "
        "most 512 threads), or shared:8x256 (at most 256); +ahead after the first or last fetches "
        "later rows into the cache");
  return tile;
}

std::string why_not(int device) { return why_not(scale_kernel, device); }

void logits(const LogitsParams& call, std::optional<Tile> forced, float* scratch, int device,
            void* stream) {
  check_vocab(call.vocab);
  check_rows(call.rows);
  const Capturable capturable;
  use_device(device);

  const int64_t threads =
      std::min<int64_t>(kPlanThreads, std::max<int64_t>(1, (call.rows + 31) / 32) * 32);
  const Grid once{1, (unsigned)threads, 1, kPlanSharedBytes};
  float *const weights = scratch, *const losses = scratch + call.rows;
  float* const normalizer = scratch + 2 * call.rows;
  LogitsParams params = call;  // of the rows: weights are 0 where they take no part
  if (call.labels) params.token_weight = weights;
  if (call.reduction != Reduction::kMean)
    params.normalizer = nullptr;
  else if (!call.normalizer && params.token_weight)
    params.normalizer = normalizer;
  if (call.labels || params.normalizer == normalizer)
    launch(weights_kernel, once, stream,
           WeightsLaunch{call.rows, call.labels, call.ignore_index, call.token_weight,
                         call.labels ? weights : nullptr, normalizer});

  const bool reduces = call.reduction != Reduction::kNone;
  if (reduces) params.loss = losses;
  if (call.rows > 0)
    kRows[call.divergence](params, device_of(scale_kernel, device), forced, stream);
  if (reduces)
    launch(total_kernel, once, stream,
           TotalLaunch{call.rows, losses, params.normalizer, divisor_of(params), call.loss});
}

bool shard(const ShardParams& call, int device, void* stream) {
  check_vocab(call.vocab);
  check_rows(call.rows);
  const Capturable capturable;
  use_device(device);
  kShards[call.divergence](call, stream);
  return writes_gradient(call);
}

void tail(const TailParams& call, int device, void* stream) {
  check_rows(call.rows);
  const Capturable capturable;
  use_device(device);
  TailLaunch params(call);
  const auto kernel = call.gradient.data ? tails_gradient_kernel : tails_kernel;
  launch_in_parts(params, call.rows, [&](int64_t rows) {
    launch(kernel, Grid{(unsigned)rows, kTailThreads, 1, kTailSharedBytes}, stream, params);
  });
}

void scale(const ScaleParams& call, int device, void* stream) {
  if (call.rows == 0) return;
  check_rows(call.rows);
  const Capturable capturable;
  use_device(device);
  const unsigned ctas = (unsigned)std::min<int64_t>(call.rows, kScaleCtas);
  launch(scale_kernel, Grid{ctas, kScaleThreads, 1, 0}, stream, ScaleLaunch(call));
}

}  // namespace kd::cuda
