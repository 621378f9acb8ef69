// Errors that name the node, the reason and the fix.
#ifndef FPTQ_COMMON_NODE_LOCATION_H_
#define FPTQ_COMMON_NODE_LOCATION_H_

#include <cstdint>
#include <sstream>
#include <string>
#include <vector>

#include "onnxruntime_cxx_api.h"

namespace fptq {

/// The node a kernel was created for, as a user finds it in the model.
struct NodeLocation {
  std::string op;    ///< operator type without domain
  std::string name;  ///< node name, may be empty

  static NodeLocation Of(const char* op, Ort::ConstKernelInfo info);

  /// Throws Ort::Exception(ORT_INVALID_ARGUMENT) "fptq.<op> node '<name>': <reason>. <fix>."
  [[noreturn]] void Fail(const std::string& reason, const std::string& fix) const;
};

/// Joins the arguments as an ostream prints them.
template <class... Args>
std::string Concat(const Args&... args) {
  std::ostringstream stream;
  (stream << ... << args);
  return stream.str();
}

/// "[2, ?, 64]"; unknown dimensions are -1.
std::string ShapeText(const std::vector<int64_t>& shape);

}  // namespace fptq

#endif  // FPTQ_COMMON_NODE_LOCATION_H_
