#include "inspector.h"

namespace fastrnn {

int inspect(py::handle record, py::handle others) {
  const LayerFields fields = record_fields(record);
  Inspector inspector;
  const auto field = [&](LayerField i) { return fields[static_cast<size_t>(i)]; };
  for (const LayerField i :
       {LayerField::kX, LayerField::kH0, LayerField::kC0, LayerField::kInputs}) {
    inspector.add(field(i));
  }
  for (auto i = static_cast<size_t>(kFirstConstant); i <= static_cast<size_t>(kLastConstant); ++i) {
    inspector.add_other(fields[i]);
  }
  for (const py::handle weight : field(LayerField::kWeights)) inspector.add(weight);
  for (const py::handle tensor : others) inspector.add_other(tensor);
  return static_cast<int>(inspector.call());
}

}  // namespace fastrnn
