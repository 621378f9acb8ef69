// fptq.W8A8MatMul: shapes and their checks, common to all execution providers.
//
//   Y[..., n] = T(float(sum_k (A[..., k] - a_zero_point) * B[k, n]) * float(b_scale[n]) * a_scale[...])
//
// The sum is an exact integer; the two products are rounded to float32 in this order, the result to T.
//
//   A            uint8  [..., K]      rank >= 1; zero leading dimensions are allowed
//   a_scale      float  []  or [1] (one scale) or [..., 1] (one per row of A)
//   a_zero_point uint8  []  or [1]
//   B            int8   [K, N]        constant, row-major
//   b_scale      T      [N]           constant; any sign
//   Y            T      [..., N]      T is float32, float16 or bfloat16
#ifndef FPTQ_COMMON_W8A8_MATMUL_SCHEMA_H_
#define FPTQ_COMMON_W8A8_MATMUL_SCHEMA_H_

#include <cstdint>

#include "common/matmul_inputs.h"
#include "common/node_location.h"
#include "common/op_names.h"
#include "onnxruntime_cxx_api.h"

namespace fptq {

/// Largest K for which no sum, nor any term that kernels split it into, leaves int32: 2 * 128 * 128 * K < 2^31.
inline constexpr int64_t kMaxInt8Length = 65535;

/// Everything about one node that is known when its kernel is created.
struct W8A8MatMulNode {
  NodeLocation location;
  int64_t k = 0;
  int64_t n = 0;
  int constant_zero_point = -1;  ///< 0..255 where a_zero_point is a constant, else -1

  // Valid while the kernel is constructed, in host memory.
  const int8_t* b = nullptr;      ///< [k, n]
  const void* b_scale = nullptr;  ///< T [n]

  /// Reads and checks a node; throws Ort::Exception naming it.
  static W8A8MatMulNode Read(Ort::ConstKernelInfo info);
};

/// The op for one T and one kernel (see OpBase for what the kernel provides).
template <class Kernel, ONNXTensorElementDataType kType>
struct W8A8MatMulOp : MatMulOp<W8A8MatMulOp<Kernel, kType>, Kernel, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8, kType> {
  const char* GetName() const { return kW8A8MatMul; }
};

}  // namespace fptq

#endif  // FPTQ_COMMON_W8A8_MATMUL_SCHEMA_H_
