#include "tensor.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iterator>
#include <numeric>
#include <unordered_map>
#include <vector>

#include "dlpack.h"

namespace fastrnn {

namespace {

// Never destroyed: the interpreter may be gone by then.
struct Torch {
  py::object tensor_type, parameter_type, is_grad_enabled, get_num_threads;
  std::vector<py::object> watchers;
  const dlpack::Exchange* exchange = nullptr;
  std::unordered_map<PyObject*, Element> elements;  // of torch.dtype objects, which live for ever
};
Torch& torch() {
  static Torch* const torch = new Torch;
  return *torch;
}

constexpr const char* kElementNames[] = {"torch.float32", "torch.float64", "torch.bfloat16",
                                         "torch.float16", "torch.bool",    "torch.int64",
                                         "torch.int8",    "torch.uint8"};

constexpr dlpack::DataType kDataTypes[] = {
    {dlpack::kFloat, 32, 1}, {dlpack::kFloat, 64, 1}, {dlpack::kBfloat, 16, 1},
    {dlpack::kFloat, 16, 1}, {dlpack::kBool, 8, 1},   {dlpack::kInt, 64, 1},
    {dlpack::kInt, 8, 1},
};

Element element_of(dlpack::DataType type) {
  for (int i = 0; i < static_cast<int>(std::size(kDataTypes)); ++i) {
    const dlpack::DataType& known = kDataTypes[i];
    if (type.code == known.code && type.bits == known.bits && type.lanes == 1) {
      return static_cast<Element>(i);
    }
  }
  return Element::kOther;
}

Element element_of(py::handle dtype) {
  const auto [entry, is_new] = torch().elements.try_emplace(dtype.ptr(), Element::kOther);
  if (is_new) {
    dtype.inc_ref();
    const std::string name = py::str(dtype);
    for (int i = 0; i < static_cast<int>(std::size(kElementNames)); ++i) {
      if (name == kElementNames[i]) entry->second = static_cast<Element>(i);
    }
  }
  return entry->second;
}

// The exchange table of DLPack's major version 1, or null.
const dlpack::Exchange* find_exchange(py::handle tensor_type) {
  const char* const wanted = std::getenv("FASTRNN_EXCHANGE");
  if (wanted != nullptr && std::strcmp(wanted, "attributes") == 0) return nullptr;
  if (wanted != nullptr && *wanted != '\0' && std::strcmp(wanted, "dlpack") != 0) {
    throw py::value_error(std::string("FASTRNN_EXCHANGE: expected dlpack or attributes, got '") +
                          wanted + "'");
  }
  constexpr const char* kAttribute = "__dlpack_c_exchange_api__";
  if (!py::hasattr(tensor_type, kAttribute)) return nullptr;
  const py::object capsule = tensor_type.attr(kAttribute);
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
  const auto* exchange = static_cast<const dlpack::Exchange*>(
      PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (exchange != nullptr && exchange->version.major != 1) exchange = exchange->previous;
  return exchange == nullptr || exchange->view == nullptr ? nullptr : exchange;
}

void set_python_error(void*, const char* kind, const char* message) {
  PyErr_SetString(std::strcmp(kind, "MemoryError") == 0 ? PyExc_MemoryError : PyExc_RuntimeError,
                  message);
}

bool is_contiguous(const dlpack::Tensor& tensor) {
  if (tensor.strides == nullptr) return true;
  if (std::find(tensor.shape, tensor.shape + tensor.dims, 0) != tensor.shape + tensor.dims) {
    return true;
  }
  int64_t expected = 1;
  for (int i = tensor.dims - 1; i >= 0; --i) {
    if (tensor.shape[i] != 1 && tensor.strides[i] != expected) return false;
    expected *= tensor.shape[i];
  }
  return true;
}

dlpack::Tensor read_table(py::handle object) {
  dlpack::Tensor given;
  if (torch().exchange->view(object.ptr(), &given) != 0) throw py::error_already_set();
  return given;
}
char* first_byte(const dlpack::Tensor& given) {
  return static_cast<char*>(given.data) + given.byte_offset;
}

Tensor view_by_table(py::handle object) {
  const dlpack::Tensor given = read_table(object);
  Tensor tensor;
  tensor.object = object;
  tensor.data = first_byte(given);
  for (int i = 0; i < given.dims; ++i) tensor.shape.push(given.shape[i]);
  tensor.element = element_of(given.dtype);
  tensor.device_type = given.device.type;
  tensor.device_index = given.device.index;
  tensor.is_contiguous = is_contiguous(given);
  return tensor;
}

Tensor view_by_attributes(py::handle object) {
  Tensor tensor;
  tensor.object = object;
  static const Method data_ptr("data_ptr"), is_contiguous("is_contiguous");
  static const Attribute shape("shape"), dtype("dtype"), is_cpu("is_cpu");
  tensor.data = PyLong_AsVoidPtr(data_ptr(object).ptr());
  if (PyErr_Occurred()) throw py::error_already_set();
  const py::object sizes = shape(object);  // a torch.Size, which is a tuple
  if (!PyTuple_Check(sizes.ptr())) throw py::type_error("shape: expected a tuple");
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(sizes.ptr()); ++i) {
    tensor.shape.push(PyLong_AsLongLong(PyTuple_GET_ITEM(sizes.ptr(), i)));
  }
  if (PyErr_Occurred()) throw py::error_already_set();
  tensor.element = element_of(dtype(object));
  tensor.device_type = dlpack::kCpu;
  if (!is_cpu.is_true(object)) {
    const py::object device = object.attr("device"), index = device.attr("index");
    // Some other number where it is neither: devices that differ need only differ here.
    tensor.device_type = object.attr("is_cuda").cast<bool>() ? int{dlpack::kCuda} : 100;
    tensor.device_index = index.is_none() ? 0 : index.cast<int>();
  }
  tensor.is_contiguous = is_contiguous.is_true(object);
  return tensor;
}

}  // namespace

void fail_with(const char* argument, std::initializer_list<std::string_view> texts) {
  std::string message = std::string(argument) + ": ";
  for (const std::string_view text : texts) message += text;
  throw py::value_error(message);
}

int64_t Shape::count() const {
  const int64_t* const end = sizes_ + std::min(dims_, kMaxDims);
  if (std::find(sizes_, end, 0) != end) return 0;  // however large the others are
  return std::accumulate(sizes_, end, int64_t{1}, std::multiplies<>{});
}

bool Shape::operator==(const Shape& other) const {
  if (dims_ != other.dims_ || dims_ > kMaxDims) return false;
  for (int i = 0; i < dims_; ++i) {
    if (sizes_[i] != other.sizes_[i]) return false;
  }
  return true;
}

std::string Shape::text() const {
  std::string text = "[";
  for (int i = 0; i < dims_ && i < kMaxDims; ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(sizes_[i]);
  }
  return text + (dims_ > kMaxDims ? ", ...]" : "]");
}

void set_torch(py::type tensor_type, py::type parameter_type, py::tuple watchers,
               py::object is_grad_enabled, py::object get_num_threads) {
  torch().exchange = find_exchange(tensor_type);
  torch().tensor_type = std::move(tensor_type);
  torch().parameter_type = std::move(parameter_type);
  torch().watchers.clear();
  for (const py::handle watcher : watchers) {
    torch().watchers.push_back(py::reinterpret_borrow<py::object>(watcher));
  }
  torch().is_grad_enabled = std::move(is_grad_enabled);
  torch().get_num_threads = std::move(get_num_threads);
}

const char* exchange_name() { return torch().exchange == nullptr ? "attributes" : "dlpack"; }

bool is_grad_enabled() { return torch().is_grad_enabled().ptr() == Py_True; }

int torch_threads() { return torch().get_num_threads().cast<int>(); }

bool is_tensor(py::handle object) {
  const py::object& type = torch().tensor_type;
  return type && PyObject_TypeCheck(object.ptr(), reinterpret_cast<PyTypeObject*>(type.ptr()));
}

bool is_watched() {
  for (const py::object& watcher : torch().watchers) {
    PyObject* const answer = PyObject_CallNoArgs(watcher.ptr());
    if (answer == nullptr) throw py::error_already_set();
    const bool watches = PyObject_IsTrue(answer) != 0;
    Py_DECREF(answer);
    if (watches) return true;
  }
  return false;
}

bool is_plain(py::handle object) {
  static const Method is_neg("is_neg");
  const py::handle type = reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
  return (type.is(torch().tensor_type) || type.is(torch().parameter_type)) &&
         !is_neg.is_true(object);
}

py::object Method::operator()(py::handle object) const {
  PyObject* const result = PyObject_CallMethodNoArgs(object.ptr(), name_);
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

py::object Method::call(std::span<PyObject* const> arguments) const {
  PyObject* const result =
      PyObject_VectorcallMethod(name_, arguments.data(), arguments.size(), nullptr);
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

py::object Attribute::operator()(py::handle object) const {
  PyObject* const result = PyObject_GetAttr(object.ptr(), name_);
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

Tensor view(py::handle object) {
  Tensor tensor = torch().exchange == nullptr ? view_by_attributes(object) : view_by_table(object);
  if (tensor.data == nullptr && tensor.shape.count() > 0) {
    throw py::value_error("expected a tensor with memory, got " + describe(object));
  }
  return tensor;
}

const void* address_of(py::handle object) {
  if (torch().exchange == nullptr) return view_by_attributes(object).data;
  return first_byte(read_table(object));
}

py::object make_tensor(const Tensor& like, const Shape& shape, Element element) {
  const dlpack::Exchange* const exchange = torch().exchange;
  if (exchange == nullptr) {
    py::tuple sizes(shape.dims());
    for (int i = 0; i < shape.dims(); ++i) sizes[i] = shape[i];
    if (element == like.element) return like.object.attr("new_empty")(sizes);
    for (const auto& [dtype, known] : torch().elements) {
      if (known == element)
        return like.object.attr("new_empty")(sizes, py::arg("dtype") = py::handle(dtype));
    }
    const py::object torch_module = py::module_::import("torch");
    const char* const name = kElementNames[static_cast<int>(element)] + std::strlen("torch.");
    return like.object.attr("new_empty")(sizes, py::arg("dtype") = torch_module.attr(name));
  }
  Shape sizes = shape;
  dlpack::Tensor prototype{};
  prototype.device = {static_cast<dlpack::DeviceType>(like.device_type), like.device_index};
  prototype.dims = shape.dims();
  prototype.dtype = kDataTypes[static_cast<int>(element)];
  prototype.shape = sizes.data();
  dlpack::Managed* managed = nullptr;
  void* object = nullptr;
  if (exchange->allocate(&prototype, &managed, nullptr, set_python_error) != 0 ||
      exchange->to_object(managed, &object) != 0) {
    throw py::error_already_set();
  }
  return py::reinterpret_steal<py::object>(static_cast<PyObject*>(object));
}

void* current_stream(const Tensor& tensor) {
  if (tensor.is_on_cpu()) return nullptr;
  const dlpack::Exchange* const exchange = torch().exchange;
  if (exchange != nullptr && exchange->current_stream != nullptr) {
    void* stream = nullptr;
    const auto type = static_cast<dlpack::DeviceType>(tensor.device_type);
    if (exchange->current_stream(type, tensor.device_index, &stream) != 0) {
      throw py::error_already_set();
    }
    return stream;
  }
  const py::object current = py::module_::import("torch.cuda").attr("current_stream");
  return PyLong_AsVoidPtr(current(tensor.object.attr("device")).attr("cuda_stream").ptr());
}

std::string describe(py::handle object) {
  if (!is_tensor(object)) return Py_TYPE(object.ptr())->tp_name;
  try {
    const py::object shape = py::module_::import("builtins").attr("list")(object.attr("shape"));
    return py::str("{} {} on {}").format(object.attr("dtype"), shape, object.attr("device"));
  } catch (const py::error_already_set&) {  // a nested tensor has no shape
    return Py_TYPE(object.ptr())->tp_name;
  }
}

std::string describe(Element element) {
  return element == Element::kOther ? "other" : kElementNames[static_cast<int>(element)];
}

}  // namespace fastrnn
