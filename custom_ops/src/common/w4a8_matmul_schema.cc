#include "common/w4a8_matmul_schema.h"

#include <numeric>

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

W4A8MatMulNode W4A8MatMulNode::Read(Ort::ConstKernelInfo info) {
  W4A8MatMulNode node;
  node.location = NodeLocation::Of(kW4A8MatMul, info);
  const NodeLocation& at = node.location;
  node.block_size = RequiredInt(at, info, "block_size");
  node.scale_max_multiple = OptionalInt(at, info, "scale_max_multiple", 0);
  if (node.scale_max_multiple < 0 || node.scale_max_multiple > kLargestMultiple) {
    at.Fail(Concat("scale_max_multiple is ", node.scale_max_multiple), "Use 0 (none) or 1..15");
  }

  const Ort::ConstValue b = ConstantInput(at, info, kInputB, "B");
  const std::vector<int64_t> b_shape = b.GetTensorTypeAndShapeInfo().GetShape();
  if (b_shape.size() != 2) at.Fail(Concat("B has shape ", ShapeText(b_shape)), "B must be [K, N]");
  node.k = b_shape[0];
  node.n = b_shape[1];
  if (node.k < 1 || node.n < 1) at.Fail(Concat("B has shape ", ShapeText(b_shape)), "K and N must be at least 1");
  if (node.block_size < 1 || node.block_size > node.k) {
    at.Fail(Concat("block_size is ", node.block_size, " but K is ", node.k),
            "Use 1..K; K itself means one scale per output channel");
  }
  if (node.block_size > kMaxGroupLength) {
    at.Fail(Concat("block_size is ", node.block_size, ", so that a group's integer sum may overflow int32"),
            Concat("Use at most ", kMaxGroupLength));
  }
  node.groups = (node.k + node.block_size - 1) / node.block_size;

  const Ort::ConstValue b_scale = ConstantInput(at, info, kInputBScale, "b_scale");
  const std::vector<int64_t> scale_shape = b_scale.GetTensorTypeAndShapeInfo().GetShape();
  if (scale_shape != std::vector<int64_t>{node.groups, node.n}) {
    at.Fail(Concat("b_scale has shape ", ShapeText(scale_shape), " but B is ", ShapeText(b_shape), " with block_size ",
                   node.block_size),
            Concat("b_scale must be ", ShapeText({node.groups, node.n}), ", that is [ceil(K / block_size), N]"));
  }

  const std::vector<int64_t> a_shape = DeclaredShape(info, kInputA);
  if (!a_shape.empty() && a_shape.back() >= 0 && a_shape.back() != node.k) {
    at.Fail(Concat("A has shape ", ShapeText(a_shape), " but B is ", ShapeText(b_shape)),
            "A's last dimension must equal B's first");
  }
  CheckZeroPoint(at, DeclaredShape(info, kInputAZeroPoint));
  int zero_point_is_constant = 0;
  const Ort::ConstValue zero_point = info.GetTensorConstantInput(kInputAZeroPoint, &zero_point_is_constant);
  if (zero_point_is_constant != 0) {
    CheckZeroPoint(at, zero_point.GetTensorTypeAndShapeInfo().GetShape());
    const bool on_host = zero_point.GetTensorMemoryInfo().GetDeviceType() == OrtMemoryInfoDeviceType_CPU;
    if (on_host) node.constant_zero_point = *zero_point.GetTensorData<uint8_t>();
  }

  node.b = static_cast<const uint8_t*>(b.GetTensorRawData());
  node.b_scale = b_scale.GetTensorRawData();
  return node;
}

W4A8MatMulCall W4A8MatMulCall::Check(const W4A8MatMulNode& node, const std::vector<int64_t>& a,
                                     const std::vector<int64_t>& a_scale, const std::vector<int64_t>& a_zero_point) {
  if (a.empty() || a.back() != node.k) {
    node.location.Fail(Concat("A has shape ", ShapeText(a), " but K is ", node.k),
                       "A's last dimension must be K, the first dimension of B");
  }
  CheckZeroPoint(node.location, a_zero_point);
  W4A8MatMulCall call;
  call.shape = a;
  call.shape.back() = node.n;
  call.rows = std::accumulate(a.begin(), a.end() - 1, int64_t{1}, [](int64_t x, int64_t y) { return x * y; });
  call.per_token = !IsScalar(a_scale);
  if (call.per_token) {
    std::vector<int64_t> expected = a;
    expected.back() = 1;
    if (a_scale != expected) {
      node.location.Fail(Concat("a_scale has shape ", ShapeText(a_scale), " but A is ", ShapeText(a)),
                         Concat("Give one scale (shape []) or one per row, shape ", ShapeText(expected)));
    }
  }
  return call;
}

void InferW4A8MatMulShapes(InferenceContext& context) {
  SymbolicShape shape = context.InputShape(kInputA);
  const SymbolicShape b = context.InputShape(kInputB);
  if (shape.empty() || b.size() != 2) return;  // unknown rank
  shape.back() = b[1];
  // The runtime asks the op of one T for all of them, so T is what the node has.
  context.SetOutputShape(0, shape, context.InputType(kInputBScale));
}

}  // namespace fptq
