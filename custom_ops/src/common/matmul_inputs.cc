#include "common/matmul_inputs.h"

#include <numeric>

namespace fptq {
namespace {

std::vector<int64_t> DeclaredShape(Ort::ConstKernelInfo info, size_t input) {
  return info.GetInputTypeInfo(input).GetTensorTypeAndShapeInfo().GetShape();
}

Ort::ConstValue ConstantInput(const NodeLocation& location, Ort::ConstKernelInfo info, size_t input, const char* name) {
  int is_constant = 0;
  const Ort::ConstValue value = info.GetTensorConstantInput(input, &is_constant);
  if (is_constant == 0) {
    location.Fail(Concat("input ", name, " is not a constant"),
                  "Make it an initializer of the node's own graph that is not also a graph input: kernels repack it "
                  "when the session is created");
  }
  return value;
}

bool IsScalar(const std::vector<int64_t>& shape) { return shape.empty() || (shape.size() == 1 && shape[0] == 1); }

void CheckZeroPoint(const NodeLocation& location, const std::vector<int64_t>& shape) {
  if (!IsScalar(shape)) {
    location.Fail(Concat("a_zero_point has shape ", ShapeText(shape)), "Give one uint8 value, shape [] or [1]");
  }
}

}  // namespace

MatMulOperands MatMulOperands::ReadWeights(const NodeLocation& at, Ort::ConstKernelInfo info,
                                           const MatMulPositions& positions) {
  MatMulOperands operands;
  const Ort::ConstValue b = ConstantInput(at, info, positions.b, "B");
  operands.b_shape = b.GetTensorTypeAndShapeInfo().GetShape();
  const std::vector<int64_t>& b_shape = operands.b_shape;
  if (b_shape.size() != 2) at.Fail(Concat("B has shape ", ShapeText(b_shape)), "B must be [K, N]");
  operands.k = b_shape[0];
  operands.n = b_shape[1];
  if (operands.k < 1 || operands.n < 1) {
    at.Fail(Concat("B has shape ", ShapeText(b_shape)), "K and N must be at least 1");
  }
  const Ort::ConstValue b_scale = ConstantInput(at, info, positions.b_scale, "b_scale");
  operands.b_scale_shape = b_scale.GetTensorTypeAndShapeInfo().GetShape();

  const std::vector<int64_t> a_shape = DeclaredShape(info, 0);
  if (!a_shape.empty() && a_shape.back() >= 0 && a_shape.back() != operands.k) {
    at.Fail(Concat(positions.a, " has shape ", ShapeText(a_shape), " but B is ", ShapeText(b_shape)),
            Concat(positions.a, "'s last dimension must equal B's first"));
  }
  operands.b = b.GetTensorRawData();
  operands.b_scale = b_scale.GetTensorRawData();
  return operands;
}

MatMulOperands MatMulOperands::Read(const NodeLocation& at, Ort::ConstKernelInfo info) {
  MatMulOperands operands = ReadWeights(at, info, kMatMulPositions);
  CheckZeroPoint(at, DeclaredShape(info, kInputAZeroPoint));
  int zero_point_is_constant = 0;
  const Ort::ConstValue zero_point = info.GetTensorConstantInput(kInputAZeroPoint, &zero_point_is_constant);
  if (zero_point_is_constant != 0) {
    CheckZeroPoint(at, zero_point.GetTensorTypeAndShapeInfo().GetShape());
    const bool on_host = zero_point.GetTensorMemoryInfo().GetDeviceType() == OrtMemoryInfoDeviceType_CPU;
    if (on_host) operands.constant_zero_point = *zero_point.GetTensorData<uint8_t>();
  }
  return operands;
}

MatMulShapes MatMulShapes::CheckActivations(const NodeLocation& location, const char* name, int64_t k, int64_t n,
                                            const std::vector<int64_t>& a) {
  if (a.empty() || a.back() != k) {
    location.Fail(Concat(name, " has shape ", ShapeText(a), " but K is ", k),
                  Concat(name, "'s last dimension must be K, the first dimension of B"));
  }
  MatMulShapes call;
  call.shape = a;
  call.shape.back() = n;
  call.rows = std::accumulate(a.begin(), a.end() - 1, int64_t{1}, [](int64_t x, int64_t y) { return x * y; });
  return call;
}

MatMulShapes MatMulShapes::Check(const NodeLocation& location, int64_t k, int64_t n, const std::vector<int64_t>& a,
                                 const std::vector<int64_t>& a_scale, const std::vector<int64_t>& a_zero_point) {
  MatMulShapes call = CheckActivations(location, kMatMulPositions.a, k, n, a);
  CheckZeroPoint(location, a_zero_point);
  call.per_token = !IsScalar(a_scale);
  if (call.per_token) {
    std::vector<int64_t> expected = a;
    expected.back() = 1;
    if (a_scale != expected) {
      location.Fail(Concat("a_scale has shape ", ShapeText(a_scale), " but A is ", ShapeText(a)),
                    Concat("Give one scale (shape []) or one per row, shape ", ShapeText(expected)));
    }
  }
  return call;
}

void InferMatMulShapes(InferenceContext& context, const MatMulPositions& positions) {
  SymbolicShape shape = context.InputShape(0);
  const SymbolicShape b = context.InputShape(positions.b);
  if (shape.empty() || b.size() != 2) return;  // unknown rank
  shape.back() = b[1];
  // The runtime asks the op of one T for all of them, so T is what the node has.
  context.SetOutputShape(0, shape, context.InputType(positions.b_scale));
}

}  // namespace fptq
