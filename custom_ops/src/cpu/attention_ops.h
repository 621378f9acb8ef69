// CPU kernels of group_query_attention_schema.h.
#ifndef FPTQ_CPU_ATTENTION_OPS_H_
#define FPTQ_CPU_ATTENTION_OPS_H_

#include "register/op_registry.h"

namespace fptq::cpu {

void AddAttentionOps(OpRegistry& registry);

}  // namespace fptq::cpu

#endif  // FPTQ_CPU_ATTENTION_OPS_H_
