// A layer on the CPU's kernels: from a checked record to memory and back.
#pragma once

#include <deque>
#include <functional>
#include <vector>

#include "../../python/layer.h"
#include "../scan.h"
#include "../schedule.h"
#include "modules.h"

namespace fastrnn {

// Keeps what a kernel reads until it is through: tensors made contiguous.
class Contiguous {
 public:
  const void* operator()(const Tensor& tensor) {
    if (!tensor) return nullptr;
    if (tensor.is_contiguous) return tensor.data;
    static const Method contiguous("contiguous");
    copies_.push_back(contiguous(tensor.object));
    return view(copies_.back()).data;
  }
  // The same of each tensor.
  const void* const* operator()(const std::vector<Tensor>& tensors) {
    if (tensors.empty()) return nullptr;
    std::vector<const void*>& list = lists_.emplace_back();
    for (const Tensor& tensor : tensors) list.push_back((*this)(tensor));
    return list.data();
  }

 private:
  std::vector<py::object> copies_;
  std::deque<std::vector<const void*>> lists_;
};

// A new tensor, or none.
struct Made {
  py::object object = py::none();
  Tensor tensor;
};
Made make(const LayerCall& layer, const Shape& shape, Element element);
Made make(const LayerCall& layer, const Shape& shape);
Made make_if(bool is_wanted, const LayerCall& layer, const Shape& shape);

// ValueError for a layer of another device.
void expect_cpu(const LayerCall& layer);

// Sets what both passes read.
void set_layer(LayerArgs& args, const LayerCall& layer, Contiguous& contiguous);

// What forward makes, None for what there is not.
struct Results {
  Made output, h_n, c_n;
  Made extra;  // see csrc/cpu/scan.h
  Made saved;  // the gates, or the states between segments: for backward alone

  py::tuple tuple() const {
    return py::make_tuple(output.object, h_n.object, c_n.object, extra.object, saved.object);
  }
};

// What runs a forward scan of so many threads.
using Scan = std::function<void(const ForwardArgs& args, int threads)>;

Results forward(const LayerCall& layer);
Results forward(const LayerCall& layer, const Scan& scan);

// The same into memory that is there.
void run_forward(const ForwardArgs& args, const LayerCall& layer);
void run_forward(const ForwardArgs& args, const LayerCall& layer, const Scan& scan);

// How `count` layers of this shape, on top of each other, should run side by side; batch_sizes:
// null where all rows have all steps.
StackPlan plan_stack(const ScanShape& shape, const int64_t* batch_sizes, int count);
void run_forward(const std::vector<ForwardArgs>& layers, const StackPlan& plan);
void run_backward(const std::vector<BackwardArgs>& layers);

// What forward leaves of a layer, beside its final states, where args say.
Results make_steps(ForwardArgs& args, const LayerCall& layer);

// The gradients of x, h_0, c_0, inputs and each weight, made one after the other.
class Gradients {
 public:
  Gradients(const LayerCall& layer, const std::vector<bool>& wanted)
      : layer_(layer), wanted_(wanted) {}

  // Memory for the next one, if it is wanted; or needed all the same.
  void* add(const Shape& shape, bool is_needed = false);
  // One whose memory is somebody else's.
  void skip() { all_.push_back(py::none()); }
  // The gradients of both biases: each comes with the other.
  void add_biases(const Shape& ih, const Shape& hh, void*& d_bias_ih, void*& d_bias_hh);
  // Those of the weights.
  void add_weights(BackwardArgs& args);

  std::vector<py::object>& all() { return all_; }

 private:
  const LayerCall& layer_;
  const std::vector<bool>& wanted_;
  std::vector<py::object> all_, unwanted_;
  std::vector<void*> parameters_[kMaxDirections];
};

// Sets what backward is given.
void set_given(BackwardArgs& args, const LayerCall& layer, const SavedCall& given,
               Contiguous& contiguous);

// The gradients of x, h_0, c_0, inputs and each weight, None where not wanted.
std::vector<py::object> backward(const LayerCall& layer, const SavedCall& given);

}  // namespace fastrnn
