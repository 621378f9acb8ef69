// Division as activations are quantized: as exact as the instruction, in fewer of them. Host and device.
#ifndef FPTQ_QUANTIZATION_H_
#define FPTQ_QUANTIZATION_H_

#include <cmath>

#include "fptq/packing.h"

namespace fptq::quantization {

/// x / divisor, correctly rounded, where `reciprocal` is the correctly rounded 1 / divisor and no step leaves the range
/// of normal numbers other than towards zero (P. Markstein, Computation of elementary functions on the IBM RISC
/// System/6000 processor, 1990, theorem 2).
FPTQ_HD float Divide(float x, float divisor, float reciprocal) {
  const float quotient = x * reciprocal;
  return fmaf(fmaf(-quotient, divisor, x), reciprocal, quotient);
}

/// Scale of a row whose largest magnitude is `largest`, which is finite: largest / 127, or 1 where that is zero.
FPTQ_HD float RowScale(float largest) {
  if (largest > 1e-30f) return Divide(largest, 127.0f, 1.0f / 127.0f);
  const float scale = largest / 127.0f;
  return scale == 0.0f ? 1.0f : scale;
}

/// Quotients of one row's values by its scale.
class RowDivision {
 public:
  FPTQ_HD explicit RowDivision(float scale) : factor_(1.0f) {
    if (!(scale > 1e-30f && scale < 1e30f)) factor_ = scale < 1.0f ? 0x1p90f : 0x1p-64f;  // powers of two: exact
    scale_ = scale * factor_;
    reciprocal_ = 1.0f / scale_;
  }
  /// Whether values need `Prepare` before they are divided: next to never.
  FPTQ_HD bool Rescales() const { return factor_ != 1.0f; }
  /// x in the range of the division. A subnormal scale is rounded so much that quotients may exceed 127: not here.
  FPTQ_HD float Prepare(float x) const { return fminf(fmaxf(x * factor_, -127.0f * scale_), 127.0f * scale_); }
  /// x / scale, correctly rounded; at most 127 and half a unit in the last place.
  FPTQ_HD float operator()(float x) const { return Divide(x, scale_, reciprocal_); }

 private:
  float factor_, scale_, reciprocal_;
};

}  // namespace fptq::quantization

#endif  // FPTQ_QUANTIZATION_H_
