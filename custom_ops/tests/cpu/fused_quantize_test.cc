#include "fused_quantize_test.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/aligned_buffer.h"
#include "cpu/element.h"

namespace fptq::cpu {
namespace {

std::vector<uint8_t> RandomValues(Random& random, ElementType type, int64_t count, bool bad) {
  std::vector<uint8_t> values(static_cast<size_t>(count) * 4);
  for (int64_t i = 0; i < count; ++i) {
    float value =
        std::ldexp(static_cast<float>(Uniform(random, -2000, 2000)), static_cast<int>(Uniform(random, -14, -6)));
    if (bad && Uniform(random, 0, 60) == 0) value = std::numeric_limits<float>::infinity();
    if (bad && Uniform(random, 0, 60) == 0) value = std::numeric_limits<float>::quiet_NaN();
    StoreElement(values.data(), type, i, value);
  }
  return values;
}

// Everything a call writes.
struct Output {
  std::vector<uint8_t> y;
  std::vector<float> scale;
  std::vector<uint8_t> sum;

  explicit Output(int64_t rows, int64_t k)
      : y(static_cast<size_t>(rows * k)), scale(static_cast<size_t>(rows)), sum(static_cast<size_t>(rows * k) * 4) {}
  bool operator==(const Output& other) const {
    return y == other.y && sum == other.sum &&
           std::memcmp(scale.data(), other.scale.data(), scale.size() * sizeof(float)) == 0;
  }
};

}  // namespace

void TestFusedQuantize(Random& random, const Kernels& kernels, int problems) {
  for (int i = 0; i < problems; ++i) {
    const int64_t rows = Uniform(random, 1, 5);
    const int64_t k = i % 4 == 0 ? 16 * Uniform(random, 1, 20) : Uniform(random, 1, 300);
    const auto type = static_cast<ElementType>(i % 3);
    const bool bad = i % 7 == 0;
    const std::vector<uint8_t> first = RandomValues(random, type, rows * k, bad);
    const std::vector<uint8_t> second = RandomValues(random, type, rows * k, false);
    const std::vector<uint8_t> weight = RandomValues(random, type, k, false);
    const float static_scale = 0.03f;
    const auto zero_point = static_cast<uint8_t>(Uniform(random, 0, 255));
    const bool is_static = Uniform(random, 0, 1) == 1;
    const bool skip = Uniform(random, 0, 1) == 1;
    const auto run = [&](const Kernels& used, bool norm) {
      Output output(rows, k);
      AlignedVector<float> buffer(static_cast<size_t>(RoundUp(k, 16)));
      QuantizedRows target;
      target.k = k;
      target.y = output.y.data();
      target.static_scale = is_static ? &static_scale : nullptr;
      target.zero_point = zero_point;
      target.scale = output.scale.data();
      if (norm) {
        NormCall call;
        call.x = first.data();
        call.skip = skip ? second.data() : nullptr;
        call.weight = weight.data();
        call.sum = output.sum.data();
        call.type = type;
        call.epsilon = 1e-5f;
        call.target = target;
        used.norm(call, 0, rows, buffer.data());
      } else {
        SiluMulCall call;
        call.gate = first.data();
        call.up = second.data();
        call.type = type;
        call.target = target;
        used.silu_mul(call, 0, rows, buffer.data());
      }
      return output;
    };
    for (const bool norm : {true, false}) {
      CHECK(run(kernels, norm) == run(kPortableKernels, norm), "%s: %s, rows=%d k=%d type=%d static=%d skip=%d",
            kernels.name, norm ? "norm" : "SiLU", static_cast<int>(rows), static_cast<int>(k), static_cast<int>(type),
            is_static, skip);
    }
  }
}

}  // namespace fptq::cpu
