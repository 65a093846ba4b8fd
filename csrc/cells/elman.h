// Elman cell: h' = f(W_ih x + b_ih + W_hh h + b_hh) with f = tanh or relu.
// Elman, "Finding structure in time", 1990; torch.nn.RNN.
#pragma once

namespace fastrnn {

struct Tanh {
  static constexpr const char* mode = "RNN_TANH";
  template <class V>
  static constexpr V apply(V a) {
    return tanh(a);
  }
  template <class V>
  static constexpr V derivative(V h) {
    return V(1) - h * h;
  }
};

struct Relu {
  static constexpr const char* mode = "RNN_RELU";
  template <class V>
  static constexpr V apply(V a) {
    return relu(a);
  }
  template <class V>
  static constexpr V derivative(V h) {
    return relu_derivative(h);
  }
};

template <class Nonlinearity>
struct Elman {
  static constexpr const char* mode = Nonlinearity::mode;
  static constexpr int gates = 1;
  static constexpr bool has_cell_state = false;
  static constexpr bool has_extra = false;
  static constexpr bool saves_gates = false;  // backward needs no more than h'
  static constexpr bool splits_gradient = false;
  static constexpr bool has_direct_path = false;

  template <class V>
  [[gnu::always_inline]] static constexpr V forward(V (&x)[1], const V (&r)[1], V, V&) {
    return Nonlinearity::apply(x[0] + r[0]);
  }

  template <class V>
  [[gnu::always_inline]] static constexpr V backward(const V (&)[1], V, V h, V, V, V dh, V&,
                                                     V (&dx)[1], V (&dr)[1]) {
    dx[0] = dr[0] = dh * Nonlinearity::derivative(h);
    return V(0);
  }
};

}  // namespace fastrnn
