#include "int8_layer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "../../cells/registry.h"

namespace fastrnn {

namespace {

// The items of a sequence of tensors.
std::vector<Tensor> tensors_of(const char* name, const py::tuple& items) {
  std::vector<Tensor> tensors;
  for (const py::handle item : items) {
    tensors.push_back(view_optional(name, item));
    if (!tensors.back()) fail(name, "expected tensors, got None");
  }
  return tensors;
}

py::tuple as_tuple(const char* name, py::handle sequence) {
  if (!PySequence_Check(sequence.ptr())) {
    fail(name, "expected a sequence of tensors, got ", describe(sequence));
  }
  PyObject* const items = PySequence_Tuple(sequence.ptr());
  if (items == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::tuple>(items);
}

void expect(const char* name, const Tensor& tensor, const Shape& shape, Element element) {
  if (tensor.shape == shape && tensor.element == element && tensor.is_on_cpu()) return;
  fail(name, "expected a ", describe(element), " tensor of shape ", shape.text(), " on cpu, got ",
       describe(tensor.object));
}

std::vector<float> values_of(const char* name, const Tensor& tensor, int64_t count) {
  expect(name, tensor, {count}, Element::kFloat32);
  Contiguous contiguous;
  const auto* values = static_cast<const float*>(contiguous(tensor));
  return {values, values + count};
}

}  // namespace

Int8Layer::Matrix Int8Layer::pack(const char* name, const Tensor& weight, const Tensor& scales,
                                  const Int8Shape& shape) {
  const int64_t rows = shape.gates * shape.columns;
  expect(name, weight, {rows, shape.depth}, Element::kInt8);
  if (shape.depth > kMaxInt8Depth) {
    fail(name, "expected at most ", std::to_string(kMaxInt8Depth), " columns, got ",
         std::to_string(shape.depth));
  }
  Contiguous contiguous;
  const auto* integers = static_cast<const int8_t*>(contiguous(weight));
  if (std::find(integers, integers + rows * shape.depth, int8_t{-128}) !=
      integers + rows * shape.depth) {
    fail(name, "expected integers in [-127, 127], got -128");
  }
  const std::vector<float> of_rows = values_of("scales", scales, rows);
  for (const float scale : of_rows) {
    if (!(scale >= 0) || !std::isfinite(scale)) {
      fail("scales", "expected finite numbers, 0 or more, got ", std::to_string(scale));
    }
  }
  Matrix matrix;
  matrix.shape = shape;
  matrix.bytes = active_int8_kernels().packed_bytes(shape);
  matrix.packed = allocate(matrix.bytes);
  active_int8_kernels().pack(shape, integers, of_rows.data(), matrix.packed.get());
  return matrix;
}

Int8Layer::Int8Layer(py::handle mode, int directions, py::handle weights, py::handle scales)
    : PackedLayer(ScanShape{}) {
  shape_.cell = find_cell(mode);
  shape_.dtype = DType::kFloat32;
  if (shape_.cell >= Cells::size) {
    fail("mode", "expected a built-in cell, got ", cell_traits(shape_.cell).mode);
  }
  if (directions < 1 || directions > kMaxDirections) {
    fail("directions", "expected 1 or 2, got ", std::to_string(directions));
  }
  shape_.directions = directions;
  const CellTraits& traits = cell_traits(shape_.cell);
  const py::tuple weight_items = as_tuple("weights", weights),
                  scale_items = as_tuple("scales", scales);
  const std::vector<Tensor> given = tensors_of("weights", weight_items);
  const std::vector<Tensor> given_scales = tensors_of("scales", scale_items);
  expect_weights(traits, given.size(), directions);
  const size_t each = given.size() / directions;
  const bool has_biases = each > 3, projects = each % 2 == 1;
  if (projects && !traits.can_project()) {
    fail("weight_hr", "expected None for ", traits.mode, ", which has no projection, got ",
         describe(given[each - 1].object));
  }
  const size_t matrices = projects ? 3 : 2;
  if (given_scales.size() != matrices * directions) {
    fail("scales", "expected ", std::to_string(matrices * directions), " tensors, got ",
         std::to_string(given_scales.size()));
  }
  const Shape &ih = given[0].shape, &hh = given[1].shape;
  if (ih.dims() != 2 || ih[0] < 1 || ih[1] < 1 || ih[0] % traits.gates != 0) {
    fail("weight_ih", "expected [", std::to_string(traits.gates), " * H, I], got ", ih.text());
  }
  if (hh.dims() != 2 || hh[1] < 1) fail("weight_hh", "expected two dimensions, got ", hh.text());
  const int64_t hidden = ih[0] / traits.gates, proj = projects ? hh[1] : hidden;
  shape_.input = ih[1];
  shape_.hidden = hidden;
  shape_.proj = proj;
  for (int d = 0; d < directions; ++d) {
    const Tensor* const weight = given.data() + d * each;
    const Tensor* const scale = given_scales.data() + d * matrices;
    Direction& own = direction_[d];
    own.ih = pack("weight_ih", weight[0], scale[0], {hidden, traits.gates, shape_.input});
    own.hh = pack("weight_hh", weight[1], scale[1], {hidden, traits.gates, proj});
    if (has_biases) {
      own.bias_ih = values_of("bias_ih", weight[2], traits.gates * hidden);
      own.bias_hh = values_of("bias_hh", weight[3], traits.gates * hidden);
    }
    if (projects) own.hr = pack("weight_hr", weight[each - 1], scale[2], {proj, 1, hidden});
  }
  like_ = py::reinterpret_borrow<py::object>(given_scales[0].object);
}

void Int8Layer::run(ForwardArgs args, int threads) const {
  args.traits = &cell_traits(args.cell);
  for (int d = 0; d < shape_.directions; ++d) {
    const Direction& own = direction_[d];
    args.weight_ih[d] = own.ih.packed.get();
    args.weight_hh[d] = own.hh.packed.get();
    args.weight_hr[d] = own.hr.packed.get();
    args.bias_ih[d] = own.bias_ih.empty() ? nullptr : own.bias_ih.data();
    args.bias_hh[d] = own.bias_hh.empty() ? nullptr : own.bias_hh.data();
  }
  active_int8_kernels().forward(args, threads);
}

py::object Int8Layer::new_tensor(const Shape& shape, Element element) const {
  return make_tensor(view(like_), shape, element);
}

// Calls take(weight, scales) with new tensors for each matrix, and take(bias, None).
template <class Take>
void Int8Layer::unpack(const Take& take) const {
  const auto take_matrix = [&](const Matrix& matrix) {
    const int64_t rows = matrix.shape.gates * matrix.shape.columns;
    const py::object weight = new_tensor({rows, matrix.shape.depth}, Element::kInt8);
    const py::object scales = new_tensor({rows}, Element::kFloat32);
    active_int8_kernels().unpack(matrix.shape, matrix.packed.get(),
                                 static_cast<int8_t*>(view(weight).data),
                                 static_cast<float*>(view(scales).data));
    take(weight, scales);
  };
  const auto take_bias = [&](const std::vector<float>& bias) {
    const auto size = static_cast<int64_t>(bias.size());
    const py::object copy = new_tensor({size}, Element::kFloat32);
    std::memcpy(view(copy).data, bias.data(), bias.size() * sizeof(float));
    take(copy, py::none());
  };
  for (int d = 0; d < shape_.directions; ++d) {
    const Direction& own = direction_[d];
    take_matrix(own.ih);
    take_matrix(own.hh);
    if (!own.bias_ih.empty()) {
      take_bias(own.bias_ih);
      take_bias(own.bias_hh);
    }
    if (own.hr.packed != nullptr) take_matrix(own.hr);
  }
}

py::tuple Int8Layer::weights() const {
  py::list list;
  unpack([&](const py::object& weight, const py::object&) { list.append(weight); });
  return list;
}

py::tuple Int8Layer::scales() const {
  py::list list;
  unpack([&](const py::object&, const py::object& scales) {
    if (!scales.is_none()) list.append(scales);
  });
  return list;
}

int64_t Int8Layer::bytes() const {
  int64_t sum = 0;
  for (const Direction& own : direction_) {
    sum += own.ih.bytes + own.hh.bytes + own.hr.bytes;
    sum += static_cast<int64_t>((own.bias_ih.size() + own.bias_hh.size()) * sizeof(float));
  }
  return sum;
}

}  // namespace fastrnn
