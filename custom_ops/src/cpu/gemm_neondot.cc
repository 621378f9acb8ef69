// Kernels for Arm NEON with dot products (FEAT_DotProd): four 128-bit registers hold 16 channels.
#include <arm_neon.h>

#include <cstdint>
#include <utility>

#include "cpu/element.h"
#include "cpu/fused_quantize.h"
#include "cpu/gemm.h"
#include "cpu/gemm_portable.h"
#include "cpu/target.h"

FPTQ_TARGET_BEGIN("arch=armv8.2-a+dotprod")
namespace fptq::cpu {
namespace {

#define FPTQ_QUARTERS _Pragma("GCC unroll 4") for (int q = 0; q < 4; ++q)

struct V {
  using Int = int32x4x4_t;
  using Float = float32x4x4_t;
  using Bytes = int8x16x4_t;
  using Four = int8x16_t;

  // 16 accumulators, 8 weights and 2 activations fit the 32 registers.
  static constexpr int kMaxRows = 4;
  static constexpr int kFewStrips = 1;
  static constexpr int kFewRows = 1;
  static constexpr int kManyStrips = 2;
  static constexpr int64_t kPrepareBytes = 16;
  static constexpr int32_t kByteOffset = 0;  // bytes become signed again

  template <class Function>
  static Int EachInt(Function function) {
    Int result;
    FPTQ_QUARTERS result.val[q] = function(q);
    return result;
  }
  template <class Function>
  static Float Each(Function function) {
    Float result;
    FPTQ_QUARTERS result.val[q] = function(q);
    return result;
  }

  static Int Set(int32_t value) {
    return EachInt([&](int) { return vdupq_n_s32(value); });
  }
  static Int Load(const int32_t* data) { return vld1q_s32_x4(data); }
  static void Store(int32_t* data, const Int& a) { vst1q_s32_x4(data, a); }
  static Int LoadInt8(const int8_t* data) {
    const int8x16_t bytes = vld1q_s8(data);
    const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_s8(vget_high_s8(bytes));
    return {{vmovl_s16(vget_low_s16(low)), vmovl_s16(vget_high_s16(low)), vmovl_s16(vget_low_s16(high)),
             vmovl_s16(vget_high_s16(high))}};
  }
  static Int Add(const Int& a, const Int& b) {
    return EachInt([&](int q) { return vaddq_s32(a.val[q], b.val[q]); });
  }
  static Int Multiply(const Int& a, const Int& b) {
    return EachInt([&](int q) { return vmulq_s32(a.val[q], b.val[q]); });
  }
  static Int Max(const Int& a, const Int& b) {
    return EachInt([&](int q) { return vmaxq_s32(a.val[q], b.val[q]); });
  }
  static int32_t ReduceMax(const Int& a) {
    return vmaxvq_s32(vmaxq_s32(vmaxq_s32(a.val[0], a.val[1]), vmaxq_s32(a.val[2], a.val[3])));
  }

