// Registration of the CPU kernels.
#ifndef FPTQ_CPU_CPU_OPS_H_
#define FPTQ_CPU_CPU_OPS_H_

#include "register/op_registry.h"

namespace fptq::cpu {

/// Adds every op for float32, float16 and bfloat16 on the CPU execution provider.
void AddCpuOps(OpRegistry& registry);

}  // namespace fptq::cpu

#endif  // FPTQ_CPU_CPU_OPS_H_
