// Names that the library, the model files and the Python package share.
#ifndef FPTQ_COMMON_OP_NAMES_H_
#define FPTQ_COMMON_OP_NAMES_H_

namespace fptq {

inline constexpr char kDomain[] = "fptq";
inline constexpr char kW4A8MatMul[] = "W4A8MatMul";
inline constexpr char kW8A8MatMul[] = "W8A8MatMul";
inline constexpr char kDynamicQuantizeW4A8MatMul[] = "DynamicQuantizeW4A8MatMul";
inline constexpr char kDynamicQuantizePerToken[] = "DynamicQuantizePerToken";

}  // namespace fptq

#endif  // FPTQ_COMMON_OP_NAMES_H_
