#include "common/dynamic_quantize_per_token_schema.h"

#include <numeric>

namespace fptq {

namespace {

void CheckShape(const NodeLocation& location, const std::vector<int64_t>& x) {
  if (x.empty() || x.back() == 0) {
    location.Fail(Concat("X has shape ", ShapeText(x)), "X must be [..., K] with K at least 1");
  }
}

}  // namespace

DynamicQuantizeCall DynamicQuantizeCall::Check(const NodeLocation& location, const std::vector<int64_t>& x) {
  CheckShape(location, x);
  DynamicQuantizeCall call;
  call.k = x.back();
  call.rows = std::accumulate(x.begin(), x.end() - 1, int64_t{1}, [](int64_t a, int64_t b) { return a * b; });
  call.scale_shape = x;
  call.scale_shape.back() = 1;
  return call;
}

void CheckDynamicQuantizeNode(const NodeLocation& location, Ort::ConstKernelInfo info) {
  const std::vector<int64_t> x = info.GetInputTypeInfo(0).GetTensorTypeAndShapeInfo().GetShape();
  if (!x.empty()) CheckShape(location, x);  // of any size: a declaration may say 2^62 x 2^62
}

void InferDynamicQuantizeShapes(InferenceContext& context) {
  SymbolicShape shape = context.InputShape(0);
  if (shape.empty()) return;  // unknown rank
  context.SetOutputShape(0, shape, ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8);
  shape.back() = {1, ""};
  context.SetOutputShape(1, shape, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
}

}  // namespace fptq
