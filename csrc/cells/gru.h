// GRU: r, z = sigmoid(W_ih x + b_ih + W_hh h + b_hh)
//      n = tanh(W_in x + b_in + r * (W_hn h + b_hn))
//      h' = (1 - z) * n + z * h
// Cho et al., arXiv:1406.1078, with the reset gate after the matrix product as in torch.nn.GRU.
#pragma once

namespace fastrnn {

struct Gru {
  static constexpr const char* mode = "GRU";
  static constexpr int gates = 3;  // r, z, n
  static constexpr bool has_cell_state = false;
  static constexpr bool has_extra = true;  // W_hn h + b_hn, which r scales
  static constexpr bool saves_gates = true;
  static constexpr bool splits_gradient = true;  // r stands between n and its recurrent part
  static constexpr bool has_direct_path = true;  // z * h

  template <class V>
  [[gnu::always_inline]] static constexpr V forward(V (&x)[3], const V (&r)[3], V h, V& extra) {
    x[0] = sigmoid(x[0] + r[0]);
    x[1] = sigmoid(x[1] + r[1]);
    x[2] = tanh(x[2] + x[0] * r[2]);
    extra = r[2];
    return x[2] + x[1] * (h - x[2]);
  }

  template <class V>
  [[gnu::always_inline]] static constexpr V backward(const V (&gate)[3], V h_prev, V, V, V extra,
                                                     V dh, V&, V (&dx)[3], V (&dr)[3]) {
    const V r = gate[0], z = gate[1], n = gate[2];
    dx[2] = dh * (V(1) - z) * (V(1) - n * n);
    dx[1] = dr[1] = dh * (h_prev - n) * z * (V(1) - z);
    dx[0] = dr[0] = dx[2] * extra * r * (V(1) - r);
    dr[2] = dx[2] * r;
    return dh * z;
  }
};

}  // namespace fastrnn
