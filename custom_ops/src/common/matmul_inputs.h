// What the products of activations and integer weights have in common: inputs, their types, the checks of their shapes.
#ifndef FPTQ_COMMON_MATMUL_INPUTS_H_
#define FPTQ_COMMON_MATMUL_INPUTS_H_

#include <cstdint>
#include <vector>

#include "common/node_location.h"
#include "common/op_base.h"
#include "common/shape_inference.h"
#include "onnxruntime_cxx_api.h"

namespace fptq {

/// Constant inputs of a product, and what the other one is called.
struct MatMulPositions {
  const char* a;  ///< name of input 0, the activations
  size_t b;
  size_t b_scale;
};

/// Positions of the inputs of W4A8MatMul and W8A8MatMul.
enum MatMulInput : size_t { kInputA = 0, kInputAScale, kInputAZeroPoint, kInputB, kInputBScale, kMatMulInputCount };
inline constexpr MatMulPositions kMatMulPositions = {"A", kInputB, kInputBScale};

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

  /// Reads and checks the weights of a node, and its activations' K; throws Ort::Exception naming it.
  static MatMulOperands ReadWeights(const NodeLocation& location, Ort::ConstKernelInfo info,
                                    const MatMulPositions& positions);

  /// Reads and checks all inputs of a W4A8MatMul or W8A8MatMul.
  static MatMulOperands Read(const NodeLocation& location, Ort::ConstKernelInfo info);
};

/// The shapes of one call.
struct MatMulShapes {
  int64_t rows = 0;            ///< product of A's leading dimensions
  bool per_token = false;      ///< one a_scale per row
  std::vector<int64_t> shape;  ///< of Y

  /// Checks the activations' shape; throws Ort::Exception naming the node.
  static MatMulShapes CheckActivations(const NodeLocation& location, const char* name, int64_t k, int64_t n,
                                       const std::vector<int64_t>& a);

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

/// Y is the activations' shape with N in place of K, in the type of b_scale.
void InferMatMulShapes(InferenceContext& context, const MatMulPositions& positions);

/// Base of W4A8MatMul and W8A8MatMul (see OpBase): types of inputs and output for weights of type kWeight, scales and
/// results of kType.
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
  static void InferShapes(InferenceContext& context) { InferMatMulShapes(context, kMatMulPositions); }
};

}  // namespace fptq

#endif  // FPTQ_COMMON_MATMUL_INPUTS_H_
