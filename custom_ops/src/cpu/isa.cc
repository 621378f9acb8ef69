#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>

#include "cpu/gemm_portable.h"

namespace fptq::cpu {

const Kernels kPortableKernels = {"portable", portable::Gemm, portable::Prepare, portable::Quantize};

std::vector<const Kernels*> AvailableKernels() {
  std::vector<const Kernels*> kernels;
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
