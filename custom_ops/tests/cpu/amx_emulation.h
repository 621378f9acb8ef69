// The AMX kernels on emulated tiles.
#ifndef FPTQ_TESTS_CPU_AMX_EMULATION_H_
#define FPTQ_TESTS_CPU_AMX_EMULATION_H_

#include "cpu/gemm.h"

namespace fptq::cpu {

extern const Kernels kEmulatedAmxKernels;

}  // namespace fptq::cpu

#endif  // FPTQ_TESTS_CPU_AMX_EMULATION_H_
