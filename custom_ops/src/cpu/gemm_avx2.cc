// Kernels for AVX2 without VNNI.
#include <immintrin.h>

#include <cstdint>
#include <utility>

#include "cpu/element.h"
#include "cpu/gemm.h"
#include "cpu/gemm_portable.h"
#include "cpu/target.h"

FPTQ_TARGET_BEGIN("avx2,fma,f16c")
namespace fptq::cpu {
namespace {

// vpmaddubsw adds two products of at most 15 * 128 to 16 bits, and two such sums still fit.
inline __m256i DotQuads(__m256i acc, __m256i low, __m256i high, __m256i first, __m256i second) {
  const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(low, first), _mm256_maddubs_epi16(high, second));
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

#include "cpu/gemm_avx2.inc"
#include "cpu/gemm_x86.inc"

}  // namespace

const Kernels kAvx2Kernels = {"avx2", Gemm, Prepare, Quantize, 64};

}  // namespace fptq::cpu
FPTQ_TARGET_END
