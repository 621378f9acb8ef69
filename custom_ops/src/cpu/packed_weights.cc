#include "cpu/packed_weights.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace fptq::cpu {
namespace {

int64_t LargestStructuredK(int64_t max_multiple) { return ((int64_t{1} << 31) - 1) / (255 * 8 * max_multiple); }

int Nibble(const void* data, int64_t index) {
  return (static_cast<const uint8_t*>(data)[index >> 1] >> ((index & 1) * 4)) & 15;
}

// One octet of one strip, any shape. `row` is its first row of B, `rows` how many of its 8 exist.
void PackOctet(const WeightSource& source, int64_t row, int64_t rows, int64_t strip, uint8_t* octet) {
  const int64_t channels = std::min(kStrip, source.n - strip * kStrip);
  for (int64_t r = 0; r < rows; ++r) {
    const int shift = r < 4 ? 0 : 4;
    for (int64_t c = 0; c < channels; ++c) {
      const int value = Nibble(source.b, (row + r) * source.n + strip * kStrip + c) ^ 8;
      uint8_t& byte = octet[4 * c + r % 4];
      byte = static_cast<uint8_t>((byte & ~(15 << shift)) | (value << shift));
    }
  }
}

// One whole octet where N is even, so that 16 channels are 8 bytes. Channels 2 j are the low nibbles.
void PackWholeOctet(const WeightSource& source, int64_t row, int64_t strip, uint8_t* octet) {
  constexpr uint64_t kOffset = 0x8888888888888888u;  // two's complement -> value + 8
  constexpr uint64_t kLow = 0x0f0f0f0f0f0f0f0fu;
  const uint8_t* first = static_cast<const uint8_t*>(source.b) + (row * source.n + strip * kStrip) / 2;
  for (int64_t i = 0; i < 4; ++i) {
    uint64_t low, high;
    std::memcpy(&low, first + i * source.n / 2, sizeof(low));
    std::memcpy(&high, first + (i + 4) * source.n / 2, sizeof(high));
    low ^= kOffset;
    high ^= kOffset;
    uint8_t even[8], odd[8];
    const uint64_t even_bytes = (low & kLow) | ((high & kLow) << 4);
    const uint64_t odd_bytes = ((low >> 4) & kLow) | (high & ~kLow);
    std::memcpy(even, &even_bytes, sizeof(even));
    std::memcpy(odd, &odd_bytes, sizeof(odd));
    for (int64_t j = 0; j < 8; ++j) {
      octet[8 * j + i] = even[j];
      octet[8 * j + 4 + i] = odd[j];
    }
  }
}

void PackNibbles(const WeightSource& source, PackedWeights* packed) {
  for (int64_t octet = 0; octet < packed->octets; ++octet) {
    const int64_t group = octet / packed->group_octets;
    const int64_t row_of_group = (octet - group * packed->group_octets) * kOctet;
    const int64_t row = group * packed->block_size + row_of_group;
    const int64_t rows = std::min(kOctet, packed->GroupRows(group) - row_of_group);
    for (int64_t strip = 0; strip < packed->strips; ++strip) {
      uint8_t* target = packed->data.data() + strip * packed->strip_bytes() + octet * packed->octet_bytes();
      if (rows == kOctet && packed->n % 2 == 0 && (strip + 1) * kStrip <= packed->n) {
        PackWholeOctet(source, row, strip, target);
      } else {
        PackOctet(source, row, rows, strip, target);
      }
    }
  }
}

// Rows of B at a time, so that both sides are walked in order.
void PackBytes(const WeightSource& source, PackedWeights* packed) {
  const auto* row = static_cast<const uint8_t*>(source.b);
  for (int64_t k = 0; k < packed->k; ++k, row += packed->n) {
    uint8_t* quad = packed->data.data() + k / 4 * kQuadBytes + k % 4;
    for (int64_t strip = 0; strip < packed->strips; ++strip, quad += packed->strip_bytes()) {
      const int64_t channels = std::min(kStrip, packed->n - strip * kStrip);
      for (int64_t c = 0; c < channels; ++c) quad[4 * c] = row[strip * kStrip + c] ^ 0x80;
    }
  }
}

// Sums of B over each group.
void PackSums(PackedWeights* packed) {
  packed->sum.assign(static_cast<size_t>(packed->strips * packed->groups * kStrip), 0);
  for (int64_t strip = 0; strip < packed->strips; ++strip) {
    const uint8_t* data = packed->StripData(strip);
    for (int64_t g = 0; g < packed->groups; ++g) {
      int32_t* sum = packed->sum.data() + (strip * packed->groups + g) * kStrip;
      for (int64_t octet = 0; octet < packed->GroupOctets(g); ++octet, data += packed->octet_bytes()) {
        for (int64_t i = 0; i < kQuadBytes; ++i) {
          const int both = packed->bits == 4 ? (data[i] & 15) + (data[i] >> 4) : data[i] + data[kQuadBytes + i];
          sum[i / 4] += both - 2 * packed->offset();
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
  return data.size() + scale.size() * sizeof(float) + multiple.size() + sum.size() * sizeof(int32_t);
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
  packed.bits = source.bits;
  packed.k = source.k;
  packed.n = source.n;
  packed.block_size = source.block_size;
  packed.groups = CeilDiv(source.k, source.block_size);
  packed.strips = CeilDiv(source.n, kStrip);
  packed.group_octets = packed.GroupOctets(0);
  packed.octets = (packed.groups - 1) * packed.group_octets + packed.GroupOctets(packed.groups - 1);
  // Zero weights fill channels beyond N and rows beyond a group.
  packed.data.assign(static_cast<size_t>(packed.strips * packed.strip_bytes()), source.bits == 4 ? 0x88 : 0x80);
  if (source.bits == 4) {
    PackNibbles(source, &packed);
  } else {
    PackBytes(source, &packed);
  }
  packed.structured = source.scale_max_multiple > 0 && source.k <= LargestStructuredK(source.scale_max_multiple) &&
                      PackStructuredScales(source, &packed);
  if (!packed.structured) PackScales(source, &packed);
  if (!source.zero_point_is_128) PackSums(&packed);
  return packed;
}

}  // namespace fptq::cpu
