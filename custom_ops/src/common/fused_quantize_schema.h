// Steps in front of a quantized layer that end in its uint8 activations: six ops, common to all execution providers.
//
//   RMSNormQuantize            (X, weight, y_scale, y_zero_point)        -> Y
//   RMSNormDynamicQuantize     (X, weight)                               -> Y, scale
//   SkipRMSNormQuantize        (X, skip, weight, y_scale, y_zero_point)  -> Y, sum
//   SkipRMSNormDynamicQuantize (X, skip, weight)                         -> Y, scale, sum
//   SiluMulQuantize            (gate, up, y_scale, y_zero_point)         -> Y
//   SiluMulDynamicQuantize     (gate, up)                                -> Y, scale
//
//   norm: v = T(X / sqrt(mean_k(X^2) + epsilon) * weight); of the Skip ops with X replaced by sum = T(X + skip)
//   SiLU: v = T(gate / (1 + exp(-gate)) * up)
//   static:   Y = clip(round_half_even(v / y_scale) + y_zero_point, 0, 255), NaN gives 0
//   dynamic:  Y, scale = DynamicQuantizePerToken(v)
//
// Everything before T(...) is float32, but the sum of squares, which is float64.
//
//   X, skip, gate, up, sum  T      [..., K]   one shape; rank >= 1, T is float32, float16 or bfloat16
//   weight                  T      [K]
//   y_scale, y_zero_point   float, uint8      [] or [1]
//   Y, scale                uint8  [..., K],  float [..., 1]
//   epsilon                 attribute of the norms
#ifndef FPTQ_COMMON_FUSED_QUANTIZE_SCHEMA_H_
#define FPTQ_COMMON_FUSED_QUANTIZE_SCHEMA_H_

#include <cstdint>
#include <vector>

#include "common/node_location.h"
#include "common/op_base.h"
#include "common/shape_inference.h"
#include "onnxruntime_cxx_api.h"

namespace fptq {

/// One of the six.
struct FusedStep {
  const char* name;
  bool norm;  ///< else SiLU
  bool skip;
  bool dynamic;

  constexpr size_t float_inputs() const { return skip ? 3 : 2; }  ///< of type T; the weight is the last
  constexpr size_t inputs() const { return float_inputs() + (dynamic ? 0 : 2); }
  constexpr size_t outputs() const { return 1 + (dynamic ? 1 : 0) + (skip ? 1 : 0); }
  constexpr size_t weight_input() const { return float_inputs() - 1; }
  constexpr size_t scale_input() const { return float_inputs(); }
  constexpr size_t zero_point_input() const { return float_inputs() + 1; }
  constexpr size_t sum_output() const { return outputs() - 1; }
};

inline constexpr FusedStep kRmsNormQuantize = {"RMSNormQuantize", true, false, false};
inline constexpr FusedStep kRmsNormDynamicQuantize = {"RMSNormDynamicQuantize", true, false, true};
inline constexpr FusedStep kSkipRmsNormQuantize = {"SkipRMSNormQuantize", true, true, false};
inline constexpr FusedStep kSkipRmsNormDynamicQuantize = {"SkipRMSNormDynamicQuantize", true, true, true};
inline constexpr FusedStep kSiluMulQuantize = {"SiluMulQuantize", false, false, false};
inline constexpr FusedStep kSiluMulDynamicQuantize = {"SiluMulDynamicQuantize", false, false, true};

/// What is known when a kernel is created.
struct FusedQuantizeNode {
  NodeLocation location;
  float epsilon = 0.0f;  ///< of the norms

  /// Reads and checks a node; throws Ort::Exception naming it.
  static FusedQuantizeNode Read(const FusedStep& step, Ort::ConstKernelInfo info);
};

/// The shapes of one call.
struct FusedQuantizeShapes {
  int64_t rows = 0;
  int64_t k = 0;
  std::vector<int64_t> shape;        ///< of Y and sum
  std::vector<int64_t> scale_shape;  ///< of scale

  /// Checks the shapes of all inputs; throws Ort::Exception naming the node.
  static FusedQuantizeShapes Check(const FusedStep& step, const NodeLocation& location,
                                   const Ort::KernelContext& context);
};

void InferFusedQuantizeShapes(const FusedStep& step, InferenceContext& context);

/// One op for one T and one kernel (see OpBase for what the kernel provides).
template <const FusedStep& kStep, class Kernel, ONNXTensorElementDataType kType>
struct FusedQuantizeOp : OpBase<FusedQuantizeOp<kStep, Kernel, kType>, Kernel> {
  const char* GetName() const { return kStep.name; }
  size_t GetInputTypeCount() const { return kStep.inputs(); }
  ONNXTensorElementDataType GetInputType(size_t index) const {
    if (index < kStep.float_inputs()) return kType;
    return index == kStep.scale_input() ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
  }
  size_t GetOutputTypeCount() const { return kStep.outputs(); }
  ONNXTensorElementDataType GetOutputType(size_t index) const {
    if (index == 0) return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
    return kStep.skip && index == kStep.sum_output() ? kType : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
  static void InferShapes(InferenceContext& context) { InferFusedQuantizeShapes(kStep, context); }
};

}  // namespace fptq

#endif  // FPTQ_COMMON_FUSED_QUANTIZE_SCHEMA_H_
