// The Python side of the kernels: plain numbers and pointers in, nothing of torch.
// python/fastrnn/_ops.py is the only caller and answers for the shapes; what C++ can check is
// checked here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cells/registry.h"
#include "scan.h"
#include "variant.h"
#include "workspace.h"

namespace py = pybind11;

namespace fastrnn {
namespace {

using Address = uintptr_t;
using Addresses = std::vector<Address>;  // one per direction

struct CellInfo {
  int index, gates;
  bool has_cell_state, has_extra, saves_gates;
};

py::dict cell_infos() {
  py::dict infos;
  for (int i = 0; i < Cells::size; ++i) {
    Cells::visit(i, [&](auto cell) {
      using Cell = decltype(cell);
      infos[Cell::mode] =
          CellInfo{i, Cell::gates, Cell::has_cell_state, Cell::has_extra, Cell::saves_gates};
    });
  }
  return infos;
}

// What `trait` says of the cell's type.
template <class Trait>
auto trait_of(int cell, Trait trait) {
  decltype(trait(Lstm{})) value{};
  Cells::visit(cell, [&](auto c) { value = trait(c); });
  return value;
}

int gates_of(int cell) {
  return trait_of(cell, [](auto c) { return decltype(c)::gates; });
}

template <class Pointer>
void set(Pointer (&target)[kMaxDirections], const Addresses& source, int directions) {
  if (source.size() != static_cast<size_t>(directions)) {
    throw std::invalid_argument("expected one tensor per direction, got " +
                                std::to_string(source.size()) + " for " +
                                std::to_string(directions));
  }
  for (size_t d = 0; d < source.size(); ++d) target[d] = reinterpret_cast<Pointer>(source[d]);
}

void* pointer(Address address) { return reinterpret_cast<void*>(address); }

template <class Pointer>
void set_optional(Pointer (&target)[kMaxDirections], const Addresses& source, int directions) {
  if (!source.empty()) set(target, source, directions);
}

template <class Args>
void set_input(Args& args, int64_t input, Address x) {
  if (input < 1) throw std::invalid_argument("sizes out of range");
  args.input = input;
  args.x = pointer(x);
}

// Sets the sizes that both passes share; `rows` is the N of the buffers.
template <class Args>
void set_shape(Args& args, int cell, int dtype, std::array<int64_t, 5> sizes, int64_t rows,
               Address batch_sizes, Address resets, bool reverse) {
  const auto [steps, batch, hidden, shown, directions] = sizes;
  if (cell < 0 || cell >= Cells::size) throw std::invalid_argument("unknown cell");
  if (dtype < 0 || dtype >= kDTypes) throw std::invalid_argument("unknown dtype");
  if (steps < 0 || batch < 0 || hidden < 1 || shown < 1 || directions < 1 ||
      directions > kMaxDirections || (reverse && directions != 1)) {
    throw std::invalid_argument("sizes out of range");
  }
  args.cell = cell;
  args.dtype = static_cast<DType>(dtype);
  args.steps = steps;
  args.batch = batch;
  args.hidden = hidden;
  args.proj = shown;
  args.directions = static_cast<int>(directions);
  args.batch_sizes = static_cast<const int64_t*>(pointer(batch_sizes));
  args.reverse = reverse;
  args.resets = static_cast<const bool*>(pointer(resets));

  int64_t expected = steps * batch;
  if (args.batch_sizes != nullptr) {
    expected = 0;
    int64_t alive = batch;
    for (int64_t t = 0; t < steps; ++t) {
      const int64_t next = args.batch_sizes[t];
      if (next < 0 || next > alive) {
        throw std::invalid_argument("batch_sizes must not increase and must lie in [0, " +
                                    std::to_string(batch) + "], got " + std::to_string(next) +
                                    " at step " + std::to_string(t));
      }
      alive = next;
      expected += next;
    }
  }
  if (rows != expected) {
    throw std::invalid_argument("expected buffers of " + std::to_string(expected) + " rows, got " +
                                std::to_string(rows));
  }
}

// Sets the weights that both passes share.
template <class Args>
void set_weights(Args& args, const Addresses& weight_ih, const Addresses& weight_hh,
                 const Addresses& weight_hr) {
  set(args.weight_ih, weight_ih, args.directions);
  set(args.weight_hh, weight_hh, args.directions);
  set_optional(args.weight_hr, weight_hr, args.directions);
  const bool has_direct_path =
      trait_of(args.cell, [](auto c) { return decltype(c)::has_direct_path; });
  if (weight_hr.empty() ? args.proj != args.hidden : has_direct_path) {
    throw std::invalid_argument("this cell and these sizes have no such projection");
  }
}

void forward(int cell, int dtype, std::array<int64_t, 5> sizes, int64_t rows, Address batch_sizes,
             Address resets, bool reverse, int64_t input, Address x, const Addresses& weight_ih,
             const Addresses& weight_hh, const Addresses& weight_hr, const Addresses& bias_ih,
             const Addresses& bias_hh, Address h_0, Address c_0, Address output, Address h_n,
             Address c_n, const Addresses& gates, Address extra, int threads,
             const py::args& checkpoint) {
  ForwardArgs args{};
  set_shape(args, cell, dtype, sizes, rows, batch_sizes, resets, reverse);
  set_input(args, input, x);
  set_weights(args, weight_ih, weight_hh, weight_hr);
  set_optional(args.bias_ih, bias_ih, args.directions);
  set_optional(args.bias_hh, bias_hh, args.directions);
  set_optional(args.gates, gates, args.directions);
  args.h_0 = pointer(h_0);
  args.c_0 = pointer(c_0);
  args.output = pointer(output);
  args.h_n = pointer(h_n);
  args.c_n = pointer(c_n);
  args.extra = pointer(extra);
  if (checkpoint.size() == 2) {  // checkpoint_every, boundaries
    args.checkpoint_every = checkpoint[0].cast<int64_t>();
    args.boundaries = pointer(checkpoint[1].cast<Address>());
  }
  const CpuVariant& variant = active_variant();
  py::gil_scoped_release release;
  const size_t sequence = rows * args.directions * args.hidden * size_of(args.dtype);
  prefer_large_pages(args.output, rows * args.directions * args.proj * size_of(args.dtype));
  prefer_large_pages(args.extra, sequence);
  for (int d = 0; d < args.directions; ++d) {
    prefer_large_pages(args.gates[d], gates_of(cell) * sequence / args.directions);
  }
  variant.forward(args, threads);
}

void backward(int cell, int dtype, std::array<int64_t, 5> sizes, int64_t rows, Address batch_sizes,
              Address resets, bool reverse, int64_t input, Address x, const Addresses& weight_ih,
              const Addresses& weight_hh, const Addresses& weight_hr, Address h_0, Address c_0,
              Address output, const Addresses& gates, Address extra, Address d_output,
              Address d_h_n, Address d_c_n, Address d_extra, Address d_x, Address d_h_0,
              Address d_c_0, const Addresses& d_weight_ih, const Addresses& d_weight_hh,
              const Addresses& d_weight_hr, const Addresses& d_bias_ih, const Addresses& d_bias_hh,
              int threads, const py::args& checkpoint) {
  BackwardArgs args{};
  set_shape(args, cell, dtype, sizes, rows, batch_sizes, resets, reverse);
  set_input(args, input, x);
  set_weights(args, weight_ih, weight_hh, weight_hr);
  set_optional(args.gates, gates, args.directions);
  set_optional(args.d_weight_ih, d_weight_ih, args.directions);
  set_optional(args.d_weight_hh, d_weight_hh, args.directions);
  set_optional(args.d_weight_hr, d_weight_hr, args.directions);
  set_optional(args.d_bias_ih, d_bias_ih, args.directions);
  set_optional(args.d_bias_hh, d_bias_hh, args.directions);
  if (!d_weight_hr.empty() && weight_hr.empty()) {
    throw std::invalid_argument("expected weight_hr with its gradient");
  }
  if (d_c_0 != 0 && !trait_of(cell, [](auto c) { return decltype(c)::has_cell_state; })) {
    throw std::invalid_argument("expected no gradient of c_0: this cell has no cell state");
  }
  args.h_0 = pointer(h_0);
  args.c_0 = pointer(c_0);
  args.output = pointer(output);
  args.extra = pointer(extra);
  args.d_output = pointer(d_output);
  args.d_h_n = pointer(d_h_n);
  args.d_c_n = pointer(d_c_n);
  args.d_extra = pointer(d_extra);
  args.d_x = pointer(d_x);
  args.d_h_0 = pointer(d_h_0);
  args.d_c_0 = pointer(d_c_0);
  if (checkpoint.size() == 4) {  // checkpoint_every, boundaries, bias_ih, bias_hh
    args.checkpoint_every = checkpoint[0].cast<int64_t>();
    args.boundaries = pointer(checkpoint[1].cast<Address>());
    set_optional(args.bias_ih, checkpoint[2].cast<Addresses>(), args.directions);
    set_optional(args.bias_hh, checkpoint[3].cast<Addresses>(), args.directions);
  }
  const CpuVariant& variant = active_variant();
  py::gil_scoped_release release;
  prefer_large_pages(args.d_x, args.directions * rows * input * size_of(args.dtype));
  // glibc maps buffers from 32 MiB on anew each time; smaller ones mostly come with their pages.
  constexpr size_t kMapped = size_t{32} << 20;
  const size_t column = gates_of(cell) * args.hidden * size_of(args.dtype);
  for (int d = 0; d < args.directions; ++d) {
    if (column * args.input >= kMapped)
      prefer_large_pages(args.d_weight_ih[d], column * args.input);
    if (column * args.proj >= kMapped) prefer_large_pages(args.d_weight_hh[d], column * args.proj);
  }
  variant.backward(args, threads);
}

}  // namespace
}  // namespace fastrnn

PYBIND11_MODULE(_cpu, m) {
  using namespace fastrnn;
  active_variant();  // a wrong FASTRNN_CPU fails the import, not the first call

  py::class_<CellInfo>(m, "CellInfo")
      .def_readonly("index", &CellInfo::index)
      .def_readonly("gates", &CellInfo::gates)
      .def_readonly("has_cell_state", &CellInfo::has_cell_state)
      .def_readonly("has_extra", &CellInfo::has_extra)
      .def_readonly("saves_gates", &CellInfo::saves_gates);
  m.attr("cells") = cell_infos();

  m.def("cpu_variant", [] { return std::string(active_variant().name); });
  m.def("cpu_variants", [] {
    int count = 0;
    const CpuVariant* const* variants = runnable_variants(&count);
    std::vector<std::string> names;
    for (int i = 0; i < count; ++i) names.emplace_back(variants[i]->name);
    return names;
  });
  m.def("forward", &forward);
  m.def("backward", &backward);
}
