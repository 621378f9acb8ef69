// fptq.DynamicQuantizeW4A8MatMul: DynamicQuantizePerToken and W4A8MatMul in one op, common to all execution providers.
//
//   A, a_scale = DynamicQuantizePerToken(X)
//   Y = W4A8MatMul(A, a_scale, 128, B, b_scale)       the same bytes
//
//   X        T     [..., K]                      rank >= 1; T is float32, float16 or bfloat16
//   B        int4  [K, N]                        constant, as of W4A8MatMul
//   b_scale  T     [ceil(K / block_size), N]     constant, as of W4A8MatMul
//   Y        T     [..., N]                      NaN in the rows of X that hold NaN or infinity
//   block_size, scale_max_multiple               as of W4A8MatMul
#ifndef FPTQ_COMMON_DYNAMIC_QUANTIZE_W4A8_MATMUL_SCHEMA_H_
#define FPTQ_COMMON_DYNAMIC_QUANTIZE_W4A8_MATMUL_SCHEMA_H_

#include <cstdint>
#include <vector>

#include "common/matmul_inputs.h"
#include "common/op_base.h"
#include "common/op_names.h"
#include "common/shape_inference.h"
#include "common/w4a8_matmul_schema.h"
#include "onnxruntime_cxx_api.h"

namespace fptq {

/// Positions of the inputs.
enum DynamicMatMulInput : size_t { kDynamicInputX = 0, kDynamicInputB, kDynamicInputBScale, kDynamicInputCount };
inline constexpr MatMulPositions kDynamicMatMulPositions = {"X", kDynamicInputB, kDynamicInputBScale};

/// Reads and checks a node; throws Ort::Exception naming it. Its constant_zero_point is 128.
W4A8MatMulNode ReadDynamicQuantizeW4A8MatMul(Ort::ConstKernelInfo info);

/// The shapes of one call on X; throws Ort::Exception naming the node.
MatMulShapes CheckDynamicMatMulShapes(const W4A8MatMulNode& node, const std::vector<int64_t>& x);

/// The op for one T and one kernel (see OpBase for what the kernel provides).
template <class Kernel, ONNXTensorElementDataType kType>
struct DynamicQuantizeW4A8MatMulOp : OpBase<DynamicQuantizeW4A8MatMulOp<Kernel, kType>, Kernel> {
  const char* GetName() const { return kDynamicQuantizeW4A8MatMul; }
  size_t GetInputTypeCount() const { return kDynamicInputCount; }
  ONNXTensorElementDataType GetInputType(size_t index) const {
    return index == kDynamicInputB ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT4 : kType;
  }
  size_t GetOutputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetOutputType(size_t) const { return kType; }
  static void InferShapes(InferenceContext& context) { InferMatMulShapes(context, kDynamicMatMulPositions); }
};

}  // namespace fptq

#endif  // FPTQ_COMMON_DYNAMIC_QUANTIZE_W4A8_MATMUL_SCHEMA_H_
