// What W4A8MatMul and W8A8MatMul have in common: inputs, their types, and the checks of their shapes.
#ifndef FPTQ_COMMON_MATMUL_INPUTS_H_
#define FPTQ_COMMON_MATMUL_INPUTS_H_

#include <cstdint>
#include <vector>

#include "common/node_location.h"
#include "common/op_base.h"
#include "common/shape_inference.h"
#include "onnxruntime_cxx_api.h"

namespace fptq {

/// Positions of the inputs.
enum MatMulInput : size_t { kInputA = 0, kInputAScale, kInputAZeroPoint, kInputB, kInputBScale, kMatMulInputCount };

/// What is known when the kernel is created.
struct MatMulOperands {
  int64_t k = 0;
  int64_t n = 0;
  int constant_zero_point = -1;        ///< 0..255 where a_zero_point is a constant, else -1
  std::vector<int64_t> b_shape;        ///< [k, n]
  std::vector<int64_t> b_scale_shape;  ///< to be checked by the op

  // Valid while the kernel is constructed, in host memory.
  const void* b = nullptr;
  const void* b_scale = nullptr;

  /// Reads and checks the inputs of a node; throws Ort::Exception naming it.
  static MatMulOperands Read(const NodeLocation& location, Ort::ConstKernelInfo info);
};

/// The shapes of one call.
struct MatMulShapes {
  int64_t rows = 0;            ///< product of A's leading dimensions
  bool per_token = false;      ///< one a_scale per row
  std::vector<int64_t> shape;  ///< of Y

  /// Checks the shapes that only a call knows; throws Ort::Exception naming the node.
  static MatMulShapes Check(const NodeLocation& location, int64_t k, int64_t n, const std::vector<int64_t>& a,
                            const std::vector<int64_t>& a_scale, const std::vector<int64_t>& a_zero_point);

  /// The same for a node with `location`, `k` and `n`.
  template <class Node>
  static MatMulShapes Check(const Node& node, const std::vector<int64_t>& a, const std::vector<int64_t>& a_scale,
                            const std::vector<int64_t>& a_zero_point) {
    return Check(node.location, node.k, node.n, a, a_scale, a_zero_point);
  }
};

/// Y is A's shape with N in place of K, in the type of b_scale.
void InferMatMulShapes(InferenceContext& context);

/// Base of both ops (see OpBase): types of inputs and output for weights of type kWeight, scales and results of kType.
template <class Op, class Kernel, ONNXTensorElementDataType kWeight, ONNXTensorElementDataType kType>
struct MatMulOp : OpBase<Op, Kernel> {
  size_t GetInputTypeCount() const { return kMatMulInputCount; }
  ONNXTensorElementDataType GetInputType(size_t index) const {
    switch (index) {
      case kInputAScale:
        return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
      case kInputB:
        return kWeight;
      case kInputBScale:
        return kType;
      default:
        return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
    }
  }
  size_t GetOutputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetOutputType(size_t) const { return kType; }
  static void InferShapes(InferenceContext& context) { InferMatMulShapes(context); }
};

}  // namespace fptq

#endif  // FPTQ_COMMON_MATMUL_INPUTS_H_
