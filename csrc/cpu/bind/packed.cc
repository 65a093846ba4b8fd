#include "packed.h"

#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "../../cells/registry.h"
#include "../variant.h"
#include "../workspace.h"
#include "inspector.h"
#include "modules.h"
#include "state_type.h"

namespace fastrnn {

namespace {

// Below so many multiply-adds a step, to let other Python threads run takes too long; and below so
// many, no plan takes a second thread, so that torch need not be asked for how many there are.
constexpr int64_t kShort = int64_t{1} << 19, kAlone = int64_t{1} << 16;

// In the order in which the tiles of the active variant read them.
class PackedTiles : public PackedLayer {
 public:
  PackedTiles(const LayerCall& layer, Storage storage)
      : PackedLayer(layer.shape),
        variant_(active_variant(layer.shape.dtype)),
        loops_(loops_of(layer.cell, layer.shape.dtype)),
        storage_(storage),
        layer_norm_(layer.layer_norm) {
    Contiguous contiguous;
    ForwardArgs args{};
    set_layer(args, layer, contiguous);
    args.steps = args.batch = 0;
    args.batch_sizes = nullptr;
    args.storage = storage;
    bytes_ = variant_.pack(args, nullptr);
    memory_ = allocate(bytes_);
    variant_.pack(args, memory_.get());
    const CellTraits& traits = layer.traits();
    const int64_t gates = traits.gates * args.hidden, recurrent = traits.recurrent * args.hidden;
    for (int d = 0; d < args.directions; ++d) {
      has_hr_ = args.weight_hr[d] != nullptr;
      vectors_.push_back(copy(args.bias_ih[d], gates));
      vectors_.push_back(copy(args.bias_hh[d], recurrent));
      const std::vector<int64_t> sizes = layer.vector_sizes();
      for (size_t q = 0; q < sizes.size(); ++q) {
        parameters_[d].push_back(copy(args.parameters[d][q], sizes[q]));
        pointers_[d].push_back(parameters_[d].back().data());
      }
    }
  }

  void run(ForwardArgs args, int threads) const override {
    set(args);
    variant_.forward(args, threads);
  }

  bool set_weights(ForwardArgs& args) const override {
    set(args);
    return storage_ == Storage::kOwn;
  }

  int64_t bytes() const override { return bytes_; }

 private:
  void set(ForwardArgs& args) const {
    args.traits = &cell_traits(args.cell);
    args.loops = loops_;
    args.packed = memory_.get();
    args.storage = storage_;
    args.layer_norm = layer_norm_;
    const auto data = [](const std::vector<char>& vector) -> const void* {
      return vector.empty() ? nullptr : vector.data();
    };
    for (int d = 0; d < args.directions; ++d) {
      args.weight_ih[d] = args.weight_hh[d] = memory_.get();
      args.weight_hr[d] = has_hr_ ? memory_.get() : nullptr;
      args.bias_ih[d] = data(vectors_[2 * d]);
      args.bias_hh[d] = data(vectors_[2 * d + 1]);
      args.parameters[d] = pointers_[d].data();
    }
  }

  const CpuVariant& variant_;
  const void* const loops_;
  const Storage storage_;
  const bool layer_norm_;
  int64_t bytes_;
  Memory memory_;
  bool has_hr_ = false;
  std::vector<std::vector<char>> vectors_;  // of each direction both biases, perhaps empty
  std::vector<std::vector<char>> parameters_[kMaxDirections];
  std::vector<const void*> pointers_[kMaxDirections];

