// Memory of weights that were packed.
#ifndef FPTQ_CPU_MAPPED_MEMORY_H_
#define FPTQ_CPU_MAPPED_MEMORY_H_

#include <cstddef>

namespace fptq::cpu {

/// Tells the system that `data` is not needed soon, so that a memory-mapped file stops counting as resident. The
/// contents stay valid: a later access reads the file again. Does nothing where the system has no such call.
void ReleasePages(const void* data, size_t bytes);

}  // namespace fptq::cpu

#endif  // FPTQ_CPU_MAPPED_MEMORY_H_
