#include "state_type.h"

#include <exception>
#include <new>
#include <utility>

namespace fastrnn {

namespace {

struct StateObject {
  PyObject_HEAD PackedState* state;
};

PyTypeObject* state_type = nullptr;  // never freed

const PackedState& state_of(PyObject* self) { return *reinterpret_cast<StateObject*>(self)->state; }

// What a function returns that may throw; or null, and Python's error is set.
template <class Function>
PyObject* call(Function function) noexcept {
  try {
    return py::object(function()).release().ptr();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

PyObject* step(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 2) {
    PyErr_Format(PyExc_TypeError, "step: expected x and mask, got %zd arguments", count);
    return nullptr;
  }
  return call([&] { return state_of(self).step(arguments[0], arguments[1]); });
}

PyObject* run(PyObject* self, PyObject* x) {
  return call([&] { return state_of(self).run(x); });
}

PyObject* tensors(PyObject* self, PyObject*) {
  return call([&] { return state_of(self).tensors(); });
}

PyObject* h(PyObject* self, PyObject* layer) {
  return call([&] { return state_of(self).h(py::cast<int64_t>(py::handle(layer))); });
}

PyObject* batch(PyObject* self, void*) { return PyLong_FromLongLong(state_of(self).batch()); }

PyObject* is_batched(PyObject* self, void*) {
  return PyBool_FromLong(static_cast<long>(state_of(self).is_batched()));
}

void deallocate(PyObject* self) {
  PyTypeObject* const type = Py_TYPE(self);
  delete reinterpret_cast<StateObject*>(self)->state;
  type->tp_free(self);
  Py_DECREF(type);
}

PyMethodDef methods[] = {
    {"step", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(step)), METH_FASTCALL,
     "step($self, x, mask, /)\n--\n\nThe state after x, or None."},
    {"run", run, METH_O,
     "run($self, x, /)\n--\n\nThe outputs over x and the state after, or None."},
    {"tensors", tensors, METH_NOARGS, "tensors($self, /)\n--\n\nh and c, None without a c."},
    {"h", h, METH_O, "h($self, layer, /)\n--\n\nh of one layer."},
    {nullptr, nullptr, 0, nullptr},
};

PyGetSetDef properties[] = {
    {"batch", batch, nullptr, nullptr, nullptr},
    {"is_batched", is_batched, nullptr, nullptr, nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

PyType_Slot slots[] = {
    {Py_tp_dealloc, reinterpret_cast<void*>(deallocate)},
    {Py_tp_methods, methods},
    {Py_tp_getset, properties},
    {0, nullptr},
};

PyType_Spec spec{"fastrnn._cpu.PackedState", sizeof(StateObject), 0,
                 Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots};

}  // namespace

void add_state_type(py::module_& m) {
  PyObject* const type = PyType_FromSpec(&spec);
  if (type == nullptr) throw py::error_already_set();
  state_type = reinterpret_cast<PyTypeObject*>(type);
  m.attr("PackedState") = py::handle(type);
}

py::object to_python(std::unique_ptr<PackedState> state) {
  PyObject* const self = state_type->tp_alloc(state_type, 0);
  if (self == nullptr) throw py::error_already_set();
  reinterpret_cast<StateObject*>(self)->state = state.release();
  return py::reinterpret_steal<py::object>(self);
}

}  // namespace fastrnn
