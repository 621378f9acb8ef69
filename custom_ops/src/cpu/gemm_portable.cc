// GEMM in plain C++: the kernel of last resort and the statement of what the others compute.
#include "cpu/gemm_portable.h"

#include <algorithm>

namespace fptq::cpu::portable {
namespace {

// sum_{k in group} (A - zero point) * B for the 16 channels of a strip; exact. The sum fits int32, parts of it need
// not: unsigned arithmetic, which wraps.
void GroupSums(const GemmCall& call, const uint8_t* data, const int8_t* a, int64_t octets, int32_t a_start,
               const int32_t* weight_sum, uint32_t* acc) {
  const PackedWeights& w = *call.weights;
  // (a - z) * (u - o) = a u - o a - z (u - o), with a = A - 128, z = zero point - 128, u = B + o, o = 8 or 128
  for (int64_t c = 0; c < kStrip; ++c) {
    const int32_t zero = weight_sum != nullptr ? weight_sum[c] : 0;
    acc[c] = static_cast<uint32_t>(a_start) - static_cast<uint32_t>(call.zero_offset * zero);
  }
  for (int64_t octet = 0; octet < octets; ++octet, data += w.octet_bytes(), a += kOctet) {
    for (int64_t c = 0; c < kStrip; ++c) {
      int32_t sum = 0;
      for (int64_t i = 0; i < 4; ++i) {
        const uint8_t both = data[4 * c + i];
        sum += w.bits == 4 ? (both & 15) * a[i] + (both >> 4) * a[4 + i]
                           : both * a[i] + data[kQuadBytes + 4 * c + i] * a[4 + i];
      }
      acc[c] += static_cast<uint32_t>(sum);
    }
  }
}

}  // namespace

void Gemm(const GemmCall& call, int64_t row_begin, int64_t row_end, int64_t strip_begin, int64_t strip_end) {
  const PackedWeights& w = *call.weights;
  for (int64_t strip = strip_begin; strip < strip_end; ++strip) {
    for (int64_t row = row_begin; row < row_end; ++row) {
      int32_t total[kStrip] = {};
      float sum[kStrip] = {};
      for (int64_t g = 0; g < w.groups; ++g) {
        const int64_t index = (strip * w.groups + g) * kStrip;
        const int64_t first = g * w.group_octets;
        uint32_t acc[kStrip];
        GroupSums(call, w.StripData(strip) + first * w.octet_bytes(), call.a + row * w.a_stride() + first * kOctet,
                  w.GroupOctets(g), call.a_start[row * w.groups + g],
                  call.zero_offset != 0 ? w.sum.data() + index : nullptr, acc);
        for (int64_t c = 0; c < kStrip; ++c) {
          if (w.structured) {
            total[c] += static_cast<int32_t>(acc[c]) * w.multiple[static_cast<size_t>(index + c)];
          } else {
            sum[c] += static_cast<float>(static_cast<int32_t>(acc[c])) * w.scale[static_cast<size_t>(index + c)];
          }
        }
      }
      const float a_scale = LoadUnaligned<float>(call.a_scale, call.per_token ? row : 0);
      for (int64_t c = 0; c < std::min(kStrip, w.n - strip * kStrip); ++c) {
        if (w.structured) sum[c] = static_cast<float>(total[c]) * w.scale[static_cast<size_t>(strip * kStrip + c)];
        StoreElement(call.y, call.type, row * w.n + strip * kStrip + c, sum[c] * a_scale);
      }
    }
  }
}

void Prepare(const PackedWeights& w, const uint8_t* a, int64_t rows, int8_t* prepared, int32_t* a_start) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t g = 0; g < w.groups; ++g) {
      const int64_t length = w.GroupRows(g);
      const int64_t padded = w.GroupOctets(g) * kOctet;
      int32_t sum = 0;
      for (int64_t i = 0; i < length; ++i) {
        prepared[i] = static_cast<int8_t>(a[i] - kActivationOffset);
        sum += prepared[i];
      }
      std::fill(prepared + length, prepared + padded, int8_t{0});
      *a_start++ = w.StartValue(sum);
      a += length;
      prepared += padded;
    }
    prepared += w.a_stride() - w.padded_k();
  }
}

}  // namespace fptq::cpu::portable

namespace fptq::cpu {

const Kernels kPortableKernels = {"portable",           portable::Gemm,     portable::Prepare,
                                  portable::Quantize,   portable::NormRows, portable::SiluMulRows,
                                  portable::RotateHead, portable::Attend,   64};

}  // namespace fptq::cpu
