// A layer with weights of 8 bits, which are packed once: see ../int8.h.
#pragma once

#include <vector>

#include "../int8.h"
#include "packed.h"

namespace fastrnn {

class Int8Layer : public PackedLayer {
 public:
  // weights: direction by direction as in a layer's record, matrices as torch.int8 in [-127, 127]
  // and biases as torch.float32. scales: torch.float32, one for each row of a matrix, in the
  // matrices' order. Throws ValueError, naming the argument, for what does not fit together.
  Int8Layer(py::handle mode, int directions, py::handle weights, py::handle scales);

  void run(ForwardArgs args, int threads) const override;
  int64_t bytes() const override;

  // The same as the constructor takes them, in new tensors.
  py::tuple weights() const;
  py::tuple scales() const;

 private:
  struct Matrix {
    Int8Shape shape{};
    int64_t bytes = 0;
    Memory packed;
  };
  struct Direction {
    Matrix ih, hh, hr;
    std::vector<float> bias_ih, bias_hh;
  };

  py::object like_;  // a tensor from which others are made
  Direction direction_[kMaxDirections];

  static Matrix pack(const char* name, const Tensor& weight, const Tensor& scales,
                     const Int8Shape& shape);
  py::object new_tensor(const Shape& shape, Element element) const;
  template <class Take>
  void unpack(const Take& take) const;
};

}  // namespace fastrnn
