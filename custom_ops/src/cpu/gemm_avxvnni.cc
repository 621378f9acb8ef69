// Kernels for AVX-VNNI: AVX2 with vpdpbusd on 256 bits.
#include <immintrin.h>

#include <cstdint>
#include <utility>

#include "cpu/element.h"
#include "cpu/fused_quantize.h"
#include "cpu/gemm.h"
#include "cpu/gemm_portable.h"
#include "cpu/target.h"

FPTQ_TARGET_BEGIN("avx2,fma,f16c,avxvnni")
namespace fptq::cpu {
namespace {

template <int kLargest>
inline __m256i DotQuads(__m256i acc, __m256i low, __m256i high, __m256i first, __m256i second) {
  return _mm256_dpbusd_avx_epi32(_mm256_dpbusd_avx_epi32(acc, low, first), high, second);
}

#include "cpu/gemm_avx2.inc"
#include "cpu/gemm_vector.inc"

}  // namespace

const Kernels kAvxVnniKernels = {"avxvnni", Gemm, Prepare, Quantize, NormRows, SiluMulRows, RotateHead, Attend, 64};

}  // namespace fptq::cpu
FPTQ_TARGET_END
