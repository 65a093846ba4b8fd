// torch's tensors in C++, without libtorch: read where they lie, and made by torch's own allocator.
//
// They come through DLPack's table of C functions where this torch has one, and else through their
// Python attributes (or where FASTRNN_EXCHANGE=attributes is set, for tests).
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>
#include <span>
#include <string>
#include <string_view>

#include "../scan.h"

namespace fastrnn {

namespace py = pybind11;

// A ValueError about an argument: what was expected, and what came.
[[noreturn]] void fail_with(const char* argument, std::initializer_list<std::string_view> texts);
template <class... Text>
[[noreturn]] void fail(const char* argument, const Text&... texts) {
  fail_with(argument, {std::string_view(texts)...});
}

// What torch tells the extension once, when the package is imported: its types, functions that each
// say whether something watches every operation (see is_watched), torch.is_grad_enabled and
// torch.get_num_threads.
void set_torch(py::type tensor_type, py::type parameter_type, py::tuple watchers,
               py::object is_grad_enabled, py::object get_num_threads);

// "dlpack" or "attributes".
const char* exchange_name();

// torch.get_num_threads() and torch.is_grad_enabled()
int torch_threads();
bool is_grad_enabled();

enum class Element : int {
  kFloat32,
  kFloat64,
  kBFloat16,
  kFloat16,
  kBool,
  kInt64,
  kInt8,
  kUInt8,
  kOther
};
constexpr Element element_of(DType dtype) { return static_cast<Element>(dtype); }

class Shape {
 public:
  static constexpr int kMaxDims = 4;

  Shape() = default;
  Shape(std::initializer_list<int64_t> sizes) {
    for (const int64_t size : sizes) push(size);
  }
  void push(int64_t size) {
    if (dims_ < kMaxDims) sizes_[dims_] = size;
    ++dims_;
  }
  int dims() const { return dims_; }
  int64_t operator[](int i) const { return sizes_[i]; }
  int64_t* data() { return sizes_; }
  int64_t count() const;  // of elements
  bool operator==(const Shape& other) const;
  std::string text() const;  // "[2, 3]"

 private:
  int dims_ = 0;  // beyond kMaxDims the sizes are not kept: no such tensor fits anywhere here
  int64_t sizes_[kMaxDims] = {};
};

// A tensor that Python owns: valid as long as `object` is.
struct Tensor {
  py::handle object;
  void* data = nullptr;
  Shape shape;
  Element element = Element::kOther;
  int device_type = 0, device_index = 0;  // DLPack's numbers
  bool is_contiguous = false;

  explicit operator bool() const { return object.ptr() != nullptr; }
  bool is_on_cpu() const { return device_type == 1; }
  bool has_device_of(const Tensor& other) const {
    return device_type == other.device_type && device_index == other.device_index;
  }
};

bool is_tensor(py::handle object);

// Whether one of torch's modes, transforms or tools wants to see each operation, so that none may
// be left out.
bool is_watched();

// Whether an operation on this tensor means no more than its kernel: no subclass, and nothing that
// stands in flags alone, as negation does.
bool is_plain(py::handle object);

// object.name(), for a name that is made once.
class Method {
 public:
  explicit Method(const char* name) : name_(PyUnicode_InternFromString(name)) {}
  py::object operator()(py::handle object) const;
  bool is_true(py::handle object) const { return (*this)(object).ptr() == Py_True; }
  // With more arguments: the object first.
  py::object call(std::span<PyObject* const> arguments) const;

 private:
  PyObject* const name_;
};

// object.name, likewise.
class Attribute {
 public:
  explicit Attribute(const char* name) : name_(PyUnicode_InternFromString(name)) {}
  py::object operator()(py::handle object) const;
  bool is_true(py::handle object) const { return (*this)(object).ptr() == Py_True; }

 private:
  PyObject* const name_;
};

// The tensor behind a Python object, which must be one. Throws for one without memory, as those of
// torch.func and fake tensors.
Tensor view(py::handle object);

// Where its elements begin, of a tensor that has memory.
const void* address_of(py::handle object);

// A new, uninitialised, contiguous tensor on like's device.
py::object make_tensor(const Tensor& like, const Shape& shape, Element element);

// torch's current stream of the tensor's device, a cudaStream_t; null on the CPU.
void* current_stream(const Tensor& tensor);

// How Python prints dtype, shape and device: "torch.float32 [2, 3] on cpu".
std::string describe(py::handle object);
std::string describe(Element element);

}  // namespace fastrnn

// Bound functions take tensors by value.
template <>
struct pybind11::detail::type_caster<fastrnn::Tensor> {
  PYBIND11_TYPE_CASTER(fastrnn::Tensor, const_name("torch.Tensor"));
  bool load(handle source, bool) {
    if (!fastrnn::is_tensor(source)) return false;
    value = fastrnn::view(source);
    return true;
  }
};
