// The one way to launch a kernel, with every return code checked.
#pragma once

#include "tiles.h"

#if !defined(KD_EMULATE)  // csrc/tests/emulator.h has its own

#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

namespace kd::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(status));
}

struct Grid {
  unsigned grid, block, cluster;
  size_t shared_bytes;
};

struct LaunchConfig {
  cudaLaunchAttribute cluster{};
  cudaLaunchConfig_t config{};

  LaunchConfig(const Grid& grid, void* stream) {
    config.gridDim = dim3(grid.grid);
    config.blockDim = dim3(grid.block);
    config.dynamicSmemBytes = grid.shared_bytes;
    config.stream = (cudaStream_t)stream;
    if (grid.cluster <= 1) return;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = grid.cluster;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
  LaunchConfig(const LaunchConfig&) = delete;  // config points into it
};

// The caller has made it current for PyTorch, whose CUDA runtime is another one than ours.
inline void use_device(int device) { check(cudaSetDevice(device), "choosing a device"); }

// While a stream is being captured into a graph, lets this thread load a kernel and ask about it:
// that may allocate, which ends a capture otherwise. What is launched is captured all the same.
class Capturable {
 public:
  Capturable() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~Capturable() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  Capturable(const Capturable&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

inline int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "asking what the device is");
  return value;
}

inline int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "asking for the current device");
  return device;
}

// What find() returns for a key, which is asked for once: most questions to the driver take longer
// than to launch a kernel. Where find() throws, the next call has to ask again.
template <class Key, class Find>
auto once(const Key& key, Find find) {
  static std::mutex mutex;
  static std::map<Key, decltype(find())> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto answer = known.find(key);
  return answer != known.end() ? answer->second : known[key] = find();
}

// Asks for what a kernel has only on request.
template <class Params>
void allow(void (*kernel)(Params), const Grid& grid) {
  constexpr size_t kUnasked = 48 * 1024;
  const bool memory = grid.shared_bytes > kUnasked;
  const bool clusters = grid.cluster > 8;  // the largest that every device with clusters knows
  if (!memory && !clusters) return;
  const int device = current_device();
  once(std::tuple(device, (const void*)kernel, memory, clusters), [&] {
    if (memory) {
      // As much as there is, since this is asked for once.
      check(cudaFuncSetAttribute((const void*)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)),
            "allowing more shared memory");
      // For a second CTA beside the first; loads pass the first-level cache by.
      check(
          cudaFuncSetAttribute((const void*)kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                               cudaSharedmemCarveoutMaxShared),
          "preferring shared memory to cache");
    }
    if (clusters)
      check(cudaFuncSetAttribute((const void*)kernel,
                                 cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
            "allowing clusters of 16");
    return true;
  });
}

// Launches kernel<<<grid.grid, grid.block>>>(params) in clusters of grid.cluster CTAs.
template <class Params>
void launch(void (*kernel)(Params), const Grid& grid, void* stream, const Params& params) {
  allow(kernel, grid);
  const LaunchConfig launch(grid, stream);
  check(cudaLaunchKernelEx(&launch.config, kernel, params), "launching a kernel");
}

// The device as this build's code sees it: PTX of an older one runs there too, but has no clusters.
template <class Params>
Device device_of(void (*kernel)(Params), int device) {
  return once(device, [&]() -> Device {
    cudaFuncAttributes code;
    check(cudaFuncGetAttributes(&code, (const void*)kernel), "asking what a kernel was built for");
    return {code.ptxVersion / 10, code.ptxVersion % 10,
            attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
            attribute(cudaDevAttrMultiProcessorCount, device),
            attribute(cudaDevAttrL2CacheSize, device)};
  });
}

// Why this build has no code for the device, or an empty string.
template <class Params>
std::string why_not(void (*kernel)(Params), int device) {
  int count = 0;
  cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaErrorNoDevice || (status == cudaSuccess && count == 0))
    return "there is no CUDA device";
  if (status == cudaSuccess && device >= count)
    return "CUDA has " + std::to_string(count) + " devices, none is number " +
           std::to_string(device);
  if (status == cudaSuccess) {
    const Capturable capturable;
    use_device(device);
    const int major = attribute(cudaDevAttrComputeCapabilityMajor, device);
    if (major < 8)
      return "compute capability " + std::to_string(major) + "." +
             std::to_string(attribute(cudaDevAttrComputeCapabilityMinor, device)) + " is below 8.0";
    cudaFuncAttributes attributes;
    status = cudaFuncGetAttributes(&attributes, (const void*)kernel);
  }
  if (status == cudaSuccess) return "";
  cudaGetLastError();
  return std::string("CUDA says: ") + cudaGetErrorString(status);
}

// How many such clusters the current device works on at once. None: a part of a device (MIG) may be
// too small for those of 8, and those of 16 exist on some devices only.
template <class Params>
int clusters_at_once(void (*kernel)(Params), const Grid& grid) {
  const int device = current_device();
  const std::tuple key(device, (const void*)kernel, grid.cluster, grid.block, grid.shared_bytes);
  return once(key, [&] {
    allow(kernel, grid);
    int count = 0;
    cudaError_t status;
    if (grid.cluster > 1) {
      const LaunchConfig launch(grid, nullptr);
      status = cudaOccupancyMaxActiveClusters(&count, (const void*)kernel, &launch.config);
    } else {
      status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, (const void*)kernel,
                                                             (int)grid.block, grid.shared_bytes);
      count *= attribute(cudaDevAttrMultiProcessorCount, device);
    }
    cudaGetLastError();
    return status == cudaSuccess ? count : 0;
  });
}

}  // namespace kd::cuda

#endif

namespace kd::cuda {

// Calls part(rows) with params.first_row set until all rows had their turn.
template <class Params, class Part>
void launch_in_parts(Params& params, int64_t rows, Part part) {
  for (; params.first_row < rows; params.first_row += kRowsPerLaunch) {
    const int64_t left = rows - params.first_row;
    part(left < kRowsPerLaunch ? left : kRowsPerLaunch);
  }
}

}  // namespace kd::cuda
