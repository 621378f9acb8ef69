// Division as activations are quantized: as exact as the instruction, in fewer of them. Host and device.
#ifndef FPTQ_QUANTIZATION_H_
#define FPTQ_QUANTIZATION_H_

#include <cmath>
#include <cstdint>
#include <cstring>

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

/// 1 / x, wrong by at most one unit in the last place.
FPTQ_HD float RoughReciprocal(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return 1.0f / x;
#endif
}

/// round_half_even(x / scale) of values with at most 11 significant bits (float16, bfloat16) by one multiplication, for
/// most rows; the others are divided.
///
/// Let L be the row's largest magnitude and x / (L / 127) lie next to k + 1/2, that is 254 x next to (2k + 1) L. Both
/// are integers below 2^19 times the same power of two: they differ by a relative 2^-19 at least, or not at all. What
/// is rounded, and the 2^-21 below, is less than 2^-20 together and decides nothing between values that differ. Equal
/// they are if 127 divides 2k + 1 (below 255: it is 127, and |x| = L / 2) or the significand of L. In the first case
/// the rounding of the quotient decides between 63 and 64, and `factor` is made to repeat that; rows of the second kind
/// are divided.
class ShortRowFactor {
 public:
  /// `largest`: finite; `scale`: RowScale(largest); `reciprocal`: 1 / scale, wrong by at most one unit in the last
  /// place.
  FPTQ_HD ShortRowFactor(float largest, float scale, float reciprocal) : factor_(0.0f) {
    uint32_t bits;
    memcpy(&bits, &largest, 4);
    const uint32_t significand = (bits & 0x7FFFFFu) | 0x800000u;
    if (!(largest > 1e-27f && largest < 1e30f) || significand % 127 == 0) return;
    // The quotient L / 2 / scale is rounded to 63.5 or more, then to 64, if it is at least 63.5 - 2^-19: half a unit.
    // The remainder is exact.
    const bool up = fmaf(-63.5f, scale, 0.5f * largest) >= -0x1p-19f * scale;
    factor_ = up ? fmaf(reciprocal, 0x1p-21f, reciprocal) : fmaf(reciprocal, -0x1p-21f, reciprocal);
  }
  /// Whether there is a factor; otherwise RowDivision.
  FPTQ_HD bool Exists() const { return factor_ != 0.0f; }
  /// 1.5 * 2^23 + round_half_even(x / scale): the quotient in the low bits.
  FPTQ_HD float Shifted(float x) const { return fmaf(x, factor_, 12582912.0f); }

 private:
  float factor_;
};

}  // namespace fptq::quantization

#endif  // FPTQ_QUANTIZATION_H_
