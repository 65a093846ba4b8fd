// The record of one layer call, as python/fastrnn/_layer.py declares it, in C++: read, checked, and
// with what follows from it. An option of a layer is a field here, one there, and the code that
// uses it.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "../cells/traits.h"
#include "tensor.h"

namespace fastrnn {

const CellTraits& cell_traits(int cell);
// Adds a cell that may have no kernel yet. Returns its traits, which stay there; of a cell that is
// known those that it has, as a kernel may have said more.
const CellTraits& declare_cell(CellTraits traits);
// The traits of a cell as its kernel has them.
const CellTraits& define_cell(CellTraits traits);
int find_cell(const std::string& mode);  // throws ValueError for an unknown one
int find_cell(py::handle mode);          // and for what is no str

struct LayerCall {
  // The fields of the record, in its order.
  int cell = 0;
  int directions = 1;
  int64_t batch = 0;
  bool reverse = false;
  int64_t checkpoint_every = 0;
  bool keep = false;   // what backward reads
  bool all_c = false;  // every c_t
  double grad_clip = 0;
  double zoneout_h = 0, zoneout_c = 0;
  bool layer_norm = false;
  Tensor x, h_0, c_0;  // a tensor that is not given is false
  Tensor batch_sizes;  // int64 [T] on the CPU; on CUDA also a bool mask [T, B]
  Tensor resets;
  Tensor grad_scale;  // of each step
  Tensor h_mask;      // on the h that W_hh multiplies
  Tensor seed;        // of zoneout's random numbers
  Tensor inputs;      // of each step and unit, of cells with such
  struct Weights {
    Tensor ih, hh, bias_ih, bias_hh, hr;
    std::vector<Tensor> parameters;  // learned vectors, see vector_sizes()
  } weights[kMaxDirections];
  py::tuple own_weights;  // keeps the record's alive, whatever sequence they came in

  // What follows from them: complete() sets it.
  ScanShape shape{};
  int64_t rows = 0;  // N

  const CellTraits& traits() const { return cell_traits(cell); }
  bool has_mask() const { return batch_sizes && batch_sizes.element == Element::kBool; }
  Element element() const { return x.element; }
  // In what states are carried from step to step.
  Element state_element() const {
    return x.element == Element::kFloat64 ? Element::kFloat64 : Element::kFloat32;
  }

  // The shapes of all that is laid out by direction, by step, or both.
  Shape steps(int64_t features) const;   // [T, B, features] or [N, features]
  Shape states(int64_t features) const;  // [D, B, features]
  Shape gates() const;                   // [D, N, G*H]
  Shape saved() const;                   // [D, N, K*H]; with layer_norm R for K
  Shape boundaries() const;              // [S-1, D, B, P + C*H]
  bool keeps_extra() const;
  int saves() const { return layer_norm ? traits().recurrent : traits().saves; }  // K
  bool keeps_gates() const { return keep && saves() > 0 && shape.checkpoint_every == 0; }
  bool keeps_boundaries() const { return keep && shape.checkpoint_every > 0; }

  // Of the learned vectors of a direction: [H] each, or the gains of layer normalisation.
  std::vector<int64_t> vector_sizes() const;

  // Sets shape and rows; throws ValueError, naming the argument, what was expected and what came.
  void complete();
  // The same for a layer whose weights lie elsewhere; own: their sizes.
  void complete(const ScanShape& own);
};

// Throws ValueError where a layer of the cell cannot have so many weights.
void expect_weights(const CellTraits& traits, int64_t count, int directions,
                    bool layer_norm = false);

// The weights of one direction, `each` of them: w_ih, w_hh, perhaps both biases, perhaps w_hr, as
// in torch.nn.RNNBase, and the cell's learned vectors. Without recurrent gates there is neither
// w_hh nor b_hh. take(name, name in the second direction) -> the next tensor.
template <class Take>
void read_direction(LayerCall::Weights& w, const CellTraits& traits, int64_t each, int vectors,
                    Take&& take) {
  const bool has_hh = traits.recurrent > 0;
  const int64_t matrices = each - vectors;  // and biases
  w.ih = take("weight_ih", "weight_ih_reverse");
  if (has_hh) w.hh = take("weight_hh", "weight_hh_reverse");
  if (matrices > (has_hh ? 3 : 1)) {
    w.bias_ih = take("bias_ih", "bias_ih_reverse");
    if (has_hh) w.bias_hh = take("bias_hh", "bias_hh_reverse");
  }
  if (has_hh && matrices % 2 == 1) w.hr = take("weight_hr", "weight_hr_reverse");
  for (int q = 0; q < vectors; ++q) {
    w.parameters.push_back(take("parameter", "parameter_reverse"));
  }
}

// The places of the record's tensors.
enum class LayerField : int {
  kX = 11,
  kH0,
  kC0,
  kBatchSizes,
  kResets,
  kGradScale,
  kHMask,
  kSeed,
  kInputs,
  kWeights
};
// Those that have no gradient.
constexpr LayerField kFirstConstant = LayerField::kBatchSizes, kLastConstant = LayerField::kSeed;

// The names of the record's fields, in its order.
py::tuple layer_fields();

constexpr int kLayerFields = 21;
using LayerFields = std::array<py::handle, kLayerFields>;

// The fields of a record; throws ValueError for what is none.
LayerFields record_fields(py::handle record);

// Reads a record, or its fields, and completes it.
LayerCall read_layer(py::handle record);
LayerCall read_layer(const LayerFields& fields);
// The same for a layer whose weights lie elsewhere: those of the record are not read.
LayerCall read_layer(py::handle record, const ScanShape& own);

// What backward is given beside the layer: the record Saved of the same module.
struct SavedCall {
  Tensor output, extra, saved;
  Tensor d_output, d_h_n, d_c_n, d_extra;  // not given: zero
  std::vector<bool> wanted;                // of x, h_0, c_0, inputs and each weight
};

using SavedFields = std::array<py::handle, 7>;  // all but `wanted`

// Reads a record, or its fields, and checks it against its layer.
SavedCall read_saved(const LayerCall& layer, py::handle record);
SavedCall read_saved(const LayerCall& layer, const SavedFields& fields,
                     const std::vector<bool>& wanted);

// ValueError unless they are the layer's.
void expect_saved(const LayerCall& layer, const SavedCall& given);

// ValueError unless `tensor` is of this shape, of x's device, and of this element type.
void expect(const LayerCall& layer, const char* name, const Tensor& tensor, const Shape& shape,
            Element element);

// A field that may be None.
Tensor view_optional(const char* name, py::handle object);

}  // namespace fastrnn
