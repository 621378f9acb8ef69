#include "common/fused_quantize_schema.h"

#include <cmath>
#include <numeric>

namespace fptq {
namespace {

bool IsScalar(const std::vector<int64_t>& shape) { return shape.empty() || (shape.size() == 1 && shape[0] == 1); }

bool IsWeight(const FusedStep& step, size_t input) { return step.norm && input == step.weight_input(); }

}  // namespace

FusedQuantizeNode FusedQuantizeNode::Read(const FusedStep& step, Ort::ConstKernelInfo info) {
  FusedQuantizeNode node;
  node.location = NodeLocation::Of(step.name, info);
  if (!step.norm) return node;
  try {
    node.epsilon = info.GetAttribute<float>("epsilon");
  } catch (const Ort::Exception&) {
    node.location.Fail("attribute 'epsilon' is missing or is not a float", "Set it to that of the norm");
  }
  if (!(node.epsilon >= 0.0f && std::isfinite(node.epsilon))) {
    node.location.Fail(Concat("epsilon is ", node.epsilon), "Use a finite number that is not negative");
  }
  return node;
}

FusedQuantizeShapes FusedQuantizeShapes::Check(const FusedStep& step, const NodeLocation& location,
                                               const Ort::KernelContext& context) {
  FusedQuantizeShapes result;
  const auto shape_of = [&](size_t input) { return context.GetInput(input).GetTensorTypeAndShapeInfo().GetShape(); };
  result.shape = shape_of(0);
  const std::vector<int64_t>& x = result.shape;
  if (x.empty() || x.back() == 0) {
    location.Fail(Concat("the first input has shape ", ShapeText(x)), "It must be [..., K] with K at least 1");
  }
  result.k = x.back();
  result.rows = std::accumulate(x.begin(), x.end() - 1, int64_t{1}, [](int64_t a, int64_t b) { return a * b; });
  result.scale_shape = x;
  result.scale_shape.back() = 1;
  for (size_t input = 1; input < step.float_inputs(); ++input) {
    const std::vector<int64_t> expected = IsWeight(step, input) ? std::vector<int64_t>{result.k} : x;
    const std::vector<int64_t> shape = shape_of(input);
    if (shape != expected) {
      location.Fail(Concat("input ", input, " has shape ", ShapeText(shape), " but the first has ", ShapeText(x)),
                    Concat("It must be ", ShapeText(expected)));
    }
  }
  for (size_t input = step.float_inputs(); input < step.inputs(); ++input) {
    const std::vector<int64_t> shape = shape_of(input);
    if (!IsScalar(shape)) {
      location.Fail(Concat(input == step.scale_input() ? "y_scale" : "y_zero_point", " has shape ", ShapeText(shape)),
                    "Give one value, shape [] or [1]");
    }
  }
  return result;
}

void InferFusedQuantizeShapes(const FusedStep& step, InferenceContext& context) {
  SymbolicShape shape = context.InputShape(0);
  if (shape.empty()) return;  // unknown rank
  context.SetOutputShape(0, shape, ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8);
  if (step.skip) context.SetOutputShape(step.sum_output(), shape, context.InputType(0));
  if (step.dynamic) {
    shape.back() = {1, ""};
    context.SetOutputShape(1, shape, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
  }
}

}  // namespace fptq