  static Bytes LoadBytes(const uint8_t* data) { return vld1q_s8_x4(reinterpret_cast<const int8_t*>(data)); }
  static Bytes LowNibbles(const Bytes& both) {
    Bytes result;
    FPTQ_QUARTERS result.val[q] = vandq_s8(both.val[q], vdupq_n_s8(15));
    return result;
  }
  static Bytes HighNibbles(const Bytes& both) {
    Bytes result;
    FPTQ_QUARTERS result.val[q] = vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(both.val[q]), 4));
    return result;
  }
  static Four Broadcast(const int8_t* a) {
    int32_t four;
    __builtin_memcpy(&four, a, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
  }
  static void DotNibbles(Int& acc, const Bytes& low, const Bytes& high, Four first, Four second) {
    FPTQ_QUARTERS acc.val[q] = vdotq_s32(vdotq_s32(acc.val[q], low.val[q], first), high.val[q], second);
  }
  static void DotBytes(Int& acc, const Bytes& low, const Bytes& high, Four first, Four second) {
    const int8x16_t sign = vdupq_n_s8(static_cast<int8_t>(0x80));
    FPTQ_QUARTERS {
      acc.val[q] = vdotq_s32(acc.val[q], veorq_s8(low.val[q], sign), first);
      acc.val[q] = vdotq_s32(acc.val[q], veorq_s8(high.val[q], sign), second);
    }
  }
  static void KeepInRegister(Int& a) { asm("" : "+w"(a.val[0]), "+w"(a.val[1]), "+w"(a.val[2]), "+w"(a.val[3])); }

  static Float SetFloat(float value) {
    return Each([&](int) { return vdupq_n_f32(value); });
  }
  static Float Load(const float* data) { return vld1q_f32_x4(data); }
  static void Store(float* data, const Float& a) { vst1q_f32_x4(data, a); }
  static Float ToFloat(const Int& a) {
    return Each([&](int q) { return vcvtq_f32_s32(a.val[q]); });
  }
  static Float Add(const Float& a, const Float& b) {
    return Each([&](int q) { return vaddq_f32(a.val[q], b.val[q]); });
  }
  static Float Multiply(const Float& a, const Float& b) {
    return Each([&](int q) { return vmulq_f32(a.val[q], b.val[q]); });
  }
  static Float Divide(const Float& a, const Float& b) {
    return Each([&](int q) { return vdivq_f32(a.val[q], b.val[q]); });
  }
  static Float MultiplyAdd(const Float& a, const Float& b, const Float& c) {
    return Each([&](int q) { return vfmaq_f32(c.val[q], a.val[q], b.val[q]); });
  }
  static Float Negate(const Float& a) {
    return Each([&](int q) { return vnegq_f32(a.val[q]); });
  }
  static Float RoundEven(const Float& a) {
    return Each([&](int q) { return vrndnq_f32(a.val[q]); });
  }
  // NaN gives `low`.
  static Float Clip(const Float& a, float low, float high) {
    return Each([&](int q) { return vminq_f32(vmaxnmq_f32(a.val[q], vdupq_n_f32(low)), vdupq_n_f32(high)); });
  }
  static Int ToInt(const Float& a) {
    return EachInt([&](int q) { return vcvtnq_s32_f32(a.val[q]); });
  }
  // 2^n of whole n in -127..127; -127 gives 0.
  static Float PowerOfTwo(const Float& n) {
    const Int biased = Add(ToInt(n), Set(127));
    return Each([&](int q) { return vreinterpretq_f32_s32(vshlq_n_s32(biased.val[q], 23)); });
  }
  static constexpr float kLeastExponent = -127.0f;
  // a 2^n of whole n in kLeastExponent..0, where the least gives 0.
  static Float MultiplyPowerOfTwo(const Float& a, const Float& n) { return Multiply(a, PowerOfTwo(n)); }
  static Int MagnitudeBits(const Float& a) {
    return EachInt([&](int q) { return vreinterpretq_s32_f32(vabsq_f32(a.val[q])); });
  }

  static Float Max(const Float& a, const Float& b) {  // NaN where one of them is
    return Each([&](int q) { return vmaxq_f32(a.val[q], b.val[q]); });
  }
  static float ReduceMax(const Float& a) {
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.val[0], a.val[1]), vmaxq_f32(a.val[2], a.val[3])));
  }
  static float ReduceAdd(const Float& a) {
    return vaddvq_f32(vaddq_f32(vaddq_f32(a.val[0], a.val[1]), vaddq_f32(a.val[2], a.val[3])));
  }
  static Float KeepFirst(const Float& a, int count, float other) {
    const int32x4_t lane = {0, 1, 2, 3};
    return Each(
        [&](int q) { return vbslq_f32(vcltq_s32(lane, vdupq_n_s32(count - 4 * q)), a.val[q], vdupq_n_f32(other)); });
  }
  // columns[16 * c + r] = row[r][c], in blocks of 4 x 4
  static void StoreTransposed(const Float (&row)[16], float* columns) {
    for (int r = 0; r < 16; r += 4) {
      FPTQ_QUARTERS {
        float block[16];
        vst4q_f32(block, {{row[r].val[q], row[r + 1].val[q], row[r + 2].val[q], row[r + 3].val[q]}});
        for (int c = 0; c < 4; ++c) vst1q_f32(columns + 16 * (4 * q + c) + r, vld1q_f32(block + 4 * c));
      }
    }
  }

  struct Squares {
    float64x2_t pair[8];
  };
  static Squares NoSquares() {
    Squares result;
    for (float64x2_t& pair : result.pair) pair = vdupq_n_f64(0.0);
    return result;
  }
  static void AddSquares(Squares& sum, const Float& a) {
    FPTQ_QUARTERS {
      const float64x2_t low = vcvt_f64_f32(vget_low_f32(a.val[q])), high = vcvt_high_f64_f32(a.val[q]);
      sum.pair[2 * q] = vfmaq_f64(sum.pair[2 * q], low, low);
      sum.pair[2 * q + 1] = vfmaq_f64(sum.pair[2 * q + 1], high, high);
    }
  }
  static void Store(double* lane, const Squares& sum) {
    for (int p = 0; p < 8; ++p) vst1q_f64(lane + 2 * p, sum.pair[p]);
  }

  // Round half to even, as in BFloat16FromFloat.
  static uint16x4_t ToBFloat16(float32x4_t value) {
    const uint32x4_t bits = vreinterpretq_u32_f32(value);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(value, value), rounded, quiet), 16);
  }

  static void Store(void* y, ElementType type, int64_t index, const Float& value, int count) {
    alignas(16) char buffer[64];
    const int64_t bytes = type == ElementType::kFloat32 ? 4 : 2;
    char* target = static_cast<char*>(y) + index * bytes;
    char* data = count == 16 ? target : buffer;
    if (type == ElementType::kFloat32) {
      FPTQ_QUARTERS vst1q_f32(reinterpret_cast<float*>(data) + 4 * q, value.val[q]);
    } else {
      FPTQ_QUARTERS {
        const uint16x4_t half =
            type == ElementType::kFloat16 ? vreinterpret_u16_f16(vcvt_f16_f32(value.val[q])) : ToBFloat16(value.val[q]);
        vst1_u16(reinterpret_cast<uint16_t*>(data) + 4 * q, half);
      }
    }
    if (count != 16) __builtin_memcpy(target, buffer, static_cast<size_t>(count * bytes));
  }

  // a - 128 of `length` bytes, a multiple of kPrepareBytes, and the sum of the results.
  static int32_t CenterAndSum(const uint8_t* a, int64_t length, int8_t* prepared) {
    int32x4_t sum = vdupq_n_s32(0);
    for (int64_t i = 0; i < length; i += kPrepareBytes) {
      const int8x16_t centered = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(a + i), vdupq_n_u8(0x80)));
      vst1q_s8(prepared + i, centered);
      sum = vdotq_s32(sum, centered, vdupq_n_s8(1));
    }
    return vaddvq_s32(sum);
  }

  template <ElementType kType>
  static Float LoadElements(const void* x, int64_t index, int count) {
    constexpr int64_t kBytes = kType == ElementType::kFloat32 ? 4 : 2;
    alignas(16) char buffer[64];
    const char* data = static_cast<const char*>(x) + index * kBytes;
    if (count != 16) {
      __builtin_memset(buffer, 0, sizeof(buffer));
      __builtin_memcpy(buffer, data, static_cast<size_t>(count * kBytes));
      data = buffer;
    }
    if constexpr (kType == ElementType::kFloat32) return vld1q_f32_x4(reinterpret_cast<const float*>(data));
    return Each([&](int q) {
      const uint16x4_t half = vld1_u16(reinterpret_cast<const uint16_t*>(data) + 4 * q);
      if constexpr (kType == ElementType::kFloat16) return vcvt_f32_f16(vreinterpret_f16_u16(half));
      return vreinterpretq_f32_u32(vshll_n_u16(half, 16));
    });
  }

  // The low bytes.
  static void StoreBytes(const Int& a, uint8_t* y, int count) {
    const int16x8_t low = vcombine_s16(vmovn_s32(a.val[0]), vmovn_s32(a.val[1]));
    const int16x8_t high = vcombine_s16(vmovn_s32(a.val[2]), vmovn_s32(a.val[3]));
    const uint8x16_t bytes = vreinterpretq_u8_s8(vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
    if (count == 16) {
      vst1q_u8(y, bytes);
    } else {
      uint8_t buffer[16];
      vst1q_u8(buffer, bytes);
      __builtin_memcpy(y, buffer, static_cast<size_t>(count));
    }
  }
  static void StoreQuantized(const Float& ratio, uint8_t* y, int count) {
    const Int q = ToInt(ratio);
    const Int clipped =
        EachInt([&](int i) { return vmaxq_s32(vminq_s32(q.val[i], vdupq_n_s32(127)), vdupq_n_s32(-127)); });
    StoreBytes(Add(clipped, Set(kActivationOffset)), y, count);
  }
  // round(ratio) + zero_point, clipped to 0..255.
  static void StoreStatic(const Float& ratio, uint8_t zero_point, uint8_t* y, int count) {
    const float low = -static_cast<float>(zero_point);
    StoreBytes(Add(ToInt(Clip(ratio, low, 255.0f + low)), Set(zero_point)), y, count);
  }
};

#include "cpu/gemm_vector.inc"

}  // namespace

const Kernels kNeonDotKernels = {"neondot", Gemm, Prepare, Quantize, NormRows, SiluMulRows, RotateHead, Attend, 64};

}  // namespace fptq::cpu
FPTQ_TARGET_END
