#include "common/dynamic_quantize_w4a8_matmul_schema.h"

namespace fptq {
namespace {

constexpr int kZeroPoint = 128;

}  // namespace

W4A8MatMulNode ReadDynamicQuantizeW4A8MatMul(Ort::ConstKernelInfo info) {
  const NodeLocation location = NodeLocation::Of(kDynamicQuantizeW4A8MatMul, info);
  MatMulOperands operands = MatMulOperands::ReadWeights(location, info, kDynamicMatMulPositions);
  operands.constant_zero_point = kZeroPoint;
  return W4A8MatMulNode::Of(location, operands, info);
}

MatMulShapes CheckDynamicMatMulShapes(const W4A8MatMulNode& node, const std::vector<int64_t>& x) {
  MatMulShapes shapes = MatMulShapes::CheckActivations(node.location, kDynamicMatMulPositions.a, node.k, node.n, x);
  shapes.per_token = true;
  return shapes;
}

}  // namespace fptq
