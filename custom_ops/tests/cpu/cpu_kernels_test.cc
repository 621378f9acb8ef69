// Calls every CPU kernel this machine can run, without onnxruntime, against plain int64 loops. Meant for sanitizers
// too.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "amx_emulation.h"
#include "attention_test.h"
#include "cpu/element.h"
#include "cpu/isa.h"
#include "cpu/packed_gemm.h"
#include "fused_quantize_test.h"
#include "test_support.h"

namespace fptq::cpu {
namespace {

// A pool of threads that live for one loop.
Parallel ThreadPool() {
  return {nullptr, [](const void*, void (*function)(void*, size_t), size_t tasks, void* data) {
            std::atomic<size_t> next{0};
            auto work = [&] {
              for (size_t task = next++; task < tasks; task = next++) function(data, task);
            };
            std::thread other(work);
            work();
            other.join();
          }};
}

struct Problem {
  int bits;
  int64_t m, k, n, block;
  ElementType type;
  int zero_point;
  bool per_token;
  int max_multiple;  // 0: free float scales
  std::vector<uint8_t> a;
  std::vector<int> b;           // [k, n]
  std::vector<uint8_t> stored;  // as in the file
  std::vector<float> a_scale;
  std::vector<float> scale;  // [groups, n], exact in `type`
  std::vector<uint8_t> scale_bytes;

