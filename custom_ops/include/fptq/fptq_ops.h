// Entry point of libfptq_ops: registers the ops of domain "fptq" with one onnxruntime session.
#ifndef FPTQ_FPTQ_OPS_H_
#define FPTQ_FPTQ_OPS_H_

#include <stddef.h>
#include <stdint.h>

#include "onnxruntime_c_api.h"

#if defined(_WIN32)
#define FPTQ_EXPORT __declspec(dllexport)
#else
#define FPTQ_EXPORT __attribute__((visibility("default")))
#endif

extern "C" {

/// Adds the ops of domain "fptq", version 1, to `options`.
///
/// onnxruntime calls this through `register_custom_ops_library`. Works with onnxruntime 1.23 and newer: the API is
/// negotiated with the runtime that calls. Returns nullptr on success, else a status that the caller releases.
FPTQ_EXPORT OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* api_base);

/// The same for programs that link this library, by a name that no other op library has; see fptq/register.h for C++.
FPTQ_EXPORT OrtStatus* ORT_API_CALL FptqRegisterOps(OrtSessionOptions* options, const OrtApiBase* api_base);

/// A product of W4A8MatMul or DynamicQuantizeW4A8MatMul, for FptqDescribeProduct.
typedef struct FptqProduct {
  int32_t cuda_device;     ///< index of the GPU, -1 for the CPU kernels
  int32_t integer_scales;  ///< 1 where b_scale is integer-structured (scale_max_multiple) and the kernel verified it
  int32_t float_bytes;     ///< of one element of b_scale and Y: 2 or 4
  int32_t quantizes;       ///< 1 for DynamicQuantizeW4A8MatMul
  int64_t rows;            ///< of A or X, all dimensions but the last together
  int64_t k, n, block_size;
} FptqProduct;

/// What this library holds and what this machine can run of it, as one JSON object:
/// {"version", "cpu": {"available": [name...], "chosen", "few_rows", "few_rows_below", "error"},
///  "cuda": null or {"devices": [{"index", "name", "capability", "bytes", "kernels": [name...]}], "error"}}.
/// Needs no onnxruntime. The text is made by the first call and stays valid.
FPTQ_EXPORT const char* FptqDescribeLibrary(void);

/// Writes the name of the kernel that computes `product` on this machine to `text` (at most `size` bytes with the
/// terminating zero), such as "avx512vnni" or "warpgroup 128x256"; "stream 16x64 quantizing" where a CUDA kernel
/// quantizes the activations itself. Returns 0; or 1, and `text` holds the reason.
FPTQ_EXPORT int FptqDescribeProduct(const FptqProduct* product, char* text, size_t size);

}  // extern "C"

#endif  // FPTQ_FPTQ_OPS_H_
