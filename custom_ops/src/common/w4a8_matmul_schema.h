// fptq.W4A8MatMul: attributes, shapes and their checks, common to all execution providers.
//
//   Y[..., n] = a_scale[...] * sum_g b_scale[g, n] * sum_{k in group g} (A[..., k] - a_zero_point) * B[k, n]
//
//   A            uint8  [..., K]      rank >= 1; zero leading dimensions are allowed
//   a_scale      float  []  or [1] (one scale) or [..., 1] (one per row of A)
//   a_zero_point uint8  []  or [1]
//   B            int4   [K, N]        constant; -8..7, two per byte, low nibble first, row-major
//   b_scale      T      [ceil(K / block_size), N]  constant; any sign; the last group may be short
//   Y            T      [..., N]      T is float32, float16 or bfloat16
//   block_size         rows of B that share a scale, 1..K
//   scale_max_multiple 0, or m in 1..15: all scales of a column are integer multiples, of at most m in magnitude, of
//   one
//                      base value. Kernels verify it before they rely on it.
#ifndef FPTQ_COMMON_W4A8_MATMUL_SCHEMA_H_
#define FPTQ_COMMON_W4A8_MATMUL_SCHEMA_H_

#include <cstdint>
#include <vector>

#include "common/matmul_inputs.h"
#include "common/node_location.h"
#include "common/op_names.h"
#include "common/shape_inference.h"
#include "onnxruntime_cxx_api.h"

namespace fptq {

/// Longest group whose integer sum is sure to fit int32: K * 255 * 8 < 2^31.
inline constexpr int64_t kMaxGroupLength = (int64_t{1} << 31) / (255 * 8);

/// Everything about one node that is known when its kernel is created.
struct W4A8MatMulNode {
  NodeLocation location;
  int64_t k = 0;
  int64_t n = 0;
  int64_t groups = 0;  ///< ceil(k / block_size)
  int64_t block_size = 0;
  int64_t scale_max_multiple = 0;
  int constant_zero_point = -1;  ///< 0..255 where a_zero_point is a constant, else -1

  // Valid while the kernel is constructed, in host memory.
  const uint8_t* b = nullptr;     ///< int4 [k, n]
  const void* b_scale = nullptr;  ///< T [groups, n]

  /// Reads and checks a node; throws Ort::Exception naming it.
  static W4A8MatMulNode Read(Ort::ConstKernelInfo info);

  /// The same for any op with these weights and attributes, whose operands are read already.
  static W4A8MatMulNode Of(const NodeLocation& location, const MatMulOperands& operands, Ort::ConstKernelInfo info);
};

/// The op for one T and one kernel (see OpBase for what the kernel provides).
template <class Kernel, ONNXTensorElementDataType kType>
struct W4A8MatMulOp : MatMulOp<W4A8MatMulOp<Kernel, kType>, Kernel, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT4, kType> {
  const char* GetName() const { return kW4A8MatMul; }
};

}  // namespace fptq

#endif  // FPTQ_COMMON_W4A8_MATMUL_SCHEMA_H_
