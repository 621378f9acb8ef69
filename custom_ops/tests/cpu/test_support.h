// What the kernel tests share.
#ifndef FPTQ_TESTS_CPU_TEST_SUPPORT_H_
#define FPTQ_TESTS_CPU_TEST_SUPPORT_H_

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "amx_emulation.h"
#include "cpu/isa.h"

#define CHECK(condition, ...)                                                     \
  do {                                                                            \
    if (!(condition)) {                                                           \
      std::fprintf(stderr, "%s:%d: %s failed: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                          \
      std::fputc('\n', stderr);                                                   \
      std::exit(1);                                                               \
    }                                                                             \
  } while (false)

namespace fptq::cpu {

using Random = std::mt19937_64;

inline int64_t Uniform(Random& random, int64_t low, int64_t high) {
  return low + static_cast<int64_t>(random() % static_cast<uint64_t>(high - low + 1));
}

/// Every kernel this machine can run, and those for AMX on emulated tiles where the rest of them can run.
inline std::vector<const Kernels*> TestedKernels() {
  std::vector<const Kernels*> all = AvailableKernels();
#if defined(__x86_64__)
  const auto has_avx512 = [](const Kernels* kernels) { return kernels == &kAvx512VnniKernels; };
  if (std::any_of(all.begin(), all.end(), has_avx512)) all.push_back(&kEmulatedAmxKernels);
#endif
  return all;
}

}  // namespace fptq::cpu

#endif  // FPTQ_TESTS_CPU_TEST_SUPPORT_H_
