// What the host asks of the CUDA runtime beside launches.
#pragma once

#include "plan.h"

namespace fastrnn::cuda {

DeviceInfo device_info(int device);
// Makes it this thread's current one for the runtime that this module carries.
void set_device(int device);

}  // namespace fastrnn::cuda
