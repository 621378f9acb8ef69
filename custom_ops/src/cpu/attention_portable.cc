// Attention on vectors that every compiler target has, in whatever it has for them.
#include <cstdint>
#include <utility>

#include "cpu/attention.h"
#include "cpu/element.h"
#include "cpu/fused_quantize.h"
#include "cpu/packed_weights.h"
#include "cpu/target.h"

namespace fptq::cpu {
namespace {

#define FPTQ_QUARTERS _Pragma("GCC unroll 4") for (int q = 0; q < 4; ++q)

struct V {
  using Four = float __attribute__((vector_size(16)));
  using FourInts = int32_t __attribute__((vector_size(16)));
  struct Float {
    Four quarter[4];
  };

  // 8 accumulators, 4 vectors of keys or values and a broadcast fit 16 registers.
  static constexpr int kMaxRows = 2;
  static constexpr int kFewStrips = 1;
  static constexpr int kFewRows = 1;
  static constexpr int kManyStrips = 2;

  template <class Function>
  static Float Each(Function function) {
    Float result;
    FPTQ_QUARTERS result.quarter[q] = function(q);
    return result;
  }
  static Four Broadcast(float value) { return Four{value, value, value, value}; }

  static Float SetFloat(float value) {
    return Each([&](int) { return Broadcast(value); });
  }
  static Float Load(const float* data) {
    Float a;
    __builtin_memcpy(&a, data, sizeof(a));
    return a;
  }
  static void Store(float* data, const Float& a) { __builtin_memcpy(data, &a, sizeof(a)); }
  template <ElementType kType>
  static Float LoadElements(const void* x, int64_t index, int count) {
    static_assert(kType == ElementType::kFloat32, "attention is computed on float32");
    const float* data = static_cast<const float*>(x) + index;
    if (count == kStrip) return Load(data);
    Float a = SetFloat(0.0f);
    __builtin_memcpy(&a, data, static_cast<size_t>(count) * sizeof(float));
    return a;
  }
  static void Store(void* y, ElementType, int64_t index, const Float& a, int count) {
    __builtin_memcpy(static_cast<float*>(y) + index, &a, static_cast<size_t>(count) * sizeof(float));
  }

  static Float Add(const Float& a, const Float& b) {
    return Each([&](int q) { return a.quarter[q] + b.quarter[q]; });
  }
  static Float Multiply(const Float& a, const Float& b) {
    return Each([&](int q) { return a.quarter[q] * b.quarter[q]; });
  }
  static Float Divide(const Float& a, const Float& b) {
    return Each([&](int q) { return a.quarter[q] / b.quarter[q]; });
  }
  static Float MultiplyAdd(const Float& a, const Float& b, const Float& c) {
    return Each([&](int q) { return a.quarter[q] * b.quarter[q] + c.quarter[q]; });
  }
  static Float Negate(const Float& a) {
    return Each([&](int q) { return -a.quarter[q]; });
  }
  // b where one of them is NaN.
  static Float Max(const Float& a, const Float& b) {
    return Each([&](int q) { return a.quarter[q] > b.quarter[q] ? a.quarter[q] : b.quarter[q]; });
  }
  // Magnitudes below 2^22.
  static Float RoundEven(const Float& a) {
    const Four large = Broadcast(0x1.8p23f);
    return Each([&](int q) { return (a.quarter[q] + large) - large; });
  }
  // 2^n of whole n in -127..127; -127 gives 0. The sum has n in its low bits.
  static Float PowerOfTwo(const Float& n) {
    const Four biased = Broadcast(0x1.8p23f + 127.0f);
    return Each([&](int q) { return reinterpret_cast<Four>(reinterpret_cast<FourInts>(n.quarter[q] + biased) << 23); });
  }
  static constexpr float kLeastExponent = -127.0f;
  // a 2^n of whole n in kLeastExponent..0, where the least gives 0.
  static Float MultiplyPowerOfTwo(const Float& a, const Float& n) { return Multiply(a, PowerOfTwo(n)); }
  static Float KeepFirst(const Float& a, int count, float other) {
    Float result = SetFloat(other);
    __builtin_memcpy(&result, &a, static_cast<size_t>(count) * sizeof(float));
    return result;
  }
  static float ReduceMax(const Float& a) {
    float lane[kStrip];
    Store(lane, a);
    float largest = lane[0];
    for (int i = 1; i < kStrip; ++i) largest = lane[i] > largest ? lane[i] : largest;
    return largest;
  }
  static float ReduceAdd(const Float& a) {
    float lane[kStrip];
    Store(lane, a);
    for (int distance = 8; distance > 0; distance /= 2) {
      for (int i = 0; i < distance; ++i) lane[i] += lane[i + distance];
    }
    return lane[0];
  }
  static void StoreTransposed(const Float (&row)[kStrip], float* columns) {
    for (int r = 0; r < kStrip; ++r) {
      float lane[kStrip];
      Store(lane, row[r]);
      for (int c = 0; c < kStrip; ++c) columns[c * kStrip + r] = lane[c];
    }
  }
};

inline int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }

#include "cpu/attention_vector.inc"

}  // namespace

namespace portable {

void RotateHead(const AttentionCall& call, const float* x, int64_t position, float factor, float* y) {
  cpu::RotateHead(call, x, position, factor, y);
}

void Attend(const AttentionCall& call, const AttentionTask& task, float* scratch) { cpu::Attend(call, task, scratch); }

}  // namespace portable
}  // namespace fptq::cpu