  int64_t groups() const { return CeilDiv(k, block); }
  size_t element_bytes() const { return type == ElementType::kFloat32 ? 4 : 2; }
  std::string text() const {
    char buffer[160];
    std::snprintf(buffer, sizeof(buffer),
                  "bits=%d m=%d k=%d n=%d block=%d type=%d zero_point=%d per_token=%d multiple=%d", bits,
                  static_cast<int>(m), static_cast<int>(k), static_cast<int>(n), static_cast<int>(block),
                  static_cast<int>(type), zero_point, per_token, max_multiple);
    return buffer;
  }
};

Problem RandomProblem(Random& random, int bits, int64_t m, int64_t k, int64_t n, int64_t block, ElementType type,
                      int zero_point, int max_multiple) {
  Problem p{bits, m, k, n, block, type, zero_point, Uniform(random, 0, 1) == 1, max_multiple, {}, {}, {}, {}, {}, {}};
  const int extreme = static_cast<int>(Uniform(random, 0, 4));  // sometimes all operands at the ends of their ranges
  for (int64_t i = 0; i < m * k; ++i) {
    p.a.push_back(static_cast<uint8_t>(extreme == 0 ? 255 * Uniform(random, 0, 1) : Uniform(random, 0, 255)));
  }
  p.stored.assign(static_cast<size_t>((k * n * bits + 7) / 8), 0);
  const int levels = 1 << bits;
  for (int64_t i = 0; i < k * n; ++i) {
    const int level =
        static_cast<int>(extreme == 0 ? (levels - 1) * Uniform(random, 0, 1) : Uniform(random, 0, levels - 1));
    const int value = level - levels / 2;
    p.b.push_back(value);
    if (bits == 8) {
      p.stored[static_cast<size_t>(i)] = static_cast<uint8_t>(value);
    } else {
      p.stored[static_cast<size_t>(i / 2)] |= static_cast<uint8_t>((value & 15) << (i % 2 * 4));
    }
  }
  for (int64_t i = 0; i < (p.per_token ? m : 1); ++i) {
    p.a_scale.push_back(static_cast<float>(Uniform(random, 1, 1000)) / 4096.0f);
  }
  p.scale_bytes.assign(static_cast<size_t>(p.groups() * n) * p.element_bytes(), 0);
  std::vector<float> base;
  for (int64_t i = 0; i < n; ++i) base.push_back(static_cast<float>(Uniform(random, 1, 8)) / 64.0f);
  for (int64_t i = 0; i < p.groups() * n; ++i) {
    float value = static_cast<float>(Uniform(random, -255, 255)) / 128.0f;
    if (max_multiple > 0) {
      value = base[static_cast<size_t>(i % n)] * static_cast<float>(Uniform(random, -max_multiple, max_multiple));
    }
    if (bits == 8) value /= 512.0f;  // results that fit float16
    StoreElement(p.scale_bytes.data(), type, i, value);
    p.scale.push_back(LoadElement(p.scale_bytes.data(), type, i));
  }
  return p;
}

WeightSource SourceOf(const Problem& p) {
  WeightSource source;
  source.bits = p.bits;
  source.k = p.k;
  source.n = p.n;
  source.block_size = p.block;
  source.b = p.stored.data();
  source.b_scale = p.scale_bytes.data();
  source.type = p.type;
  source.scale_max_multiple = p.max_multiple;
  source.zero_point_is_128 = p.zero_point == kActivationOffset;
  return source;
}

// In one task, however many rows and strips there are.
std::vector<uint8_t> RunOneTask(const Problem& p, const Kernels& kernels) {
  const PackedWeights w = Pack(SourceOf(p));
  std::vector<uint8_t> y(static_cast<size_t>(p.m * p.n) * p.element_bytes(), 0xaa);
  AlignedVector<int8_t> prepared(static_cast<size_t>(RoundUp(p.m, 16) * w.a_stride()));
  std::vector<int32_t> start(static_cast<size_t>(p.m * w.groups)), total;
  kernels.prepare(w, p.a.data(), p.m, prepared.data(), start.data());
  for (int64_t m = 0; m < p.m; ++m) {
    int32_t sum = 0;
    for (int64_t k = 0; k < p.k; ++k) sum += p.a[static_cast<size_t>(m * p.k + k)] - kActivationOffset;
    total.push_back(-128 * sum);
  }
  GemmCall call;
  call.weights = &w;
  call.a = prepared.data();
  call.a_start = start.data();
  call.a_total = total.data();
  call.a_scale = p.a_scale.data();
  call.per_token = p.per_token;
  call.zero_offset = p.zero_point - kActivationOffset;
  call.type = p.type;
  call.y = y.data();
  kernels.gemm(call, 0, p.m, 0, w.strips);
  return y;
}

std::vector<uint8_t> RunGemm(const Problem& p, const Kernels& kernels, const Parallel& parallel) {
  const PackedGemm gemm(SourceOf(p), kernels);
  CHECK(gemm.weights().structured == (p.max_multiple > 0), "%s", p.text().c_str());
  std::vector<uint8_t> y(static_cast<size_t>(p.m * p.n) * p.element_bytes(), 0xaa);
  std::vector<char> scratch(gemm.ScratchBytes(p.m));
  PackedGemm::Call call;
  call.a = p.a.data();
  call.rows = p.m;
  call.a_scale = p.a_scale.data();
  call.per_token = p.per_token;
  call.a_zero_point = static_cast<uint8_t>(p.zero_point);
  call.y = y.data();
  call.scratch = scratch.data();
  gemm.Run(call, parallel);
  return y;
}

// Float activations give the bytes of their quantization by the same kernels, on any number of threads.
void CheckFloatActivations(Random& random, Problem p, const Kernels& kernels) {
  std::vector<uint8_t> x(static_cast<size_t>(p.m * p.k) * p.element_bytes());
  for (int64_t i = 0; i < p.m * p.k; ++i) {
    StoreElement(x.data(), p.type, i, static_cast<float>(Uniform(random, -2000, 2000)) / 256.0f);
  }
  p.zero_point = kActivationOffset;
  p.per_token = true;
  p.a_scale.assign(static_cast<size_t>(p.m), 0.0f);
  kernels.quantize(x.data(), p.type, p.m, p.k, p.a.data(), p.a_scale.data());
  const PackedGemm gemm(SourceOf(p), kernels);
  for (const Parallel& parallel : {Parallel{}, ThreadPool()}) {
    std::vector<uint8_t> y(static_cast<size_t>(p.m * p.n) * p.element_bytes(), 0xaa);
    std::vector<char> scratch(gemm.ScratchBytes(p.m, PackedGemm::Activations::kFloat));
    PackedGemm::Call call;
    call.x = x.data();
    call.rows = p.m;
    call.y = y.data();
    call.scratch = scratch.data();
    gemm.Run(call, parallel);
    CHECK(y == RunGemm(p, kernels, {}), "%s: %s", kernels.name, p.text().c_str());
  }
}

// Largest relative error of rounding to `type`, and half of its smallest subnormal.
double Rounding(ElementType type) {
  return type == ElementType::kFloat32 ? 0x1p-24 : type == ElementType::kFloat16 ? 0x1p-11 : 0x1p-8;
}
double Smallest(ElementType type) { return type == ElementType::kFloat16 ? 0x1p-25 : 0x1p-140; }

void CheckGemm(const Problem& p, const Kernels& kernels) {
  const std::vector<uint8_t> y = RunGemm(p, kernels, {});
  const std::vector<uint8_t> threaded = RunGemm(p, kernels, ThreadPool());
  CHECK(y == threaded, "%s: threads change the result: %s", kernels.name, p.text().c_str());
  // With structured scales nothing is rounded before the sum over all of K is exact: all kernels give the same bytes.
  CHECK(p.max_multiple == 0 || y == RunGemm(p, kPortableKernels, {}), "%s: not the bytes of %s: %s", kernels.name,
        kPortableKernels.name, p.text().c_str());
  for (int64_t m = 0; m < p.m; ++m) {
    for (int64_t n = 0; n < p.n; ++n) {
      double exact = 0, size = 0;
      for (int64_t g = 0; g < p.groups(); ++g) {
        int64_t sum = 0;
        for (int64_t k = g * p.block; k < std::min(p.k, (g + 1) * p.block); ++k) {
          sum += int64_t{p.a[static_cast<size_t>(m * p.k + k)] - p.zero_point} * p.b[static_cast<size_t>(k * p.n + n)];
        }
        const double term = static_cast<double>(sum) * p.scale[static_cast<size_t>(g * p.n + n)];
        exact += term;
        size += std::fabs(term);
      }
      const double a_scale = p.a_scale[static_cast<size_t>(p.per_token ? m : 0)];
      exact *= a_scale;
      size *= a_scale;
      const double value = LoadElement(y.data(), p.type, m * p.n + n);
      const double float_error = size * static_cast<double>(p.groups() + 4) * 0x1p-24;
      const double tolerance = float_error + (std::fabs(exact) + float_error) * Rounding(p.type) + Smallest(p.type);
      CHECK(std::fabs(value - exact) <= tolerance, "%s: row %d column %d: %.9g instead of %.9g: %s", kernels.name,
            static_cast<int>(m), static_cast<int>(n), value, exact, p.text().c_str());
    }
  }
}

// One group with scale 1 and a_scale 1: the float32 result is the integer sum itself.
void CheckExactIntegers(Random& random, Problem p, const Kernels& kernels) {
  if (p.type != ElementType::kFloat32) return;
  const int64_t group = Uniform(random, 0, p.groups() - 1);
  p.per_token = false;
  p.a_scale.assign(1, 1.0f);
  for (int64_t i = 0; i < p.groups() * p.n; ++i) {
    p.scale[static_cast<size_t>(i)] = i / p.n == group ? 1.0f : 0.0f;
    StoreElement(p.scale_bytes.data(), p.type, i, p.scale[static_cast<size_t>(i)]);
  }
  const std::vector<uint8_t> y = RunGemm(p, kernels, {});
  for (int64_t i = 0; i < p.m * p.n; ++i) {
    int64_t sum = 0;
    for (int64_t k = group * p.block; k < std::min(p.k, (group + 1) * p.block); ++k) {
      sum += int64_t{p.a[static_cast<size_t>(i / p.n * p.k + k)] - p.zero_point} *
             p.b[static_cast<size_t>(k * p.n + i % p.n)];
    }
    CHECK(LoadElement(y.data(), p.type, i) == static_cast<float>(sum), "%s: element %d: %s", kernels.name,
          static_cast<int>(i), p.text().c_str());
  }
}

void TestGemm(Random& random, const Kernels& kernels, int problems) {
  static constexpr int64_t kBlocks[] = {1, 7, 8, 16, 32, 64, 100, 128};
  for (int i = 0; i < problems; ++i) {
    const int64_t m = i % 3 == 0 ? Uniform(random, 1, 80) : Uniform(random, 1, 12);
    const int64_t k = i % 2 == 0 ? Uniform(random, 1, 300) : 64 * Uniform(random, 1, 6);
    const int64_t n = i % 2 == 0 ? Uniform(random, 1, 150) : 16 * Uniform(random, 1, 9);
    const int64_t block = std::min(k, i % 5 == 0 ? k : kBlocks[Uniform(random, 0, 7)]);
    const auto type = static_cast<ElementType>(Uniform(random, 0, 2));
    const int zero_point = i % 2 == 0 ? 128 : static_cast<int>(Uniform(random, 0, 255));
    const int max_multiple = i % 3 == 0 ? static_cast<int>(Uniform(random, 1, 15)) : 0;
    const Problem p = RandomProblem(random, 4, m, k, n, block, type, zero_point, max_multiple);
    CheckGemm(p, kernels);
    CheckExactIntegers(random, p, kernels);
    CheckFloatActivations(random, p, kernels);
    const Problem bytes = RandomProblem(random, 8, m, k, n, k, type, zero_point, 0);
    CheckGemm(bytes, kernels);
    CheckExactIntegers(random, bytes, kernels);
  }
  // More rows than one panel, and than one task.
  CheckGemm(RandomProblem(random, 4, 530, 72, 40, 32, ElementType::kFloat32, 128, 0), kernels);
  CheckFloatActivations(random, RandomProblem(random, 4, 530, 72, 40, 32, ElementType::kFloat16, 128, 0), kernels);
  CheckFloatActivations(random, RandomProblem(random, 4, 9, 9000, 40, 128, ElementType::kFloat32, 128, 15), kernels);
  CheckGemm(RandomProblem(random, 4, 530, 72, 40, 32, ElementType::kFloat32, 3, 15), kernels);
  CheckGemm(RandomProblem(random, 4, 300, 40, 250, 8, ElementType::kFloat32, 128, 15), kernels);
  CheckGemm(RandomProblem(random, 8, 530, 1100, 40, 1100, ElementType::kFloat32, 3, 0), kernels);
  // Structured scales in tasks that are too large for quick problems: K in several cuts, all rows at once and more, a
  // last strip that is alone or not whole.
  for (const int64_t n : {40, 72, 80}) {
    for (const auto type : {ElementType::kFloat32, ElementType::kFloat16}) {
      const int64_t m = 200 + n;
      const Problem p =
          RandomProblem(random, 4, m, 20 * n + 4, n, 4 * n, type, type == ElementType::kFloat32 ? 3 : 128, 15);
      CHECK(RunOneTask(p, kernels) == RunGemm(p, kPortableKernels, {}), "%s: %s", kernels.name, p.text().c_str());
    }
  }
}

void TestQuantize(Random& random, const Kernels& kernels, int problems) {
  for (int i = 0; i < problems; ++i) {
    const int64_t rows = Uniform(random, 1, 5);
    const int64_t k = Uniform(random, 1, 300);
    const auto type = static_cast<ElementType>(i % 3);
    const int exponent = static_cast<int>(Uniform(random, -150, 120));
    std::vector<uint8_t> x(static_cast<size_t>(rows * k) * 4);
    for (int64_t j = 0; j < rows * k; ++j) {
      float value =
          std::ldexp(static_cast<float>(Uniform(random, -2000, 2000)), type == ElementType::kFloat16 ? -8 : exponent);
      if (i % 10 == 0 && Uniform(random, 0, 99) == 0) value = std::numeric_limits<float>::infinity();
      if (i % 10 == 1 && Uniform(random, 0, 99) == 0) value = std::numeric_limits<float>::quiet_NaN();
      if (i % 10 == 2) value = 0.0f;
      StoreElement(x.data(), type, j, value);
    }
    std::vector<uint8_t> y(static_cast<size_t>(rows * k)), expected_y(y.size());
    std::vector<float> scale(static_cast<size_t>(rows)), expected_scale(scale.size());
    kernels.quantize(x.data(), type, rows, k, y.data(), scale.data());
    kPortableKernels.quantize(x.data(), type, rows, k, expected_y.data(), expected_scale.data());
    CHECK(y == expected_y, "%s rows=%d k=%d type=%d", kernels.name, static_cast<int>(rows), static_cast<int>(k),
          static_cast<int>(type));
    for (int64_t row = 0; row < rows; ++row) {
      const float got = scale[static_cast<size_t>(row)];
      const float expected = expected_scale[static_cast<size_t>(row)];
      CHECK(got == expected || (std::isnan(got) && std::isnan(expected)), "%s: scale %g instead of %g", kernels.name,
            static_cast<double>(got), static_cast<double>(expected));
    }
  }
}

void TestElements() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const float value = FloatFromFloat16(half);
    if (!std::isnan(value)) CHECK(Float16FromFloat(value) == half, "float16 %x", bits);
    const int exponent = (half >> 10) & 31;
    const double fraction = half & 1023;
    if (exponent < 31) {
      const double exact = std::ldexp(exponent == 0 ? fraction : fraction + 1024, std::max(exponent, 1) - 25);
      CHECK(std::fabs(value) == exact, "float16 %x is %g", bits, static_cast<double>(value));
    }
    const float brain = FloatFromBFloat16(half);
    if (!std::isnan(brain)) CHECK(BFloat16FromFloat(brain) == half, "bfloat16 %x", bits);
  }
  CHECK(Float16FromFloat(65519.0f) == 0x7bff && Float16FromFloat(65520.0f) == 0x7c00, "float16 overflow");
  CHECK(Float16FromFloat(2049.0f) == 0x6800 && Float16FromFloat(2051.0f) == 0x6802, "float16 ties to even");
  CHECK(Float16FromFloat(0x1p-25f) == 0 && Float16FromFloat(0x1.8p-24f) == 2, "float16 subnormal ties to even");
  CHECK(BFloat16FromFloat(257.0f) == 0x4380 && BFloat16FromFloat(259.0f) == 0x4382, "bfloat16 ties to even");
}

