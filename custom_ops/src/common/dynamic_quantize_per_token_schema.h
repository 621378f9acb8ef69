// fptq.DynamicQuantizePerToken: shapes and their checks, common to all execution providers.
//
//   s = max_k |X[..., k]| / 127 in float32, replaced by 1 where that is 0
//   Y = round_half_even(X / s) + 128, clamped to 1..255
//
//   X     T      [..., K]  rank >= 1, T is float32, float16 or bfloat16
//   Y     uint8  [..., K]  zero point 128
//   scale float  [..., 1]
//
// A row that holds NaN or infinity gets scale NaN and Y = 128, so that everything computed from it is NaN.
#ifndef FPTQ_COMMON_DYNAMIC_QUANTIZE_PER_TOKEN_SCHEMA_H_
#define FPTQ_COMMON_DYNAMIC_QUANTIZE_PER_TOKEN_SCHEMA_H_

#include <cstdint>
#include <vector>

#include "common/node_location.h"
#include "common/op_base.h"
#include "common/op_names.h"
#include "common/shape_inference.h"
#include "onnxruntime_cxx_api.h"

namespace fptq {

/// The shapes of one call.
struct DynamicQuantizeCall {
  int64_t rows = 0;
  int64_t k = 0;
  std::vector<int64_t> scale_shape;

  /// Throws Ort::Exception naming the node where X is a scalar or K is 0.
  static DynamicQuantizeCall Check(const NodeLocation& location, const std::vector<int64_t>& x);
};

/// Checks what is known at session creation.
void CheckDynamicQuantizeNode(const NodeLocation& location, Ort::ConstKernelInfo info);

void InferDynamicQuantizeShapes(InferenceContext& context);

/// The op for one T and one kernel (see OpBase for what the kernel provides).
template <class Kernel, ONNXTensorElementDataType kType>
struct DynamicQuantizePerTokenOp : OpBase<DynamicQuantizePerTokenOp<Kernel, kType>, Kernel> {
  const char* GetName() const { return kDynamicQuantizePerToken; }
  size_t GetInputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetInputType(size_t) const { return kType; }
  size_t GetOutputTypeCount() const { return 2; }
  ONNXTensorElementDataType GetOutputType(size_t index) const {
    return index == 0 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
  static void InferShapes(InferenceContext& context) { InferDynamicQuantizeShapes(context); }
};

}  // namespace fptq

#endif  // FPTQ_COMMON_DYNAMIC_QUANTIZE_PER_TOKEN_SCHEMA_H_
