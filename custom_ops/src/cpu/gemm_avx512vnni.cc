// Kernels for AVX-512 with VNNI: one 512-bit register holds 16 channels.
#include <immintrin.h>

#include <cstdint>
#include <utility>

#include "cpu/element.h"
#include "cpu/fused_quantize.h"
#include "cpu/gemm.h"
#include "cpu/gemm_portable.h"
#include "cpu/target.h"

FPTQ_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")
namespace fptq::cpu {
namespace {

#include "cpu/store_avx512.inc"

struct V {
  using Int = __m512i;
  using Float = __m512;
  using Bytes = __m512i;
  using Four = __m512i;

  // Accumulators of a tile and two operands fit the 32 registers; more strips at a time for fewer rows.
  static constexpr int kMaxRows = 12;
  static constexpr int kFewStrips = 2;
  static constexpr int kFewRows = 5;
  static constexpr int kManyStrips = 4;
  static constexpr int64_t kPrepareBytes = 32;
  static constexpr int32_t kByteOffset = 128;

  static Int Set(int32_t value) { return _mm512_set1_epi32(value); }
  static Int Load(const int32_t* data) { return _mm512_load_si512(data); }
  static void Store(int32_t* data, Int a) { _mm512_store_si512(data, a); }
  static Int LoadInt8(const int8_t* data) {
    return _mm512_cvtepi8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(data)));
  }
  static Int Add(Int a, Int b) { return _mm512_add_epi32(a, b); }
  static Int Multiply(Int a, Int b) { return _mm512_mullo_epi32(a, b); }
  static Int Max(Int a, Int b) { return _mm512_max_epi32(a, b); }
  static int32_t ReduceMax(Int a) { return _mm512_reduce_max_epi32(a); }

