#include "cpu/packed_weights.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace fptq::cpu {
namespace {

int64_t LargestStructuredK(int64_t max_multiple) {
  return ((int64_t{1} << 31) - 1) / (255 * kWeightOffset * max_multiple);
}

int Nibble(const uint8_t* data, int64_t index) { return (data[index >> 1] >> ((index & 1) * 4)) & 15; }

void PackNibbles(const WeightSource& source, PackedWeights* packed) {
  // 0x88 is a pair of zero weights: it fills channels beyond N and rows beyond a group.
  packed->nibbles.assign(static_cast<size_t>(packed->strips * packed->octets * kOctetBytes), 0x88);
  for (int64_t k = 0; k < packed->k; ++k) {
    const int64_t group = k / packed->block_size;
    const int64_t row = k - group * packed->block_size;
    const int64_t octet = group * packed->group_octets + row / kOctet;
    const int64_t lane = row % 4;
    const int shift = row % kOctet < 4 ? 0 : 4;
    for (int64_t n = 0; n < packed->n; ++n) {
      const int value = Nibble(source.b, k * packed->n + n) ^ kWeightOffset;  // two's complement -> value + 8
      const int64_t strip = n / kStrip;
      uint8_t& byte = packed->nibbles[static_cast<size_t>((strip * packed->octets + octet) * kOctetBytes +
                                                          (n - strip * kStrip) * 4 + lane)];
      byte = static_cast<uint8_t>((byte & ~(15 << shift)) | (value << shift));
    }
  }
}

void PackSums(PackedWeights* packed) {
  packed->sum.assign(static_cast<size_t>(packed->strips * packed->groups * kStrip), 0);
  for (int64_t strip = 0; strip < packed->strips; ++strip) {
    const uint8_t* data = packed->StripNibbles(strip);
    for (int64_t g = 0; g < packed->groups; ++g) {
      int32_t* sum = packed->sum.data() + (strip * packed->groups + g) * kStrip;
      for (int64_t octet = 0; octet < packed->GroupOctets(g); ++octet, data += kOctetBytes) {
        for (int64_t i = 0; i < kOctetBytes; ++i) {
          sum[i / 4] += (data[i] & 15) + (data[i] >> 4) - 2 * kWeightOffset;
        }
      }
    }
  }
}

bool PackStructuredScales(const WeightSource& source, PackedWeights* packed) {
  const size_t strips = static_cast<size_t>(packed->strips);
  const size_t groups = static_cast<size_t>(packed->groups);
  AlignedVector<float> base(strips * kStrip, 0.0f);
  AlignedVector<int8_t> multiple(strips * groups * kStrip, 0);
  std::vector<float> column(groups);
  std::vector<int8_t> integers(groups);
  for (int64_t n = 0; n < packed->n; ++n) {
    const int64_t strip = n / kStrip;
    const int64_t lane = n % kStrip;
    for (int64_t g = 0; g < packed->groups; ++g) {
      column[static_cast<size_t>(g)] = LoadElement(source.b_scale, source.type, g * packed->n + n);
    }
    if (!ScaleMultiples(column.data(), packed->groups, source.scale_max_multiple,
                        &base[static_cast<size_t>(strip * kStrip + lane)], integers.data())) {
      return false;
    }
    for (int64_t g = 0; g < packed->groups; ++g) {
      multiple[static_cast<size_t>((strip * packed->groups + g) * kStrip + lane)] = integers[static_cast<size_t>(g)];
    }
  }
  packed->scale = std::move(base);
  packed->multiple = std::move(multiple);
  return true;
}

void PackScales(const WeightSource& source, PackedWeights* packed) {
  packed->scale.assign(static_cast<size_t>(packed->strips * packed->groups * kStrip), 0.0f);
  for (int64_t g = 0; g < packed->groups; ++g) {
    for (int64_t n = 0; n < packed->n; ++n) {
      packed->scale[static_cast<size_t>(((n / kStrip) * packed->groups + g) * kStrip + n % kStrip)] =
          LoadElement(source.b_scale, source.type, g * packed->n + n);
    }
  }
}

}  // namespace

size_t PackedWeights::bytes() const {
  return nibbles.size() + scale.size() * sizeof(float) + multiple.size() + sum.size() * sizeof(int32_t);
}

bool ScaleMultiples(const float* scale, int64_t groups, int64_t max_multiple, float* base, int8_t* multiple) {
  float smallest = 0.0f;
  for (int64_t g = 0; g < groups; ++g) {
    const float magnitude = std::fabs(scale[g]);
    if (!std::isfinite(magnitude)) return false;
    if (magnitude > 0.0f && (smallest == 0.0f || magnitude < smallest)) smallest = magnitude;
  }
  if (smallest == 0.0f) {
    *base = 0.0f;
    std::fill(multiple, multiple + groups, int8_t{0});
    return true;
  }
  // The smallest scale is base * i for some i; dividing an exact product by i gives the base back exactly.
  for (int64_t i = 1; i <= max_multiple; ++i) {
    const float candidate = smallest / static_cast<float>(i);
    if (candidate == 0.0f) break;
    bool fits = true;
    for (int64_t g = 0; fits && g < groups; ++g) {
      const float ratio = std::nearbyint(scale[g] / candidate);
      fits = std::fabs(ratio) <= static_cast<float>(max_multiple) && ratio * candidate == scale[g];
      if (fits) multiple[g] = static_cast<int8_t>(ratio);
    }
    if (fits) {
      *base = candidate;
      return true;
    }
  }
  return false;
}

PackedWeights Pack(const WeightSource& source) {
  PackedWeights packed;
  packed.k = source.k;
  packed.n = source.n;
  packed.block_size = source.block_size;
  packed.groups = CeilDiv(source.k, source.block_size);
  packed.strips = CeilDiv(source.n, kStrip);
  packed.group_octets = CeilDiv(source.block_size, kOctet);
  packed.octets = (packed.groups - 1) * packed.group_octets + packed.GroupOctets(packed.groups - 1);
  PackNibbles(source, &packed);
  packed.structured = source.scale_max_multiple > 0 && source.k <= LargestStructuredK(source.scale_max_multiple) &&
                      PackStructuredScales(source, &packed);
  if (!packed.structured) PackScales(source, &packed);
  if (!source.zero_point_is_128) PackSums(&packed);
  return packed;
}

}  // namespace fptq::cpu
