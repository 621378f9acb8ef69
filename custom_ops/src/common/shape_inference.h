// Shape inference on the C API. (The C++ header's ShapeInferContext cannot set a symbolic dimension: it passes -2,
// which runtimes reject.)
#ifndef FPTQ_COMMON_SHAPE_INFERENCE_H_
#define FPTQ_COMMON_SHAPE_INFERENCE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "onnxruntime_cxx_api.h"

namespace fptq {

/// A dimension: a size, or a name, or neither (unknown).
struct Dimension {
  int64_t size = -1;
  std::string name;
};
using SymbolicShape = std::vector<Dimension>;

class InferenceContext {
 public:
  explicit InferenceContext(OrtShapeInferContext* context) : context_(context) {}

  /// Empty for a scalar and for an unknown rank alike.
  SymbolicShape InputShape(size_t index) const;

  ONNXTensorElementDataType InputType(size_t index) const;

  /// Unknown dimensions get a fresh name: onnxruntime would take -1 for a size, and equal names for equal sizes, when
  /// it plans memory.
  void SetOutputShape(size_t index, const SymbolicShape& shape, ONNXTensorElementDataType type);

 private:
  OrtShapeInferContext* context_;
};

}  // namespace fptq

#endif  // FPTQ_COMMON_SHAPE_INFERENCE_H_
