#include "common/node_location.h"

#include "common/op_names.h"

namespace fptq {

NodeLocation NodeLocation::Of(const char* op, Ort::ConstKernelInfo info) { return {op, info.GetNodeName()}; }

void NodeLocation::Fail(const std::string& reason, const std::string& fix) const {
  throw Ort::Exception(Concat(kDomain, ".", op, " node '", name, "': ", reason, ". ", fix, "."), ORT_INVALID_ARGUMENT);
}

std::string ShapeText(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    if (i > 0) text += ", ";
    text += shape[i] < 0 ? "?" : std::to_string(shape[i]);
  }
  return text + "]";
}

}  // namespace fptq
