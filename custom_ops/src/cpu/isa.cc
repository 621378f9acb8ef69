#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace fptq::cpu {

#if defined(__x86_64__)
namespace {

// Leaf 7, subleaf 1, EAX bit 4; compilers of 2022 have no name for it.
bool HasAvxVnni() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax & (1u << 4)) != 0;
}

// Leaf 1, ECX bit 29; clang's builtin does not know it.
bool HasF16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & (1u << 29)) != 0;
}

// Leaf 7, EDX bits 24 (tiles) and 25 (int8), and Linux's permission to use the tile registers, which it grants to a
// process that asks.
bool MayUseAmx() {
#if defined(__linux__)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kTileAndInt8 = 3u << 24;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0 || (edx & kTileAndInt8) != kTileAndInt8) return false;
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace
#endif

std::vector<const Kernels*> AvailableKernels() {
  std::vector<const Kernels*> kernels;
#if defined(__x86_64__)
  // The compiler's check includes the operating system's support for the wide registers.
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    if (MayUseAmx()) kernels.push_back(&kAmxKernels);
    kernels.push_back(&kAvx512VnniKernels);
  }
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && HasF16c();
  if (avx2 && HasAvxVnni()) kernels.push_back(&kAvxVnniKernels);
  if (avx2) kernels.push_back(&kAvx2Kernels);
#endif
#if defined(__aarch64__) && defined(__linux__)
  if ((getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0) kernels.push_back(&kNeonDotKernels);
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
