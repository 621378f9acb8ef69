// Owns the op objects of the library and the domain that holds them.
#ifndef FPTQ_REGISTER_OP_REGISTRY_H_
#define FPTQ_REGISTER_OP_REGISTRY_H_

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "onnxruntime_cxx_api.h"

namespace fptq {

/// onnxruntime keeps pointers to ops and domain for as long as any session lives, so a registry is never destroyed.
class OpRegistry {
 public:
  /// `api_version`: the version of the C API negotiated with the runtime; stamped on every op.
  OpRegistry(const char* domain, uint32_t api_version) : domain_(domain), api_version_(api_version) {}
  OpRegistry(const OpRegistry&) = delete;
  OpRegistry& operator=(const OpRegistry&) = delete;

  /// Adds one op (one name, one combination of types, one execution provider), built from `args`.
  template <class Op, class... Args>
  void Add(Args&&... args) {
    auto op = std::make_shared<Op>(std::forward<Args>(args)...);
    op->version = api_version_;
    domain_.Add(op.get());
    ops_.push_back(std::move(op));
  }

  const Ort::CustomOpDomain& domain() const { return domain_; }

 private:
  Ort::CustomOpDomain domain_;
  uint32_t api_version_;
  std::vector<std::shared_ptr<OrtCustomOp>> ops_;
};

}  // namespace fptq

#endif  // FPTQ_REGISTER_OP_REGISTRY_H_
