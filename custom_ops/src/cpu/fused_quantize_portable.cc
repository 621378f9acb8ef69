// The fused steps in plain C++; the vector versions give the same bits.
#include <algorithm>
#include <cmath>

#include "cpu/fused_quantize.h"
#include "cpu/gemm_portable.h"

namespace fptq::cpu::portable {
namespace {

float RoundTo(ElementType type, float value) {
  float stored;
  StoreElement(&stored, type, 0, value);
  return LoadElement(&stored, type, 0);
}

void QuantizeBuffer(const float* buffer, const QuantizedRows& target, int64_t row) {
  uint8_t* y = target.y + row * target.k;
  if (target.static_scale == nullptr) {
    Quantize(buffer, ElementType::kFloat32, 1, target.k, y, target.scale + row);
    return;
  }
  const float low = -static_cast<float>(target.zero_point);
  const float high = 255.0f + low;
  for (int64_t i = 0; i < target.k; ++i) {
    const float ratio = buffer[i] / LoadUnaligned<float>(target.static_scale);
    const float clipped = std::min(ratio > low ? ratio : low, high);  // NaN gives the lowest
    y[i] = static_cast<uint8_t>(std::nearbyint(clipped) - low);
  }
}

float Exp(float x) {
  using namespace exp_constants;
  const float clipped = std::min(x > -kLimit ? x : -kLimit, kLimit);  // NaN gives the lowest
  const float n = std::nearbyint(clipped * kLog2E);
  const float r = std::fma(n, kMinusLn2Low, std::fma(n, kMinusLn2High, clipped));
  float p = kPolynomial[0];
  for (int i = 1; i < 6; ++i) p = std::fma(p, r, kPolynomial[i]);
  p = std::fma(p, r * r, r) + 1.0f;
  return p * FloatFromBits(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
}

}  // namespace

void NormRows(const NormCall& call, int64_t begin, int64_t end, float* buffer) {
  const int64_t k = call.target.k;
  for (int64_t row = begin; row < end; ++row) {
    double lane[16] = {};
    for (int64_t i = 0; i < k; ++i) {
      float value = LoadElement(call.x, call.type, row * k + i);
      if (call.skip != nullptr) {
        value = RoundTo(call.type, value + LoadElement(call.skip, call.type, row * k + i));
        StoreElement(call.sum, call.type, row * k + i, value);
      }
      buffer[i] = value;
      lane[i % 16] += double{value} * double{value};
    }
    const float rms = std::sqrt(static_cast<float>(AddLanes(lane) / static_cast<double>(k)) + call.epsilon);
    for (int64_t i = 0; i < k; ++i) {
      buffer[i] = RoundTo(call.type, buffer[i] / rms * LoadElement(call.weight, call.type, i));
    }
    QuantizeBuffer(buffer, call.target, row);
  }
}

void SiluMulRows(const SiluMulCall& call, int64_t begin, int64_t end, float* buffer) {
  const int64_t k = call.target.k;
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t i = 0; i < k; ++i) {
      const float gate = LoadElement(call.gate, call.type, row * k + i);
      const float silu = gate / (Exp(-gate) + 1.0f);
      buffer[i] = RoundTo(call.type, silu * LoadElement(call.up, call.type, row * k + i));
    }
    QuantizeBuffer(buffer, call.target, row);
  }
}

}  // namespace fptq::cpu::portable
