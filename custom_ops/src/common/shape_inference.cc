#include "common/shape_inference.h"

#include <atomic>
#include <string>
#include <vector>

namespace fptq {

void SetOutputShape(Ort::ShapeInferContext& context, size_t index, Ort::ShapeInferContext::Shape shape,
                    ONNXTensorElementDataType type) {
  static std::atomic<unsigned> next{0};
  std::vector<std::string> names;
  names.reserve(shape.size());  // the dimensions keep pointers into it
  for (auto& dim : shape) {
    if (dim.IsInt() && dim.AsInt() < 0) {
      names.push_back("fptq_dim_" + std::to_string(next++));
      dim = Ort::ShapeInferContext::SymbolicInteger(names.back().c_str());
    }
  }
  const Ort::Status status = context.SetOutputShape(index, shape, type);
  if (!status.IsOK()) throw Ort::Exception(status.GetErrorMessage(), status.GetErrorCode());
}

}  // namespace fptq
