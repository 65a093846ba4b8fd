// Numbers of the host are passed as arguments of launches: nothing waits for the device, the host's
// memory may be freed at once, and a CUDA graph holds a copy.
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
  constexpr int64_t capacity = sizeof(Numbers::values) / sizeof(int64_t);
  for (int64_t first = 0; first < count; first += capacity) {
    Numbers n{to + first, static_cast<int>(std::min(capacity, count - first)), {}};
    std::copy_n(values + first, n.count, n.values);
    launch(upload_kernel, {{1, 1, 1}, kThreads, 0, 1, false, stream}, n);
  }
}

}  // namespace fastrnn::cuda
