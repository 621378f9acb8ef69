#ifndef FPTQ_TESTS_CPU_FUSED_QUANTIZE_TEST_H_
#define FPTQ_TESTS_CPU_FUSED_QUANTIZE_TEST_H_

#include "cpu/gemm.h"
#include "test_support.h"

namespace fptq::cpu {

/// RMSNorm and SiLU of `kernels` give the bytes of the portable ones.
void TestFusedQuantize(Random& random, const Kernels& kernels, int problems);

}  // namespace fptq::cpu

#endif  // FPTQ_TESTS_CPU_FUSED_QUANTIZE_TEST_H_
