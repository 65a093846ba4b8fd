// Numbers of the host travel as arguments of launches: nothing waits for the device, the host's
// memory may go at once, and a CUDA graph keeps them.
#include <algorithm>

#include "device.h"
#include "intrinsics.h"

namespace fastrnn::cuda {
namespace {

struct Numbers {
  int64_t* to;
  int count;
  int64_t values[448];  // arguments have 4 KiB
};

FASTRNN_KERNEL(kThreads) upload_kernel(FASTRNN_ARGUMENT Numbers n) {
  for (int i = thread_index(); i < n.count; i += kThreads) n.to[i] = n.values[i];
}

}  // namespace

void upload(const int64_t* values, int64_t count, int64_t* to, void* stream) {
  constexpr int64_t most = sizeof(Numbers::values) / sizeof(int64_t);
  for (int64_t first = 0; first < count; first += most) {
    Numbers n{to + first, static_cast<int>(std::min(most, count - first)), {}};
    std::copy_n(values + first, n.count, n.values);
    launch(upload_kernel, {{1, 1, 1}, kThreads, 0, 1, false, stream}, n);
  }
}

}  // namespace fastrnn::cuda
