#ifndef FPTQ_TESTS_CPU_ATTENTION_TEST_H_
#define FPTQ_TESTS_CPU_ATTENTION_TEST_H_

#include "cpu/gemm.h"
#include "test_support.h"

namespace fptq::cpu {

/// Attention of `kernels` is what plain loops in float64 give, and the same bytes with and without `pool`.
void TestAttention(Random& random, const Kernels& kernels, int problems, const Parallel& pool);

}  // namespace fptq::cpu

#endif  // FPTQ_TESTS_CPU_ATTENTION_TEST_H_
