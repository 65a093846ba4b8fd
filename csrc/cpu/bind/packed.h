// Layers whose weights are packed once for many calls, and the states of a unidirectional module
// that takes one step at a time on them. A step of a small layer takes a microsecond, so nothing of
// it is in Python, and its states are no tensors until somebody asks for them.
#pragma once

#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "run_layer.h"

namespace fastrnn {

// Memory for packed weights, on large pages where these pay.
struct FreeMemory {
  void operator()(char* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<char, FreeMemory>;
Memory allocate(int64_t bytes);

// The weights of a layer in all its directions, in a form of their own. What a row's results are
// does not depend on how many rows or threads there are.
class PackedLayer {
 public:
  virtual ~PackedLayer() = default;
  PackedLayer(const PackedLayer&) = delete;
  PackedLayer& operator=(const PackedLayer&) = delete;

  // The layer's sizes, dtype and directions, without rows and steps.
  const ScanShape& shape() const { return shape_; }
  // Runs a scan with these weights; what args says of weights does not count.
  virtual void run(ForwardArgs args, int threads) const = 0;
  // Sets these weights, for a scan that runs beside others; false where there is none such. All
  // layers of a model are of one kind.
  virtual bool set_weights(ForwardArgs&) const { return false; }
  // The bytes of the weights.
  virtual int64_t bytes() const = 0;

 protected:
  explicit PackedLayer(const ScanShape& shape) : shape_(shape) {}

  ScanShape shape_;
};

// Packs the weights of a layer, of any rows and steps. storage: "own", elements of the layer's
// dtype, or "bfloat16", of a float32 layer. Throws ValueError for another one.
std::shared_ptr<PackedLayer> pack(const LayerCall& layer, const std::string& storage);

// Runs a layer on packed weights; those of its record are not read.
Results forward(py::handle record, const PackedLayer& packed);

// How likely h and c are to stay as they are; in inference, how much of them stays.
struct Zoneouts {
  double h = 0, c = 0;

  void set(ForwardArgs& args) const {
    args.zoneout_h = h;
    args.zoneout_c = c;
  }
};

// All layers of a module, and what its parameters were when they were packed.
class PackedModel {
 public:
  // module: the __dict__ of an RNN module. parameters: all tensors from which its weights are made.
  PackedModel(std::vector<std::shared_ptr<PackedLayer>> layers, const py::dict& module,
              const py::list& parameters);

  const std::vector<std::shared_ptr<PackedLayer>>& layers() const { return layers_; }
  int64_t bytes() const;
  // Whether the module's parameters are the same tensors, at the same place and of the same
  // version.
  bool is_current(const py::dict& module) const;
  // One step of a single layer, as its cell's forward: x [B, I], h [B, P] and c [B, C*H], or
  // without B; None for zeros. Returns h and c of the next step, c None without one; None as
  // PackedState::step().
  py::object step(const py::dict& module, py::handle x, py::handle h, py::handle c) const;
  // All layers over x [T, B, I], from h [L*D, B, P] and c [L*D, B, C*H]; None for zeros. Returns
  // the output, and the states after it; None as step().
  py::object run(const py::dict& module, py::handle x, py::handle h, py::handle c) const;
  // The module's zoneout; none where its options, or dropout, change more of a scan than that, in
  // training.
  std::optional<Zoneouts> zoneouts(const py::dict& module) const;
  // The same of what was checked; null for zeros. `outputs`: the output's sizes but the last.
  py::object run_layers(const Tensor& x, int64_t steps, int64_t batch, const Shape& outputs,
                        const Zoneouts& zoneouts, const char* h_0, const char* c_0, char* h_n,
                        char* c_n) const;
  // One of its parameters, on whose device results are made.
  Tensor like() const { return view(watched_[0].tensor); }

 private:
  struct Watched {
    py::object tensor;
    void* data;
    int64_t version;
  };
  struct Named {
    py::object name, tensor;
  };
  std::vector<std::shared_ptr<PackedLayer>> layers_;
  std::vector<Watched> watched_;
  std::vector<Named> named_;        // of the module's _parameters
  std::vector<py::object> listed_;  // its _flat_weights
};

// The states of all layers for B rows, in memory of its own. Never changed once it is made.
class PackedState {
 public:
  // h [L, B, P] and c [L, B, C*H], checked by the caller; None for zeros.
  PackedState(std::shared_ptr<const PackedModel> model, py::dict module, int64_t batch,
              bool is_batched, py::handle h, py::handle c);

  // The state after one more step of x, [B, I] or unbatched [I]. mask: None, or bool [B], False
  // where a row stays as it is. None where the call is more than a step on plain tensors, where the
  // module's weights are others by now, or where an argument is wrong.
  py::object step(py::handle x, py::handle mask) const;
  // The outputs [T, B, P] of the top layer over x [T, B, I], and the state after; None as step().
  py::object run(py::handle x) const;

  // h [L, B, P] and c [L, B, C*H], or None without a c; without B if unbatched.
  py::tuple tensors() const;
  // h of one layer, [B, P] or [P].
  py::object h(int64_t layer) const;

  int64_t batch() const { return batch_; }
  bool is_batched() const { return is_batched_; }

 private:
  std::shared_ptr<const PackedModel> model_;
  py::dict module_;
  int64_t batch_;
  bool is_batched_;
  std::unique_ptr<char[]> memory_;  // h [L, B, P] and c [L, B, C*H]

  PackedState(const PackedState& before, bool is_next);  // of other states, to be set

  const ScanShape& shape() const { return model_->layers()[0]->shape(); }
  int64_t layers() const { return static_cast<int64_t>(model_->layers().size()); }
  int64_t cells() const;    // C*H
  int64_t h_bytes() const;  // of one layer
  int64_t c_bytes() const;
  char* h_of(int64_t layer) const { return memory_.get() + layer * h_bytes(); }
  char* c_of(int64_t layer) const {
    return memory_.get() + layers() * h_bytes() + layer * c_bytes();
  }
  // Whether x is a plain tensor of the module's dtype whose last sizes are these; views it.
  bool takes(py::handle x, const Shape& shape, Tensor& viewed, Zoneouts& zoneouts) const;
  py::object tensor_of(const Shape& shape, const char* from) const;
};

}  // namespace fastrnn
