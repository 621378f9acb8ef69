// C++ programs that link fptq_ops::fptq_ops: one call before the session is created.
#ifndef FPTQ_REGISTER_H_
#define FPTQ_REGISTER_H_

#include "fptq/fptq_ops.h"
#include "onnxruntime_cxx_api.h"

/// Adds the ops of domain "fptq" to the sessions that are created with `options`. Throws Ort::Exception.
inline void RegisterFptqOps(Ort::SessionOptions& options) {
  Ort::ThrowOnError(FptqRegisterOps(options, OrtGetApiBase()));
}

#endif  // FPTQ_REGISTER_H_
