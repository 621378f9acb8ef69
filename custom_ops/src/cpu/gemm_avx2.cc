// Kernels for AVX2 without VNNI.
#include <immintrin.h>

#include <cstdint>
#include <utility>

#include "cpu/element.h"
#include "cpu/fused_quantize.h"
#include "cpu/gemm.h"
#include "cpu/gemm_portable.h"
#include "cpu/target.h"

FPTQ_TARGET_BEGIN("avx2,fma,f16c")
namespace fptq::cpu {
namespace {

// vpmaddubsw adds two products to 16 bits and saturates: two sums of 4-bit values fit, one of 7-bit values fits, and
// the eighth bit is multiplied apart.
template <int kLargest>
inline __m256i DotQuads(__m256i acc, __m256i low, __m256i high, __m256i first, __m256i second) {
  const __m256i one = _mm256_set1_epi16(1);
  if constexpr (kLargest == 255) {
    const __m256i seven_bits = _mm256_set1_epi8(127);
    const __m256i bit = _mm256_set1_epi8(1);
    const __m256i low_pairs = _mm256_maddubs_epi16(_mm256_and_si256(low, seven_bits), first);
    const __m256i high_pairs = _mm256_maddubs_epi16(_mm256_and_si256(high, seven_bits), second);
    const __m256i low_bit = _mm256_and_si256(_mm256_srli_epi16(low, 7), bit);
    const __m256i high_bit = _mm256_and_si256(_mm256_srli_epi16(high, 7), bit);
    const __m256i bit_pairs =
        _mm256_add_epi16(_mm256_maddubs_epi16(low_bit, first), _mm256_maddubs_epi16(high_bit, second));
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(bit_pairs, _mm256_set1_epi16(128)));
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(low_pairs, one));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(high_pairs, one));
  }
  const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(low, first), _mm256_maddubs_epi16(high, second));
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, one));
}

#include "cpu/gemm_avx2.inc"
#include "cpu/gemm_vector.inc"

}  // namespace

const Kernels kAvx2Kernels = {"avx2", Gemm, Prepare, Quantize, NormRows, SiluMulRows, RotateHead, Attend, 64};

}  // namespace fptq::cpu
FPTQ_TARGET_END
