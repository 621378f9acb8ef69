#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fptq::cpu {

std::vector<const Kernels*> AvailableKernels() {
  std::vector<const Kernels*> kernels;
#if defined(__x86_64__)
  // The compiler's check includes the operating system's support for the wide registers.
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    kernels.push_back(&kAvx512VnniKernels);
  }
#endif
  kernels.push_back(&kPortableKernels);
  return kernels;
}

const Kernels& ChosenKernels() {
  const std::vector<const Kernels*> kernels = AvailableKernels();
  const char* wanted = std::getenv("FPTQ_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return *kernels.front();
  std::string names;
  for (const Kernels* candidate : kernels) {
    if (candidate->name == std::string(wanted)) return *candidate;
    names += std::string(names.empty() ? "" : ", ") + candidate->name;
  }
  throw std::runtime_error("FPTQ_CPU_ISA is '" + std::string(wanted) +
                           "', which this library or CPU does not have. Use one of: " + names + ".");
}

}  // namespace fptq::cpu
