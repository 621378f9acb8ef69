// The portable kernels, also used by other instruction sets for what they do not speed up.
#ifndef FPTQ_CPU_GEMM_PORTABLE_H_
#define FPTQ_CPU_GEMM_PORTABLE_H_

#include "cpu/gemm.h"

namespace fptq::cpu::portable {

void Gemm(const GemmCall& call, int64_t row_begin, int64_t row_end, int64_t strip_begin, int64_t strip_end);
void Prepare(const PackedWeights& weights, const uint8_t* a, int64_t rows, int8_t* prepared, int32_t* a_start);
void Quantize(const void* x, ElementType type, int64_t rows, int64_t k, uint8_t* y, float* scale);

}  // namespace fptq::cpu::portable

#endif  // FPTQ_CPU_GEMM_PORTABLE_H_
