#include "common/w8a8_matmul_schema.h"

#include <vector>

namespace fptq {

W8A8MatMulNode W8A8MatMulNode::Read(Ort::ConstKernelInfo info) {
  W8A8MatMulNode node;
  node.location = NodeLocation::Of(kW8A8MatMul, info);
  const MatMulOperands operands = MatMulOperands::Read(node.location, info);
  node.k = operands.k;
  node.n = operands.n;
  node.constant_zero_point = operands.constant_zero_point;
  node.b = static_cast<const int8_t*>(operands.b);
  node.b_scale = operands.b_scale;
  if (node.k > kMaxInt8Length) {
    node.location.Fail(Concat("K is ", node.k, ", so that an integer sum may overflow int32"),
                       Concat("Use at most ", kMaxInt8Length));
  }
  const std::vector<int64_t> expected = {node.n};
  if (operands.b_scale_shape != expected) {
    node.location.Fail(
        Concat("b_scale has shape ", ShapeText(operands.b_scale_shape), " but B is ", ShapeText(operands.b_shape)),
        Concat("b_scale must be ", ShapeText(expected), ", one scale per output channel"));
  }
  return node;
}

}  // namespace fptq
