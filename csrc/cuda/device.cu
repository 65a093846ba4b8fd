#include "device.h"

#include <stdexcept>
#include <string>

#include "intrinsics.h"

namespace fastrnn::cuda {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next caller would find it
  throw std::runtime_error(std::string("fastrnn: CUDA ") + what + ": " + cudaGetErrorString(error));
}

DeviceInfo device_info(int device) {
  const auto attribute = [device](cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device), "device");
    return value;
  };
  return {attribute(cudaDevAttrMultiProcessorCount),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          10 * attribute(cudaDevAttrComputeCapabilityMajor) +
              attribute(cudaDevAttrComputeCapabilityMinor)};
}

int built_for() { return CUDART_VERSION; }

void set_device(int device) { check(cudaSetDevice(device), "device"); }

}  // namespace fastrnn::cuda
