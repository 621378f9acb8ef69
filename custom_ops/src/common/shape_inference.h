// Helpers for the ops' shape inference.
#ifndef FPTQ_COMMON_SHAPE_INFERENCE_H_
#define FPTQ_COMMON_SHAPE_INFERENCE_H_

#include "onnxruntime_cxx_api.h"

namespace fptq {

/// Sets output `index` to `shape`. Dimensions without value and name get a fresh name: onnxruntime would take an
/// unknown dimension (-1) for a value, and two equal names for equal sizes, when it plans memory.
void SetOutputShape(Ort::ShapeInferContext& context, size_t index, Ort::ShapeInferContext::Shape shape,
                    ONNXTensorElementDataType type);

}  // namespace fptq

#endif  // FPTQ_COMMON_SHAPE_INFERENCE_H_
