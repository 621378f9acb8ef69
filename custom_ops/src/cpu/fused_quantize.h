// RMSNorm and SiLU that end in uint8 activations (fused_quantize_schema.h says what they compute).
#ifndef FPTQ_CPU_FUSED_QUANTIZE_H_
#define FPTQ_CPU_FUSED_QUANTIZE_H_

#include <cstdint>

#include "cpu/element.h"

namespace fptq::cpu {

/// Where rows of float values go as uint8. All rows have `k` values.
struct QuantizedRows {
  int64_t k = 0;
  uint8_t* y = nullptr;
  const float* static_scale = nullptr;  ///< null: one per row, found from its values
  uint8_t zero_point = 128;             ///< of static_scale
  float* scale = nullptr;               ///< [rows], where there is no static one
};

struct NormCall {
  const void* x = nullptr;
  const void* skip = nullptr;  ///< or null
  const void* weight = nullptr;
  void* sum = nullptr;  ///< written where there is a skip
  ElementType type = ElementType::kFloat32;
  float epsilon = 0.0f;
  QuantizedRows target;
};

struct SiluMulCall {
  const void* gate = nullptr;
  const void* up = nullptr;
  ElementType type = ElementType::kFloat32;
  QuantizedRows target;
};

/// Rows [begin, end); `buffer` is 64-byte aligned room for k floats, rounded up to 16.
using NormFunction = void (*)(const NormCall& call, int64_t begin, int64_t end, float* buffer);
using SiluMulFunction = void (*)(const SiluMulCall& call, int64_t begin, int64_t end, float* buffer);

/// exp of -88..88, a polynomial on +-ln(2)/2 (the coefficients are those of Cephes' expf), written so that every
/// instruction set gives the same bits.
namespace exp_constants {
inline constexpr float kLimit = 88.0f;
inline constexpr float kLog2E = 1.44269504088896341f;
inline constexpr float kMinusLn2High = -0.693359375f;
inline constexpr float kMinusLn2Low = 2.12194440e-4f;
inline constexpr float kPolynomial[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                        4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
}  // namespace exp_constants

/// Sixteen partial sums of squares, lane i of values i, i + 16, ..., added up in a fixed order.
inline double AddLanes(double* lane) {
  for (int distance = 8; distance > 0; distance /= 2) {
    for (int i = 0; i < distance; ++i) lane[i] += lane[i + distance];
  }
  return lane[0];
}

namespace portable {
void NormRows(const NormCall& call, int64_t begin, int64_t end, float* buffer);
void SiluMulRows(const SiluMulCall& call, int64_t begin, int64_t end, float* buffer);
}  // namespace portable

}  // namespace fptq::cpu

#endif  // FPTQ_CPU_FUSED_QUANTIZE_H_