  static Bytes LoadBytes(const uint8_t* data) { return _mm512_load_si512(data); }
  static Bytes LowNibbles(Bytes both) { return _mm512_and_si512(both, _mm512_set1_epi8(15)); }
  static Bytes HighNibbles(Bytes both) { return LowNibbles(_mm512_srli_epi16(both, 4)); }
  static Four Broadcast(const int8_t* a) {
    int32_t four;
    __builtin_memcpy(&four, a, 4);
    return _mm512_set1_epi32(four);
  }
  static void DotNibbles(Int& acc, Bytes low, Bytes high, Four first, Four second) {
    acc = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(acc, low, first), high, second);
  }
  static void DotBytes(Int& acc, Bytes low, Bytes high, Four first, Four second) {
    DotNibbles(acc, low, high, first, second);
  }

  static void KeepInRegister(Int& a) { asm("" : "+v"(a)); }

  static Float SetFloat(float value) { return _mm512_set1_ps(value); }
  static Float Load(const float* data) { return _mm512_load_ps(data); }
  static void Store(float* data, Float a) { _mm512_store_ps(data, a); }
  static Float ToFloat(Int a) { return _mm512_cvtepi32_ps(a); }
  static Float Multiply(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float Divide(Float a, Float b) { return _mm512_div_ps(a, b); }
  static Float MultiplyAdd(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static Float Add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static Float Negate(Float a) { return _mm512_xor_ps(a, SetFloat(-0.0f)); }
  static Float RoundEven(Float a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // NaN gives `low`.
  static Float Clip(Float a, float low, float high) {
    return _mm512_min_ps(_mm512_max_ps(a, SetFloat(low)), SetFloat(high));
  }
  // 2^n of whole n in -127..127; -127 gives 0.
  static Float PowerOfTwo(Float n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), Set(127)), 23));
  }
  static constexpr float kLeastExponent = -160.0f;
  // a 2^n of whole n in kLeastExponent..0, where the least gives 0.
  static Float MultiplyPowerOfTwo(Float a, Float n) { return _mm512_scalef_ps(a, n); }

  // b where one of them is NaN.
  static Float Max(Float a, Float b) { return _mm512_max_ps(a, b); }
  static float ReduceMax(Float a) { return _mm512_reduce_max_ps(a); }
  static float ReduceAdd(Float a) { return _mm512_reduce_add_ps(a); }
  static Float KeepFirst(Float a, int count, float other) {
    return _mm512_mask_mov_ps(SetFloat(other), FirstLanes(count), a);
  }
  // columns[16 * c + r] = row[r][c]
  static void StoreTransposed(const Float (&row)[16], float* columns) {
    Float fours[4][4];  // [rows 4 i to 4 i + 3][c]: columns c, 4 + c, 8 + c and 12 + c
    FPTQ_UNROLL
    for (int i = 0; i < 4; ++i) {
      const __m512d low = _mm512_castps_pd(_mm512_unpacklo_ps(row[4 * i], row[4 * i + 1]));
      const __m512d high = _mm512_castps_pd(_mm512_unpackhi_ps(row[4 * i], row[4 * i + 1]));
      const __m512d next_low = _mm512_castps_pd(_mm512_unpacklo_ps(row[4 * i + 2], row[4 * i + 3]));
      const __m512d next_high = _mm512_castps_pd(_mm512_unpackhi_ps(row[4 * i + 2], row[4 * i + 3]));
      fours[i][0] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, next_low));
      fours[i][1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, next_low));
      fours[i][2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high, next_high));
      fours[i][3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high, next_high));
    }
    FPTQ_UNROLL
    for (int c = 0; c < 4; ++c) {
      const Float even = _mm512_shuffle_f32x4(fours[0][c], fours[1][c], 0x88);
      const Float odd = _mm512_shuffle_f32x4(fours[0][c], fours[1][c], 0xdd);
      const Float next_even = _mm512_shuffle_f32x4(fours[2][c], fours[3][c], 0x88);
      const Float next_odd = _mm512_shuffle_f32x4(fours[2][c], fours[3][c], 0xdd);
      Store(columns + 16 * c, _mm512_shuffle_f32x4(even, next_even, 0x88));
      Store(columns + 16 * (4 + c), _mm512_shuffle_f32x4(odd, next_odd, 0x88));
      Store(columns + 16 * (8 + c), _mm512_shuffle_f32x4(even, next_even, 0xdd));
      Store(columns + 16 * (12 + c), _mm512_shuffle_f32x4(odd, next_odd, 0xdd));
    }
  }

  struct Squares {
    __m512d half[2];
  };
  static Squares NoSquares() { return {{_mm512_setzero_pd(), _mm512_setzero_pd()}}; }
  static void AddSquares(Squares& sum, Float a) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(a));
    const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1));
    sum.half[0] = _mm512_fmadd_pd(low, low, sum.half[0]);
    sum.half[1] = _mm512_fmadd_pd(high, high, sum.half[1]);
  }
  static void Store(double* lane, const Squares& sum) {
    _mm512_store_pd(lane, sum.half[0]);
    _mm512_store_pd(lane + 8, sum.half[1]);
  }

  static Int MagnitudeBits(Float a) { return _mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x7fffffff)); }

  static void Store(void* y, ElementType type, int64_t index, Float value, int count) {
    StoreLanes(y, type, index, value, count);
  }

  // a - 128 of `length` bytes, a multiple of kPrepareBytes, and the sum of the results.
  static int32_t CenterAndSum(const uint8_t* a, int64_t length, int8_t* prepared) {
    const __m256i flip = _mm256_set1_epi8(static_cast<char>(0x80));
    __m256i sum = _mm256_setzero_si256();
    for (int64_t i = 0; i < length; i += kPrepareBytes) {
      const __m256i centered = _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + i)), flip);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(prepared + i), centered);
      sum = _mm256_dpbusd_epi32(sum, _mm256_set1_epi8(1), centered);
    }
    return _mm512_reduce_add_epi32(_mm512_zextsi256_si512(sum));
  }

  template <ElementType kType>
  static Float LoadElements(const void* x, int64_t index, int count) {
    const __mmask16 mask = FirstLanes(count);
    if constexpr (kType == ElementType::kFloat32) {
      return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(x) + index);
    } else {
      const __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(x) + index);
      if constexpr (kType == ElementType::kFloat16) return _mm512_cvtph_ps(half);
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
  }

  static void StoreQuantized(Float ratio, uint8_t* y, int count) {
    const Int q = _mm512_max_epi32(_mm512_min_epi32(_mm512_cvtps_epi32(ratio), Set(127)), Set(-127));
    const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_add_epi32(q, Set(kActivationOffset)));
    _mm_mask_storeu_epi8(y, FirstLanes(count), bytes);
  }
  // round(ratio) + zero_point, clipped to 0..255.
  static void StoreStatic(Float ratio, uint8_t zero_point, uint8_t* y, int count) {
    const float low = -static_cast<float>(zero_point);
    const Int q = _mm512_cvtps_epi32(Clip(ratio, low, 255.0f + low));
    _mm_mask_storeu_epi8(y, FirstLanes(count), _mm512_cvtepi32_epi8(_mm512_add_epi32(q, Set(zero_point))));
  }
};

#include "cpu/gemm_vector.inc"
// What follows needs what precedes.
#include "cpu/gemm_folded.inc"

}  // namespace

namespace avx512vnni {

void GemmRows(const GemmCall& call, int64_t row_begin, int64_t row_end, int64_t strip_begin, int64_t strip_end) {
  AnyGemm(call, row_begin, row_end, strip_begin, strip_end);
}

void PrepareRows(const PackedWeights& weights, const uint8_t* a, int64_t rows, int8_t* prepared, int32_t* a_start) {
  Prepare(weights, a, rows, prepared, a_start);
}

void QuantizeRows(const void* x, ElementType type, int64_t rows, int64_t k, uint8_t* y, float* scale) {
  Quantize(x, type, rows, k, y, scale);
}

void NormRows(const NormCall& call, int64_t begin, int64_t end, float* buffer) {
  cpu::NormRows(call, begin, end, buffer);
}

void SiluMulRows(const SiluMulCall& call, int64_t begin, int64_t end, float* buffer) {
  cpu::SiluMulRows(call, begin, end, buffer);
}

void RotateHead(const AttentionCall& call, const float* x, int64_t position, float factor, float* y) {
  cpu::RotateHead(call, x, position, factor, y);
}

void Attend(const AttentionCall& call, const AttentionTask& task, float* scratch) { cpu::Attend(call, task, scratch); }

}  // namespace avx512vnni

const Kernels kAvx512VnniKernels = {"avx512vnni", AnyGemm, Prepare, Quantize, NormRows, SiluMulRows,
                                    RotateHead,   Attend,  96,      nullptr,  0,        264};

}  // namespace fptq::cpu
FPTQ_TARGET_END
