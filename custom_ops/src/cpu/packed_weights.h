// The int4 or int8 weights of one node in the layout that every CPU kernel reads.
//
// Output channels are cut into strips of 16. A strip holds its groups one after the other; a group holds octets of 8
// rows of B, padded with zero weights to a whole octet. An octet is 64 bytes: byte 4 c + i holds B + 8 of channel c,
// row i in the low nibble and row 4 + i in the high one (0 <= i < 4). So one 64-byte load, a mask and a shift give two
// operands of vpdpbusd (16 channels x 4 rows), two rows of an AMX tile, or four operands each of NEON's dot products.
//
// Of int8 weights an octet is 128 bytes: byte 4 c + i holds B + 128 of row i, byte 64 + 4 c + i that of row 4 + i.
// They are one group, padded to whole AMX tiles of 64 rows, which can so be loaded from here.
#ifndef FPTQ_CPU_PACKED_WEIGHTS_H_
#define FPTQ_CPU_PACKED_WEIGHTS_H_

#include <cstdint>

#include "cpu/aligned_buffer.h"
#include "cpu/element.h"

namespace fptq::cpu {

inline constexpr int64_t kStrip = 16;
inline constexpr int64_t kOctet = 8;
inline constexpr int64_t kQuadBytes = 64;  // 16 channels x 4 rows, as bytes
inline constexpr int kActivationOffset = 128;

struct PackedWeights {
  int bits = 4;
  int64_t k = 0;
  int64_t n = 0;
  int64_t block_size = 0;
  int64_t groups = 0;
  int64_t strips = 0;              ///< ceil(n / 16)
  int64_t group_octets = 0;        ///< octets of a full group
  int64_t octets = 0;              ///< octets of one strip
  bool structured = false;         ///< scale(g, n) = scale(n) * multiple(g, n)
  AlignedVector<uint8_t> data;     ///< [strips][octets][octet_bytes()]
  AlignedVector<float> scale;      ///< [strips][groups][16], or [strips][16] where structured
  AlignedVector<int8_t> multiple;  ///< [strips][groups][16] where structured, else empty
  AlignedVector<int32_t> sum;      ///< [strips][groups][16] sums of B over a group; empty where the zero point is 128

  /// Rows of B in group g, and the octets they fill.
  int64_t GroupRows(int64_t g) const { return g + 1 < groups ? block_size : k - g * block_size; }
  int64_t GroupOctets(int64_t g) const {
    return bits == 4 ? CeilDiv(GroupRows(g), kOctet) : RoundUp(CeilDiv(GroupRows(g), kOctet), kOctet);
  }
  /// K after padding, and the distance of two rows of prepared activations: an odd number of cache lines, since rows a
  /// power of two apart would share few sets of the first-level cache.
  int64_t padded_k() const { return octets * kOctet; }
  int64_t a_stride() const { return (CeilDiv(padded_k(), kAlignment) | 1) * kAlignment; }
  size_t bytes() const;

  int64_t octet_bytes() const { return kStrip * bits; }
  int64_t strip_bytes() const { return octets * octet_bytes(); }
  const uint8_t* StripData(int64_t strip) const { return data.data() + strip * strip_bytes(); }
  /// What was added to B: 8 or 128.
  int32_t offset() const { return 1 << (bits - 1); }
  /// What takes the offset back out of sum a (B + offset), from sum a; modulo 2^32, as all sums here.
  int32_t StartValue(int32_t a_sum) const {
    return static_cast<int32_t>(0u - static_cast<uint32_t>(offset()) * static_cast<uint32_t>(a_sum));
  }
};

struct WeightSource {
  int64_t k = 0;
  int64_t n = 0;
  int64_t block_size = 0;
  int bits = 4;                   ///< 4, or 8 with block_size k
  const void* b = nullptr;        ///< int4 [k, n], two per byte, low nibble first; or int8 [k, n]
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