void TestScaleMultiples() {
  float base = 0;
  int8_t multiple[4];
  const float good[] = {0.3f * 6, 0.3f * -9, 0, 0.3f * 15};
  float exact[4];
  for (int i = 0; i < 4; ++i) exact[i] = std::round(good[i] * 64.0f / 0.3f) * 0.25f;
  CHECK(ScaleMultiples(exact, 4, 15, &base, multiple), "multiples of one base");
  for (int i = 0; i < 4; ++i) CHECK(base * static_cast<float>(multiple[i]) == exact[i], "multiple %d", i);
  const float zeros[] = {0, 0};
  CHECK(ScaleMultiples(zeros, 2, 15, &base, multiple) && base == 0, "zeros");
  const float free[] = {1.0f, 1.37f, 2.0f};
  CHECK(!ScaleMultiples(free, 3, 15, &base, multiple), "free scales");
  const float wide[] = {1.0f, 16.0f};
  CHECK(!ScaleMultiples(wide, 2, 15, &base, multiple), "ratio above 15");
  const float infinite[] = {1.0f, std::numeric_limits<float>::infinity()};
  CHECK(!ScaleMultiples(infinite, 2, 15, &base, multiple), "infinity");
}

void TestChoice() {
  setenv("FPTQ_CPU_ISA", "portable", 1);
  CHECK(std::string(ChosenKernels().name) == "portable", "forced");
  setenv("FPTQ_CPU_ISA", "abacus", 1);
  bool refused = false;
  try {
    ChosenKernels();
  } catch (const std::runtime_error& error) {
    refused = std::string(error.what()).find("'abacus'") != std::string::npos;
  }
  CHECK(refused, "an unknown instruction set is refused by name");
  unsetenv("FPTQ_CPU_ISA");
  CHECK(&ChosenKernels() == AvailableKernels().front(), "fastest by default");
}

}  // namespace
}  // namespace fptq::cpu

int main(int argc, char** argv) {
  using namespace fptq::cpu;
  const int problems = argc > 1 ? std::atoi(argv[1]) : 300;
  TestElements();
  TestScaleMultiples();
  TestChoice();
  for (const Kernels* kernels : TestedKernels()) {
    Random random(7);
    TestGemm(random, *kernels, problems);
    TestQuantize(random, *kernels, problems);
    TestFusedQuantize(random, *kernels, problems);
    TestAttention(random, *kernels, problems / 4, ThreadPool());
    std::printf("%s: %d random products and %d quantizations are exact, attention is close\n", kernels->name, problems,
                problems);
  }
  return 0;
}