  std::vector<char> copy(const void* from, int64_t count) const {
    if (from == nullptr) return {};
    const char* const bytes = static_cast<const char*>(from);
    return {bytes, bytes + count * size_of(shape().dtype)};
  }
};

int64_t version_of(py::handle tensor) {
  static const Attribute version("_version");
  try {
    return PyLong_AsLongLong(version(tensor).ptr());
  } catch (py::error_already_set& error) {  // tensors of inference mode have none
    if (!error.matches(PyExc_RuntimeError)) throw;
    return -1;
  }
}

py::handle item_of(const py::dict& dict, const char* name) {
  PyObject* const item = PyDict_GetItemString(dict.ptr(), name);
  if (item == nullptr) {
    throw py::value_error(std::string("module: expected a module's __dict__, got one without ") +
                          name);
  }
  return item;
}

// The work of one step, in multiply-adds.
int64_t work_of(const ScanShape& shape) {
  return cell_traits(shape.cell).gates * shape.hidden * (shape.input + shape.proj);
}

// Whether a step takes more than x and states.
bool has_inputs(const ScanShape& shape) { return cell_traits(shape.cell).inputs > 0; }

// The memory of h and c, null for None; false where one has other sizes. No features: none is
// taken.
bool read_states(const py::handle (&objects)[2], const Shape (&sizes)[2], Contiguous& contiguous,
                 const char* (&states)[2]) {
  for (int i = 0; i < 2; ++i) {
    if (objects[i].is_none()) continue;
    const Tensor state = view(objects[i]);
    if (!(state.shape == sizes[i]) || sizes[i][sizes[i].dims() - 1] == 0) return false;
    states[i] = static_cast<const char*>(contiguous(state));
  }
  return true;
}

// module["name"], or null.
class Entry {
 public:
  explicit Entry(const char* name) : name_(PyUnicode_InternFromString(name)) {}
  PyObject* of(py::handle dict) const { return PyDict_GetItemWithError(dict.ptr(), name_); }
  bool is_true_in(py::handle dict) const {
    PyObject* const value = of(dict);
    return value != nullptr && PyObject_IsTrue(value) == 1;
  }

