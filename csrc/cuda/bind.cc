// The Python side of the CUDA kernels, and, in the tests, of the same kernels on a CPU: plain
// numbers and addresses in, nothing of torch. python/fastrnn/_cuda_ops.py is the only caller and
// answers for shapes, dtypes and devices.
#include <pybind11/native_enum.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "../cells/registry.h"
#include "device.h"
#include "scan.h"

namespace py = pybind11;

namespace fastrnn::cuda {
namespace {

using Address = uintptr_t;
using Addresses = std::vector<Address>;  // one per direction

template <class T>
void set(T*& target, Address address) {
  target = reinterpret_cast<T*>(address);
}
template <class Pointer>
void set(Pointer (&target)[kMaxDirections], const Addresses& source) {
  if (source.size() > kMaxDirections) throw std::invalid_argument("too many directions");
  for (size_t d = 0; d < source.size(); ++d) target[d] = reinterpret_cast<Pointer>(source[d]);
}

Problem make_problem(bool backward, int cell, int dtype, int64_t steps, int64_t batch,
                     int64_t hidden, int directions, bool reverse, bool tf32) {
  if (cell < 0 || cell >= Cells::size || dtype < 0 || dtype >= kDTypes || steps < 0 || batch < 0 ||
      hidden < 1 || directions < 1 || directions > kMaxDirections || (reverse && directions > 1)) {
    throw std::invalid_argument("sizes out of range");
  }
  int gates = 0;
  Cells::visit(cell, [&](auto c) { gates = decltype(c)::gates; });
  return {backward ? Pass::kBackward : Pass::kForward,
          gates,
          static_cast<DType>(dtype),
          steps,
          batch,
          hidden,
          directions,
          reverse,
          tf32};
}

// Where a scan runs: device, stream, plan, workspace.
Cuda enter(const Problem& problem, int device, Address stream, const Plan& plan,
           Address workspace) {
  if (!is_possible(problem, device_info(device), plan)) {
    throw std::invalid_argument("this plan cannot run this problem on this device");
  }
  set_device(device);
  return {reinterpret_cast<void*>(stream), plan, reinterpret_cast<void*>(workspace)};
}

template <class Args>
void set_rows(Args& args, const Problem& problem, int64_t total, Address place,
              const Addresses& before, Address lengths, const Addresses& weight_hh) {
  args.problem = problem;
  args.total = total;
  set(args.places.place, place);
  set(args.places.before, before);
  set(args.places.lengths, lengths);
  set(args.weight_hh, weight_hh);
}

void forward(int cell, const Problem& problem, const Plan& plan, int device, Address stream,
             Address workspace, int64_t total, Address place, const Addresses& before,
             Address lengths, const Addresses& weight_hh, const Addresses& bias_hh, Address h_0,
             Address c_0, Address gates, bool keep, Address output, Address h_n, Address c_n,
             Address extra) {
  ForwardArgs args{};
  set_rows(args, problem, total, place, before, lengths, weight_hh);
  set(args.bias_hh, bias_hh);
  set(args.h_0, h_0);
  set(args.c_0, c_0);
  set(args.gates, gates);
  args.keep = keep;
  set(args.output, output);
  set(args.h_n, h_n);
  set(args.c_n, c_n);
  set(args.extra, extra);
  py::gil_scoped_release release;
  const Cuda where = enter(problem, device, stream, plan, workspace);
  Cells::visit(cell, [&](auto c) { forward_dev_impl<Cuda, decltype(c)>(where, args); });
}

void backward(int cell, const Problem& problem, const Plan& plan, int device, Address stream,
              Address workspace, int64_t total, Address place, const Addresses& before,
              Address lengths, const Addresses& weight_hh, Address h_0, Address c_0, Address output,
              Address gates, Address extra, Address d_output, Address d_h_n, Address d_c_n,
              Address d_extra, Address d_gates, Address d_recurrent, Address d_h_0, Address d_c_0) {
  BackwardArgs args{};
  set_rows(args, problem, total, place, before, lengths, weight_hh);
  set(args.h_0, h_0);
  set(args.c_0, c_0);
  set(args.output, output);
  set(args.gates, gates);
  set(args.extra, extra);
  set(args.d_output, d_output);
  set(args.d_h_n, d_h_n);
  set(args.d_c_n, d_c_n);
  set(args.d_extra, d_extra);
  set(args.d_gates, d_gates);
  set(args.d_recurrent, d_recurrent);
  set(args.d_h_0, d_h_0);
  set(args.d_c_0, d_c_0);
  py::gil_scoped_release release;
  const Cuda where = enter(problem, device, stream, plan, workspace);
  Cells::visit(cell, [&](auto c) { backward_dev_impl<Cuda, decltype(c)>(where, args); });
}

}  // namespace
}  // namespace fastrnn::cuda

