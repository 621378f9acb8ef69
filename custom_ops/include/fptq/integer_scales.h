// Recognising integer-structured group scales: every column's scales are base[n] * i with |i| <= 15.
#ifndef FPTQ_INTEGER_SCALES_H_
#define FPTQ_INTEGER_SCALES_H_

#include <cmath>
#include <cstdint>
#include <vector>

#include "fptq/packing.h"

namespace fptq::packing {

/// Scales as multiples: scale[g, n] == base[n] * multiple[g * n_count + n], exactly, in float32.
struct IntegerScales {
  std::vector<float> base;       ///< [n]
  std::vector<int8_t> multiple;  ///< [groups, n]
};

/// The base of one column, or NaN where there is none: the largest magnitude divided by the smallest integer up to
/// `max_multiple` that makes all scales of the column exact multiples. `stride`: distance of a column's scales.
inline float ColumnBase(const float* scales, int64_t groups, int64_t stride, int max_multiple) {
  float largest = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const float magnitude = std::fabs(scales[g * stride]);
    if (!std::isfinite(magnitude)) return std::nanf("");
    if (magnitude > largest) largest = magnitude;
  }
  if (largest == 0) return 1;
  for (int divisor = 1; divisor <= max_multiple; ++divisor) {
    const float base = largest / static_cast<float>(divisor);
    bool exact = base > 0;
    for (int64_t g = 0; exact && g < groups; ++g) {
      exact = base * std::nearbyint(scales[g * stride] / base) == scales[g * stride];
    }
    if (exact) return base;
  }
  return std::nanf("");
}

/// True and `found` filled if all columns of `scales` [groups, n] have the structure.
inline bool FindIntegerScales(const std::vector<float>& scales, int64_t groups, int64_t n, int max_multiple,
                              IntegerScales* found) {
  found->base.resize(static_cast<size_t>(n));
  found->multiple.resize(static_cast<size_t>(groups * n));
  for (int64_t column = 0; column < n; ++column) {
    const float base = ColumnBase(scales.data() + column, groups, n, max_multiple);
    if (std::isnan(base)) return false;
    found->base[static_cast<size_t>(column)] = base;
    for (int64_t g = 0; g < groups; ++g) {
      const size_t at = static_cast<size_t>(g * n + column);
      found->multiple[at] = static_cast<int8_t>(std::nearbyint(scales[at] / base));
    }
  }
  return true;
}

}  // namespace fptq::packing

#endif  // FPTQ_INTEGER_SCALES_H_