 private:
  PyObject* const name_;
};

template <class Byte>
Byte* at(Byte* memory, int64_t offset) {
  return memory == nullptr ? nullptr : memory + offset;
}

void run(const PackedLayer& layer, const ForwardArgs& args) {
  const int64_t work = work_of(args) * args.batch * args.steps;
  const int threads = work < kAlone ? 1 : torch_threads();
  if (work < kShort) return layer.run(args, threads);
  py::gil_scoped_release release;
  layer.run(args, threads);
}

}  // namespace

Memory allocate(int64_t bytes) {
  constexpr int64_t kLine = 64, kLargePage = int64_t{2} << 20;
  const int64_t alignment = bytes >= 2 * kLargePage ? kLargePage : kLine;
  const int64_t rounded = (bytes + alignment - 1) / alignment * alignment;
  Memory memory(static_cast<char*>(std::aligned_alloc(alignment, rounded)));
  if (memory == nullptr) throw std::bad_alloc();
  prefer_large_pages(memory.get(), rounded);
  return memory;
}

std::shared_ptr<PackedLayer> pack(const LayerCall& layer, const std::string& storage) {
  if (storage == "own") return std::make_shared<PackedTiles>(layer, Storage::kOwn);
  if (storage == "bfloat16" && layer.element() == Element::kFloat32) {
    return std::make_shared<PackedTiles>(layer, Storage::kBFloat16);
  }
  throw py::value_error("storage: expected own, or bfloat16 for torch.float32, got " + storage +
                        " for " + describe(layer.element()));
}

Results forward(py::handle record, const PackedLayer& packed) {
  const LayerCall layer = read_layer(record, packed.shape());
  if (layer.keep) throw py::value_error("keep: expected False of packed weights, got True");
  return forward(layer, [&](const ForwardArgs& args, int threads) { packed.run(args, threads); });
}

PackedModel::PackedModel(std::vector<std::shared_ptr<PackedLayer>> layers, const py::dict& module,
                         const py::list& parameters)
    : layers_(std::move(layers)) {
  if (layers_.empty() || parameters.empty()) {
    throw py::value_error("layers, parameters: expected at least one of each, got " +
                          std::to_string(layers_.size()) + " and " +
                          std::to_string(parameters.size()));
  }
  for (const py::handle tensor : parameters) {
    watched_.push_back(
        {py::reinterpret_borrow<py::object>(tensor), view(tensor).data, version_of(tensor)});
  }
  const auto own = py::reinterpret_borrow<py::dict>(item_of(module, "_parameters"));
  for (const auto& [name, tensor] : own) {
    named_.push_back(
        {py::reinterpret_borrow<py::object>(name), py::reinterpret_borrow<py::object>(tensor)});
  }
  if (PyObject* const flat = PyDict_GetItemString(module.ptr(), "_flat_weights")) {
    for (const py::handle tensor : py::reinterpret_borrow<py::list>(flat)) {
      listed_.push_back(py::reinterpret_borrow<py::object>(tensor));
    }
  }
}

bool PackedModel::is_current(const py::dict& module) const {
  static const Entry parameters("_parameters"), flat_weights("_flat_weights");
  PyObject* const own = parameters.of(module);
  if (own == nullptr || !PyDict_Check(own) ||
      PyDict_GET_SIZE(own) != static_cast<Py_ssize_t>(named_.size())) {
    return false;
  }
  for (const Named& each : named_) {
    if (PyDict_GetItemWithError(own, each.name.ptr()) != each.tensor.ptr()) return false;
  }
  if (!listed_.empty()) {
    PyObject* const listed = flat_weights.of(module);
    const auto size = static_cast<Py_ssize_t>(listed_.size());
    if (listed == nullptr || !PyList_Check(listed) || PyList_GET_SIZE(listed) != size) return false;
    for (Py_ssize_t i = 0; i < size; ++i) {
      if (PyList_GET_ITEM(listed, i) != listed_[i].ptr()) return false;
    }
  }
  for (const Watched& each : watched_) {
    if (address_of(each.tensor) != each.data || version_of(each.tensor) != each.version) {
      return false;
    }
  }
  return true;
}

std::optional<Zoneouts> PackedModel::zoneouts(const py::dict& module) const {
  static const Entry options_of("_options"), dropout("dropout"), training("training");
  static const Entry zoneout_of("zoneout");
  PyObject* const options = options_of.of(module);
  const bool has_options = options != nullptr && PyDict_Size(options) > 0;
  const bool drops = layers_.size() > 1 && dropout.is_true_in(module);
  if ((has_options || drops) && training.is_true_in(module)) return std::nullopt;
  PyObject* const zoneout = has_options ? zoneout_of.of(options) : nullptr;
  if (zoneout == nullptr) return Zoneouts{};
  if (PyTuple_Check(zoneout)) {
    return Zoneouts{PyFloat_AsDouble(PyTuple_GET_ITEM(zoneout, 0)),
                    PyFloat_AsDouble(PyTuple_GET_ITEM(zoneout, 1))};
  }
  const double p = PyFloat_AsDouble(zoneout);
  return Zoneouts{p, cell_traits(layers_[0]->shape().cell).rebuilds_cell_state ? p : 0};
}

int64_t PackedModel::bytes() const {
  int64_t sum = 0;
  for (const auto& layer : layers_) sum += layer->bytes();
  return sum;
}

py::object PackedModel::step(const py::dict& module, py::handle x, py::handle h,
                             py::handle c) const {
  const PackedLayer& layer = *layers_[0];
  const ScanShape& shape = layer.shape();
  const int64_t cells = cell_traits(shape.cell).states * shape.hidden;
  Inspector inspector;
  for (const py::handle tensor : {x, h, c}) inspector.add(tensor);
  if (inspector.call() != Call::kPlain || has_inputs(shape)) return py::none();
  const Tensor given = inspector.tensors()[0];
  const int dims = given.shape.dims();
  if (given.element != element_of(shape.dtype) || dims < 1 || dims > 2 ||
      given.shape[dims - 1] != shape.input) {
    return py::none();
  }
  const int64_t batch = dims == 2 ? given.shape[0] : 1;
  const auto sizes = [&](int64_t features) {
    return dims == 2 ? Shape{batch, features} : Shape{features};
  };
  Contiguous contiguous;
  const char* states[2] = {};
  if (!read_states({h, c}, {sizes(shape.proj), sizes(cells)}, contiguous, states)) {
    return py::none();
  }
  if (!is_current(module)) return py::none();
  const py::object h_n = make_tensor(given, sizes(shape.proj), given.element);
  const py::object c_n =
      cells > 0 ? make_tensor(given, sizes(cells), given.element) : py::object(py::none());
  thread_local std::vector<char> unused;  // T = 1: output and h_n are the same
  unused.resize(batch * shape.proj * size_of(shape.dtype));
  ForwardArgs args{};
  static_cast<ScanShape&>(args) = shape;
  args.steps = batch == 0 ? 0 : 1;
  args.batch = batch;
  args.x = contiguous(given);
  args.h_0 = states[0];
  args.c_0 = states[1];
  args.output = unused.data();
  args.h_n = view(h_n).data;
  args.c_n = cells > 0 ? view(c_n).data : nullptr;
  fastrnn::run(layer, args);
  return py::make_tuple(h_n, c_n);
}

py::object PackedModel::run_layers(const Tensor& x, int64_t steps, int64_t batch,
                                   const Shape& outputs, const Zoneouts& zoneouts, const char* h_0,
                                   const char* c_0, char* h_n, char* c_n) const {
  Contiguous contiguous;
  const void* from = contiguous(x);
  std::vector<py::object> made;      // of each layer, what the next one reads
  std::vector<ForwardArgs> waiting;  // for others, to run side by side
  StackPlan plan;
  for (size_t k = 0; k < layers_.size(); ++k) {
    const PackedLayer& layer = *layers_[k];
    ForwardArgs args{};
    static_cast<ScanShape&>(args) = layer.shape();
    const int64_t entries = args.directions * batch * size_of(args.dtype);
    const int64_t h = k * entries * args.proj;
    const int64_t c = k * entries * args.hidden * cell_traits(args.cell).states;
    Shape shape = outputs;
    shape.push(args.directions * args.proj);
    // One after the other, the outputs of two layers are enough.
    if (waiting.empty() && k > 1) made.erase(made.begin());
    made.push_back(make_tensor(x, shape, x.element));
    args.steps = batch == 0 ? 0 : steps;
    args.batch = batch;
    args.x = from;
    args.h_0 = at(h_0, h);
    args.c_0 = at(c_0, c);
    args.output = view(made.back()).data;
    args.h_n = h_n + h;
    args.c_n = at(c_n, c);
    zoneouts.set(args);
    prefer_large_pages(args.output, shape.count() * size_of(args.dtype));
    from = args.output;
    if (k == 0 && steps > 1 && layers_.size() > 1 && layer.set_weights(args)) {
      plan = plan_stack(args, nullptr, static_cast<int>(layers_.size()));
    }
    if (plan.threads > 1) {
      layer.set_weights(args);
      waiting.push_back(args);
    } else {
      fastrnn::run(layer, args);
    }
  }
  if (!waiting.empty()) run_forward(waiting, plan);
  return made.back();
}

py::object PackedModel::run(const py::dict& module, py::handle x, py::handle h,
                            py::handle c) const {
  const ScanShape& shape = layers_[0]->shape();
  Inspector inspector;
  for (const py::handle tensor : {x, h, c}) inspector.add(tensor);
  if (inspector.call() != Call::kPlain || has_inputs(shape)) return py::none();
  const Tensor given = inspector.tensors()[0];
  if (given.element != element_of(shape.dtype) || given.shape.dims() != 3 ||
      given.shape.count() == 0 || given.shape[2] != shape.input) {
    return py::none();
  }
  const int64_t steps = given.shape[0], batch = given.shape[1];
  const int64_t entries = static_cast<int64_t>(layers_.size()) * shape.directions;
  const int64_t cells = cell_traits(shape.cell).states * shape.hidden;
  const auto sizes = [&](int64_t features) { return Shape{entries, batch, features}; };
  Contiguous contiguous;
  const char* states[2] = {};
  if (!read_states({h, c}, {sizes(shape.proj), sizes(cells)}, contiguous, states)) {
    return py::none();
  }
  const std::optional<Zoneouts> zoneouts = this->zoneouts(module);
  if (!zoneouts || !is_current(module)) return py::none();
  const py::object h_n = make_tensor(given, sizes(shape.proj), given.element);
  const py::object c_n =
      cells > 0 ? make_tensor(given, sizes(cells), given.element) : py::object(py::none());
  const py::object output = run_layers(given, steps, batch, {steps, batch}, *zoneouts, states[0],
                                       states[1], static_cast<char*>(view(h_n).data),
                                       cells > 0 ? static_cast<char*>(view(c_n).data) : nullptr);
  return py::make_tuple(output, h_n, c_n);
}

int64_t PackedState::cells() const { return cell_traits(shape().cell).states * shape().hidden; }
int64_t PackedState::h_bytes() const { return batch_ * shape().proj * size_of(shape().dtype); }
int64_t PackedState::c_bytes() const { return batch_ * cells() * size_of(shape().dtype); }

PackedState::PackedState(std::shared_ptr<const PackedModel> model, py::dict module, int64_t batch,
                         bool is_batched, py::handle h, py::handle c)
    : model_(std::move(model)),
      module_(std::move(module)),
      batch_(batch),
      is_batched_(is_batched),
      memory_(new char[layers() * (h_bytes() + c_bytes())]) {
  Contiguous contiguous;
  const auto fill = [&](py::handle tensor, char* to, int64_t bytes) {
    if (bytes == 0) return;
    if (tensor.is_none()) {
      std::memset(to, 0, bytes);
      return;
    }
    const Tensor given = view(tensor);
    if (given.shape.count() * size_of(shape().dtype) != bytes ||
        given.element != element_of(shape().dtype) || !given.is_on_cpu()) {
      throw py::value_error("hx: expected states of " + std::to_string(layers()) + " layers, " +
                            std::to_string(batch_) + " rows and " + std::to_string(bytes) +
                            " bytes of " + describe(element_of(shape().dtype)) + ", got " +
                            describe(tensor));
    }
    std::memcpy(to, contiguous(given), bytes);
  };
  fill(h, h_of(0), layers() * h_bytes());
  fill(c, c_of(0), layers() * c_bytes());
}

PackedState::PackedState(const PackedState& before, bool)
    : model_(before.model_),
      module_(before.module_),
      batch_(before.batch_),
      is_batched_(before.is_batched_),
      memory_(new char[layers() * (h_bytes() + c_bytes())]) {}

bool PackedState::takes(py::handle x, const Shape& expected, Tensor& viewed,
                        Zoneouts& zoneouts) const {
  if (has_inputs(this->shape())) return false;
  const std::optional<Zoneouts> read = model_->zoneouts(module_);
  if (!read) return false;
  zoneouts = *read;
  if (!is_tensor(x) || is_watched() || !is_plain(x)) return false;
  static const Attribute requires_grad("requires_grad");
  if (requires_grad.is_true(x) && is_grad_enabled()) return false;
  try {
    viewed = view(x);
  } catch (const std::exception&) {  // no memory
    return false;
  }
  return viewed.is_on_cpu() && viewed.element == element_of(shape().dtype) &&
         viewed.shape == expected && model_->is_current(module_);
}

py::object PackedState::step(py::handle x, py::handle mask) const {
  const int64_t input = shape().input;
  Tensor given, rows;
  Zoneouts zoneouts;
  if (!takes(x, is_batched_ ? Shape{batch_, input} : Shape{input}, given, zoneouts)) {
    return py::none();
  }
  if (!mask.is_none()) {
    if (!is_batched_ || !is_tensor(mask) || !is_plain(mask)) return py::none();
    rows = view(mask);
    if (!rows.is_on_cpu() || rows.element != Element::kBool || !(rows.shape == Shape{batch_})) {
      return py::none();
    }
  }
  Contiguous contiguous;
  std::unique_ptr<PackedState> next(new PackedState(*this, true));
  const void* from = contiguous(given);
  thread_local std::vector<char> unused;  // T = 1: output and h_n are the same
  unused.resize(h_bytes());
  for (int64_t k = 0; k < layers(); ++k) {
    const PackedLayer& layer = *model_->layers()[k];
    ForwardArgs args{};
    static_cast<ScanShape&>(args) = layer.shape();
    args.steps = batch_ == 0 ? 0 : 1;
    args.batch = batch_;
    args.x = from;
    args.h_0 = h_of(k);
    args.c_0 = cells() > 0 ? c_of(k) : nullptr;
    args.output = unused.data();
    args.h_n = next->h_of(k);
    args.c_n = cells() > 0 ? next->c_of(k) : nullptr;
    zoneouts.set(args);
    fastrnn::run(layer, args);
    from = args.h_n;
  }
  if (rows) {
    const bool* const valid = static_cast<const bool*>(contiguous(rows));
    for (int64_t b = 0; b < batch_; ++b) {
      if (valid[b]) continue;
      for (int64_t k = 0; k < layers(); ++k) {
        const int64_t h = h_bytes() / batch_, c = c_bytes() / batch_;
        std::memcpy(next->h_of(k) + b * h, h_of(k) + b * h, h);
        std::memcpy(next->c_of(k) + b * c, c_of(k) + b * c, c);
      }
    }
  }
  return to_python(std::move(next));
}

py::object PackedState::run(py::handle x) const {
  const int64_t steps = is_tensor(x) ? PyObject_Size(x.ptr()) : -1;
  if (steps < 0) {  // no tensor, or one without dimensions
    PyErr_Clear();
    return py::none();
  }
  Tensor given;
  const int64_t input = shape().input;
  Zoneouts zoneouts;
  const Shape expected = is_batched_ ? Shape{steps, batch_, input} : Shape{steps, input};
  if (!takes(x, expected, given, zoneouts)) return py::none();
  std::unique_ptr<PackedState> next(new PackedState(*this, true));
  Shape outputs{steps};
  if (is_batched_) outputs.push(batch_);
  const py::object output = model_->run_layers(given, steps, batch_, outputs, zoneouts, h_of(0),
                                               cells() > 0 ? c_of(0) : nullptr, next->h_of(0),
                                               cells() > 0 ? next->c_of(0) : nullptr);
  return py::make_tuple(output, to_python(std::move(next)));
}

py::object PackedState::tensor_of(const Shape& shape, const char* from) const {
  py::object tensor = make_tensor(model_->like(), shape, element_of(this->shape().dtype));
  const int64_t bytes = shape.count() * size_of(this->shape().dtype);
  if (bytes > 0) std::memcpy(view(tensor).data, from, bytes);
  return tensor;
}

py::tuple PackedState::tensors() const {
  const auto all = [this](int64_t features, const char* from) {
    return tensor_of(is_batched_ ? Shape{layers(), batch_, features} : Shape{layers(), features},
                     from);
  };
  return py::make_tuple(all(shape().proj, h_of(0)),
                        cells() > 0 ? all(cells(), c_of(0)) : py::object(py::none()));
}

py::object PackedState::h(int64_t layer) const {
  if (layer < 0 || layer >= layers()) {
    throw py::index_error("layer: expected 0 to " + std::to_string(layers() - 1) + ", got " +
                          std::to_string(layer));
  }
  const int64_t proj = shape().proj;
  return tensor_of(is_batched_ ? Shape{batch_, proj} : Shape{proj}, h_of(layer));
}

}  // namespace fastrnn