PYBIND11_MODULE(FASTRNN_MODULE, m) {
  using namespace fastrnn::cuda;
  py::native_enum<Kind>(m, "Kind", "enum.IntEnum")
      .value("STEP", Kind::kStep)
      .value("GRID", Kind::kGrid)
      .value("CLUSTER", Kind::kCluster)
      .finalize();

  py::class_<DeviceInfo>(m, "DeviceInfo")
      .def(py::init<int, int64_t, int>(), py::arg("processors"), py::arg("shared"),
           py::arg("capability"))
      .def_readonly("processors", &DeviceInfo::processors)
      .def_readonly("shared", &DeviceInfo::shared)
      .def_readonly("capability", &DeviceInfo::capability);

  py::class_<Problem>(m, "Problem")
      .def(py::init(&make_problem), py::arg("backward"), py::arg("cell"), py::arg("dtype"),
           py::arg("steps"), py::arg("batch"), py::arg("hidden"), py::arg("directions"),
           py::arg("reverse"), py::arg("tf32"));

  py::class_<Plan>(m, "Plan")
      .def(py::init<Kind, int, int, int, int, bool, bool>(), py::arg("kind"), py::arg("units"),
           py::arg("rows"), py::arg("slices"), py::arg("cluster"), py::arg("resident"),
           py::arg("tensor"))
      .def_readonly("kind", &Plan::kind)
      .def_readonly("units", &Plan::units)
      .def_readonly("rows", &Plan::rows)
      .def_readonly("slices", &Plan::slices)
      .def_readonly("cluster", &Plan::cluster)
      .def_readonly("resident", &Plan::resident)
      .def_readonly("tensor", &Plan::tensor)
      .def("workspace",
           [](const Plan& plan, const Problem& problem) { return Layout(problem, plan).workspace; })
      .def("shared",
           [](const Plan& plan, const Problem& problem) { return Layout(problem, plan).shared; })
      .def("blocks", [](const Plan& plan, const Problem& problem) {
        return Layout(problem, plan).blocks(problem.directions);
      });

  m.def("make_plan", &make_plan, py::arg("problem"), py::arg("device"),
        py::arg("kind") = py::none());
  m.def("is_possible", &is_possible, py::arg("problem"), py::arg("device"), py::arg("plan"));
  m.def("splits_gradient", [](int cell) {
    bool splits = false;
    fastrnn::Cells::visit(cell, [&](auto c) { splits = decltype(c)::splits_gradient; });
    return splits;
  });
  m.def("device_info", &device_info, py::arg("device"));
  m.def("upload", [](int device, Address stream, Address values, int64_t count, Address to) {
    py::gil_scoped_release release;
    set_device(device);
    upload(reinterpret_cast<const int64_t*>(values), count, reinterpret_cast<int64_t*>(to),
           reinterpret_cast<void*>(stream));
  });
  m.attr("built_for") = built_for();
  m.def("forward", &forward);
  m.def("backward", &backward);
}
