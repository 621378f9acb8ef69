#include "common/w4a8_matmul_schema.h"

namespace fptq {
namespace {

constexpr int64_t kLargestMultiple = 15;

int64_t RequiredInt(const NodeLocation& location, Ort::ConstKernelInfo info, const char* name) {
  try {
    return info.GetAttribute<int64_t>(name);
  } catch (const Ort::Exception&) {
    location.Fail(Concat("attribute '", name, "' is missing or is not an integer"),
                  Concat("Set '", name, "' to an integer, or convert the model again"));
  }
}

template <class T>
bool HasAttribute(Ort::ConstKernelInfo info, const char* name) {
  try {
    info.GetAttribute<T>(name);
    return true;
  } catch (const Ort::Exception&) {
    return false;
  }
}

int64_t OptionalInt(const NodeLocation& location, Ort::ConstKernelInfo info, const char* name, int64_t otherwise) {
  if (HasAttribute<int64_t>(info, name)) return info.GetAttribute<int64_t>(name);
  if (HasAttribute<float>(info, name) || HasAttribute<std::string>(info, name)) {
    location.Fail(Concat("attribute '", name, "' is not an integer"), "Make it an integer or leave it out");
  }
  return otherwise;
}

}  // namespace

W4A8MatMulNode W4A8MatMulNode::Read(Ort::ConstKernelInfo info) {
  const NodeLocation location = NodeLocation::Of(kW4A8MatMul, info);
  return Of(location, MatMulOperands::Read(location, info), info);
}

W4A8MatMulNode W4A8MatMulNode::Of(const NodeLocation& at, const MatMulOperands& operands, Ort::ConstKernelInfo info) {
  W4A8MatMulNode node;
  node.location = at;
  node.block_size = RequiredInt(at, info, "block_size");
  node.scale_max_multiple = OptionalInt(at, info, "scale_max_multiple", 0);
  if (node.scale_max_multiple < 0 || node.scale_max_multiple > kLargestMultiple) {
    at.Fail(Concat("scale_max_multiple is ", node.scale_max_multiple), "Use 0 (none) or 1..15");
  }

  node.k = operands.k;
  node.n = operands.n;
  node.constant_zero_point = operands.constant_zero_point;
  node.b = static_cast<const uint8_t*>(operands.b);
  node.b_scale = operands.b_scale;
  if (node.block_size < 1 || node.block_size > node.k) {
    at.Fail(Concat("block_size is ", node.block_size, " but K is ", node.k),
            "Use 1..K; K itself means one scale per output channel");
  }
  if (node.block_size > kMaxGroupLength) {
    at.Fail(Concat("block_size is ", node.block_size, ", so that a group's integer sum may overflow int32"),
            Concat("Use at most ", kMaxGroupLength));
  }
  node.groups = (node.k + node.block_size - 1) / node.block_size;

  const std::vector<int64_t> expected = {node.groups, node.n};
  if (operands.b_scale_shape != expected) {
    at.Fail(Concat("b_scale has shape ", ShapeText(operands.b_scale_shape), " but B is ", ShapeText(operands.b_shape),
                   " with block_size ", node.block_size),
            Concat("b_scale must be ", ShapeText(expected), ", that is [ceil(K / block_size), N]"));
  }
  return node;
}

}  // namespace fptq
