// CPU kernels of the steps in front of a quantized layer.
#ifndef FPTQ_CPU_FUSED_OPS_H_
#define FPTQ_CPU_FUSED_OPS_H_

#include "onnxruntime_cxx_api.h"
#include "register/op_registry.h"

namespace fptq::cpu {

/// Adds the ops of fused_quantize_schema.h; defined for float32, float16 and bfloat16.
template <ONNXTensorElementDataType kType>
void AddFusedOps(OpRegistry& registry);

}  // namespace fptq::cpu

#endif  // FPTQ_CPU_FUSED_OPS_H_
