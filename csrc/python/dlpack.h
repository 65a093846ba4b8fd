// The part of DLPack's C interface, version 1, by which tensors come and go: what a tensor is in
// memory, and the table of functions that torch.Tensor.__dlpack_c_exchange_api__ points to. Only
// the layout of these structs matters; see https://dmlc.github.io/dlpack/latest/c_api.html.
#pragma once

#include <cstdint>

namespace fastrnn::dlpack {

enum DeviceType : int32_t { kCpu = 1, kCuda = 2 };
struct Device {
  DeviceType type;
  int32_t index;
};

enum TypeCode : uint8_t { kInt = 0, kFloat = 2, kBfloat = 4, kBool = 6 };
struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t dims;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null: contiguous
  uint64_t byte_offset;
};

struct Version {
  uint32_t major, minor;
};

struct Managed;  // a tensor with an owner; only handed on

using SetError = void (*)(void* context, const char* kind, const char* message);

struct Exchange {
  Version version;
  Exchange* previous;
  // Of the prototype, dtype, dims, shape and device are read.
  int (*allocate)(Tensor* prototype, Managed** out, void* context, SetError set_error);
  int (*from_object)(void* object, Managed** out);
  int (*to_object)(Managed* tensor, void** object);  // takes the tensor over
  int (*view)(void* object, Tensor* out);            // owns nothing; may be null
  int (*current_stream)(DeviceType device, int32_t index, void** stream);
};

}  // namespace fastrnn::dlpack
