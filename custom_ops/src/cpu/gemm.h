// What a GEMM kernel of one instruction set computes, and the table of kernels.
#ifndef FPTQ_CPU_GEMM_H_
#define FPTQ_CPU_GEMM_H_

#include <cstdint>

#include "cpu/attention.h"
#include "cpu/fused_quantize.h"
#include "cpu/packed_weights.h"

namespace fptq::cpu {

/// One call, after the activations were prepared.
struct GemmCall {
  const PackedWeights* weights = nullptr;
  const int8_t* a = nullptr;         ///< [rows][a_stride]: A - 128, zero in padding up to padded_k
  const int32_t* a_start = nullptr;  ///< [rows][groups]: StartValue of the sum of a over a group
  const int32_t* a_total = nullptr;  ///< [rows], of structured scales: what StartValue would be with int8 weights
  const float* a_scale = nullptr;    ///< one, or one per row
  bool per_token = false;
  int zero_offset = 0;  ///< a_zero_point - 128
  ElementType type = ElementType::kFloat32;
  void* y = nullptr;  ///< [rows][n]
};

/// Rows [row_begin, row_end) of strips [strip_begin, strip_end) of Y.
using GemmTile = void (*)(const GemmCall& call, int64_t row_begin, int64_t row_end, int64_t strip_begin,
                          int64_t strip_end);

/// `rows` rows of A to GemmCall::a and GemmCall::a_start.
using PrepareActivations = void (*)(const PackedWeights& weights, const uint8_t* a, int64_t rows, int8_t* prepared,
                                    int32_t* a_start);

/// DynamicQuantizePerToken of `rows` rows of x [rows][k] (see its schema).
using QuantizeRows = void (*)(const void* x, ElementType type, int64_t rows, int64_t k, uint8_t* y, float* scale);

/// The kernels of one instruction set.
struct Kernels {
  const char* name;
  GemmTile gemm;
  PrepareActivations prepare;
  QuantizeRows quantize;
  NormFunction norm;
  SiluMulFunction silu_mul;
  RotateFunction rotate;
  AttendFunction attend;
  int64_t rows_per_task;  ///< of gemm: large enough to repay what it does once per call

  const char* few_rows_name = nullptr;  ///< whose gemm takes calls of fewer rows than few_rows_below
  int64_t few_rows_below = 0;

  int64_t structured_rows_per_task = 0;  ///< of structured scales, where more of them repay more
};

/// What the AMX kernels share with those for AVX512-VNNI (by name: a table read at load time would run an initializer).
namespace avx512vnni {
void GemmRows(const GemmCall& call, int64_t row_begin, int64_t row_end, int64_t strip_begin, int64_t strip_end);
void PrepareRows(const PackedWeights& weights, const uint8_t* a, int64_t rows, int8_t* prepared, int32_t* a_start);
void QuantizeRows(const void* x, ElementType type, int64_t rows, int64_t k, uint8_t* y, float* scale);
void NormRows(const NormCall& call, int64_t begin, int64_t end, float* buffer);
void SiluMulRows(const SiluMulCall& call, int64_t begin, int64_t end, float* buffer);
void RotateHead(const AttentionCall& call, const float* x, int64_t position, float factor, float* y);
void Attend(const AttentionCall& call, const AttentionTask& task, float* scratch);
}  // namespace avx512vnni

extern const Kernels kPortableKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvxVnniKernels;
extern const Kernels kAvx512VnniKernels;
extern const Kernels kAmxKernels;
extern const Kernels kNeonDotKernels;

}  // namespace fptq::cpu

#endif  // FPTQ_CPU_GEMM_H_
