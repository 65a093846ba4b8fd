// What the host asks of the CUDA runtime beside launches.
#pragma once

#include "plan.h"

namespace fastrnn::cuda {

DeviceInfo device_info(int device);
// Makes a device current for this thread, in the CUDA runtime that is linked into this module.
void set_device(int device);
// Copies numbers of the host to the current device.
void upload(const int64_t* values, int64_t count, int64_t* to, void* stream);
// The CUDA version that this module was built for: 1000 * major + 10 * minor.
int built_for();

}  // namespace fastrnn::cuda
