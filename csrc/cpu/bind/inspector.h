// Which calls are more than their kernel.
#pragma once

#include <vector>

#include "../../python/layer.h"

namespace fastrnn {

// What an eager call on some tensors is; Call in python/fastrnn/_operators.py.
enum class Call : int { kWatched, kPlain, kDifferentiable };

// Looks at tensors one by one; says what a call on all of them is.
class Inspector {
 public:
  // A tensor of the layer's dtype. What is no such tensor is left to whoever has the words for it.
  void add(py::handle object) {
    if (object.is_none() || !is_plain_) return;
    is_plain_ = is_plain(object);
    if (!is_plain_) return;
    Tensor tensor;
    try {
      tensor = view(object);
    } catch (const std::exception&) {  // no memory: one that has outlived its transform, say
      is_plain_ = false;
      return;
    }
    if (element_ == Element::kOther) element_ = tensor.element;
    tensors_.push_back(tensor);
    is_plain_ = tensor.is_on_cpu() && tensor.element == element_ && element_ <= Element::kFloat16;
    static const Attribute requires_grad("requires_grad");
    if (torch_grad_enabled_ && !requires_grad_) requires_grad_ = requires_grad.is_true(object);
  }
  // One of marks or numbers of rows.
  void add_other(py::handle object) {
    if (!object.is_none() && is_plain_) is_plain_ = is_plain(object);
  }
  // The tensors added, if the call is plain.
  const std::vector<Tensor>& tensors() const { return tensors_; }
  Call call() const {
    if (!is_plain_) return Call::kWatched;
    return requires_grad_ ? Call::kDifferentiable : Call::kPlain;
  }

 private:
  const bool torch_grad_enabled_ = is_grad_enabled();
  bool is_plain_ = !is_watched();
  bool requires_grad_ = false;
  Element element_ = Element::kOther;
  std::vector<Tensor> tensors_;
};

// Call of a layer, by its record, with some other tensors.
int inspect(py::handle record, py::handle others);

}  // namespace fastrnn
