// Choice of the instruction set at run time.
#ifndef FPTQ_CPU_ISA_H_
#define FPTQ_CPU_ISA_H_

#include <vector>

#include "cpu/gemm.h"

namespace fptq::cpu {

/// The kernels this machine can run, fastest first; the portable ones are always there.
std::vector<const Kernels*> AvailableKernels();

/// The fastest kernels, or those named by the environment variable FPTQ_CPU_ISA. Throws std::runtime_error where it
/// names kernels that are unknown or cannot run here.
const Kernels& ChosenKernels();

}  // namespace fptq::cpu

#endif  // FPTQ_CPU_ISA_H_
