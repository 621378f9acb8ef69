// Attacks the op library with random nodes. With clang and -fsanitize=fuzzer this is a libFuzzer target; without, a
// program of its own:
//
//   fptq_fuzz_ops [CASES [SEED]]     prints the count of every outcome as one JSON object
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "op_case.h"

#if defined(FPTQ_LIBFUZZER)

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fptq::fuzz::RunCase(data, size);
  return 0;
}

#else

int main(int argc, char** argv) {
  using fptq::fuzz::kOutcomes;
  const uint64_t cases = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 20000;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  const auto start = std::chrono::steady_clock::now();
  uint64_t counts[kOutcomes] = {};
  for (uint64_t i = 0; i < cases; ++i) {
    uint8_t bytes[256];
    uint64_t state = (seed << 40) + i;  // splitmix64: case i of a seed can be run alone
    for (uint8_t& byte : bytes) {
      state += 0x9e3779b97f4a7c15u;
      uint64_t mixed = (state ^ (state >> 30)) * 0xbf58476d1ce4e5b9u;
      mixed = (mixed ^ (mixed >> 27)) * 0x94d049bb133111ebu;
      byte = static_cast<uint8_t>(mixed >> 32);
    }
    ++counts[static_cast<int>(fptq::fuzz::RunCase(bytes, sizeof(bytes)))];
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  std::printf("{\"cases\": %llu, \"seed\": %llu, \"seconds\": %.1f", static_cast<unsigned long long>(cases),
              static_cast<unsigned long long>(seed), seconds.count());
  for (int i = 0; i < kOutcomes; ++i) {
    std::printf(", \"%s\": %llu", fptq::fuzz::NameOf(static_cast<fptq::fuzz::Outcome>(i)),
                static_cast<unsigned long long>(counts[i]));
  }
  std::printf("}\n");
  return 0;
}

#endif
