// Entry point of libfptq_ops: registers the ops of domain "fptq" with one onnxruntime session.
#ifndef FPTQ_FPTQ_OPS_H_
#define FPTQ_FPTQ_OPS_H_

#include "onnxruntime_c_api.h"

#if defined(_WIN32)
#define FPTQ_EXPORT __declspec(dllexport)
#else
#define FPTQ_EXPORT __attribute__((visibility("default")))
#endif

extern "C" {

/// Adds the ops of domain "fptq", version 1, to `options`.
///
/// onnxruntime calls this through `register_custom_ops_library`; a program that links the library statically may call
/// it itself. Works with onnxruntime 1.23 and newer: the API is negotiated with the runtime that calls.
/// Returns nullptr on success, else a status that the caller releases.
FPTQ_EXPORT OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* api_base);

}  // extern "C"

#endif  // FPTQ_FPTQ_OPS_H_
