// LSTM: i, f, o = sigmoid(W_ih x + b_ih + W_hh h + b_hh), g = tanh(the same)
//       c' = f * c + i * g
//       h' = o * tanh(c')
// Hochreiter and Schmidhuber, 1997, with the forget gate of Gers et al., 2000; torch.nn.LSTM.
#pragma once

namespace fastrnn {

struct Lstm {
  static constexpr const char* mode = "LSTM";
  static constexpr int gates = 4;  // i, f, g, o
  static constexpr bool has_cell_state = true;
  static constexpr bool has_extra = true;  // every c_t
  static constexpr bool saves_gates = true;
  static constexpr bool splits_gradient = false;
  static constexpr bool has_direct_path = false;

  template <class V>
  [[gnu::always_inline]] static constexpr V forward(V (&x)[4], const V (&r)[4], V, V& c) {
    x[0] = sigmoid(x[0] + r[0]);
    x[1] = sigmoid(x[1] + r[1]);
    x[2] = tanh(x[2] + r[2]);
    x[3] = sigmoid(x[3] + r[3]);
    c = x[1] * c + x[0] * x[2];
    return x[3] * tanh(c);
  }

  template <class V>
  static constexpr V hidden(const V (&gate)[4], V c) {
    return gate[3] * tanh(c);
  }

  // The gradient of the c that hidden() was given.
  template <class V>
  static constexpr V hidden_gradient(const V (&gate)[4], V c, V dh) {
    const V tanh_c = tanh(c);
    return dh * gate[3] * (V(1) - tanh_c * tanh_c);
  }

  template <class V>
  [[gnu::always_inline]] static constexpr V cell_state(const V (&gate)[4], V c_prev) {
    return gate[1] * c_prev + gate[0] * gate[2];
  }

  template <class V>
  [[gnu::always_inline]] static constexpr V backward(const V (&gate)[4], V, V, V c_prev, V c, V dh,
                                                     V& dc, V (&dx)[4], V (&dr)[4]) {
    const V i = gate[0], f = gate[1], g = gate[2], o = gate[3];
    const V tanh_c = tanh(c);
    dc = dc + dh * o * (V(1) - tanh_c * tanh_c);
    dx[0] = dr[0] = dc * g * i * (V(1) - i);
    dx[1] = dr[1] = dc * c_prev * f * (V(1) - f);
    dx[2] = dr[2] = dc * i * (V(1) - g * g);
    dx[3] = dr[3] = dh * tanh_c * o * (V(1) - o);
    dc = dc * f;
    return V(0);
  }
};

}  // namespace fastrnn
