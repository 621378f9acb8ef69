// The int4 weights of one node in the layout that every CPU kernel reads.
//
// Output channels are cut into strips of 16. A strip holds its groups one after the other; a group holds octets of 8
// rows of B, padded with zero weights to a whole octet. An octet is 64 bytes: byte 4 c + i holds B + 8 of channel c,
// row i in the low nibble and row 4 + i in the high one (0 <= i < 4). So one 64-byte load, a mask and a shift give two
// operands of vpdpbusd (16 channels x 4 rows), two rows of an AMX tile, or four operands each of NEON's dot products.
#ifndef FPTQ_CPU_PACKED_WEIGHTS_H_
#define FPTQ_CPU_PACKED_WEIGHTS_H_

#include <cstdint>

#include "cpu/aligned_buffer.h"
#include "cpu/element.h"

namespace fptq::cpu {

inline constexpr int64_t kStrip = 16;
inline constexpr int64_t kOctet = 8;
inline constexpr int64_t kOctetBytes = 64;
inline constexpr int kWeightOffset = 8;
inline constexpr int kActivationOffset = 128;

struct PackedWeights {
  int64_t k = 0;
  int64_t n = 0;
  int64_t block_size = 0;
  int64_t groups = 0;
  int64_t strips = 0;              ///< ceil(n / 16)
  int64_t group_octets = 0;        ///< octets of a full group
  int64_t octets = 0;              ///< octets of one strip
  bool structured = false;         ///< scale(g, n) = scale(n) * multiple(g, n)
  AlignedVector<uint8_t> nibbles;  ///< [strips][octets][64]
  AlignedVector<float> scale;      ///< [strips][groups][16], or [strips][16] where structured
  AlignedVector<int8_t> multiple;  ///< [strips][groups][16] where structured, else empty
  AlignedVector<int32_t> sum;      ///< [strips][groups][16] sums of B over a group; empty where the zero point is 128

  /// Rows of B in group g, and the octets they fill.
  int64_t GroupRows(int64_t g) const { return g + 1 < groups ? block_size : k - g * block_size; }
  int64_t GroupOctets(int64_t g) const { return CeilDiv(GroupRows(g), kOctet); }
  /// K after padding, and the distance of two rows of prepared activations: an odd number of cache lines, since rows a
  /// power of two apart would share few sets of the first-level cache.
  int64_t padded_k() const { return octets * kOctet; }
  int64_t a_stride() const { return (CeilDiv(padded_k(), kAlignment) | 1) * kAlignment; }
  size_t bytes() const;

  const uint8_t* StripNibbles(int64_t strip) const { return nibbles.data() + strip * octets * kOctetBytes; }
};

struct WeightSource {
  int64_t k = 0;
  int64_t n = 0;
  int64_t block_size = 0;
  const uint8_t* b = nullptr;     ///< int4 [k, n], two per byte, low nibble first
  const void* b_scale = nullptr;  ///< [ceil(k / block_size), n]
  ElementType type = ElementType::kFloat32;
  int64_t scale_max_multiple = 0;  ///< 0: none announced
  bool zero_point_is_128 = false;  ///< known at session creation
};

/// Packs the weights. `structured` is set only where every column really is base * integer (see ScaleMultiples) and
/// the integer sum over all of K fits int32.
PackedWeights Pack(const WeightSource& source);

/// Finds base and integers with scale[g] = base * multiple[g] exactly in float32 and |multiple[g]| <= max_multiple.
/// `scale` and `multiple` have `groups` entries. Returns false where there are none.
bool ScaleMultiples(const float* scale, int64_t groups, int64_t max_multiple, float* base, int8_t* multiple);

}  // namespace fptq::cpu

#endif  // FPTQ_CPU_PACKED_WEIGHTS_H_
