#include "device.h"

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "intrinsics.h"

namespace fastrnn::cuda {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next caller would find it
  throw std::runtime_error(std::string("fastrnn: CUDA ") + what + ": " + cudaGetErrorString(error));
}

namespace {

__global__ void probe() {}

// Clusters of `size` blocks that run at once, each block with all of a multiprocessor's memory:
// fewer than the multiprocessors have room for, as those of a cluster are neighbours, and none in a
// slice of a GPU that is too small.
int clusters_at_once(int size, int shared) {
  if (cudaFuncSetAttribute(probe, cudaFuncAttributeMaxDynamicSharedMemorySize, shared) !=
          cudaSuccess ||
      (size > 8 && cudaFuncSetAttribute(probe, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) !=
                       cudaSuccess)) {
    cudaGetLastError();
    return 0;
  }
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = size;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(size);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared;
  config.attrs = &cluster;
  config.numAttrs = 1;
  int count = 0;
  if (cudaOccupancyMaxActiveClusters(&count, probe, &config) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return count;
}

DeviceInfo ask(int device) {
  const auto attribute = [device](cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device), "device");
    return value;
  };
  const int shared = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  DeviceInfo info(attribute(cudaDevAttrMultiProcessorCount), shared,
                  10 * attribute(cudaDevAttrComputeCapabilityMajor) +
                      attribute(cudaDevAttrComputeCapabilityMinor));
  if (attribute(cudaDevAttrClusterLaunch) != 0) {
    set_device(device);
    for (int i = 0; i < 4; ++i) info.clusters[i] = clusters_at_once(2 << i, shared);
  } else {
    info.clusters = {};
  }
  return info;
}

std::mutex mutex;  // of the two tables

}  // namespace

// Asked once: a device does not change.
DeviceInfo device_info(int device) {
  static std::map<int, DeviceInfo> known;
  const std::lock_guard lock(mutex);
  const auto found = known.find(device);
  return found != known.end() ? found->second : known.emplace(device, ask(device)).first->second;
}

// Attributes of a function are those of one device, and stay.
void allow(const void* function, int64_t shared, int cluster) {
  struct Allowed {
    int64_t shared = 48 * 1024;
    int cluster = 8;
  };
  static std::map<std::pair<int, const void*>, Allowed> known;
  if (shared <= Allowed().shared && cluster <= Allowed().cluster) return;
  int device = 0;
  check(cudaGetDevice(&device), "device");
  const std::lock_guard lock(mutex);
  Allowed& allowed = known[{device, function}];
  if (shared > allowed.shared) {
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared)),
          "shared memory");
    allowed.shared = shared;
  }
  if (cluster > allowed.cluster) {
    check(cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
          "cluster");
    allowed.cluster = cluster;
  }
}

int built_for() { return CUDART_VERSION; }

void set_device(int device) { check(cudaSetDevice(device), "device"); }

}  // namespace fastrnn::cuda
