// Registration of the CUDA kernels.
#ifndef FPTQ_CUDA_CUDA_OPS_H_
#define FPTQ_CUDA_CUDA_OPS_H_

#include "register/op_registry.h"

namespace fptq::cuda {

/// Adds both ops for float32, float16 and bfloat16 on the CUDA execution provider. Calls no CUDA function: works where
/// there is no driver, and the ops are ignored by sessions without that provider.
void AddCudaOps(OpRegistry& registry);

}  // namespace fptq::cuda

#endif  // FPTQ_CUDA_CUDA_OPS_H_
