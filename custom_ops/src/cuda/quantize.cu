// Activation quantization.

#include <algorithm>

#include "cuda/common.cuh"

namespace fptq::cuda {
namespace {

constexpr int kVector = 8;  // values per load
constexpr int kMaxThreads = 1024;
constexpr uint32_t kZeroPoints = 0x80808080u;  // 128 in each byte

/// Eight neighbouring values.
template <class T>
struct alignas(sizeof(T) == 4 ? 16 : 8 * sizeof(T)) Vector {
  T values[kVector];
};

/// round_half_even(x / scale) + 128, clamped to 1..255, exactly as division gives it: the reciprocal's error can move
/// the quotient over a rounding boundary only near one, and there the division is carried out. Adding 1.5 * 2^23 rounds
/// to an integer and leaves it in the low bits: conversion instructions have a quarter of the rate or less.
class Quantizer {
 public:
  __device__ explicit Quantizer(float scale)
      : scale_(scale), reciprocal_(1.0f / scale), exact_only_(!(reciprocal_ <= 1e30f && reciprocal_ >= 1e-30f)) {}

  /// kCount values to as many bytes, four in a word.
  template <int kCount>
  __device__ void operator()(const float (&x)[kCount], uint32_t (&words)[kCount / 4]) const {
    float shifted[kCount];
    float distance = 0;  // largest one to the nearest integer
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float quotient = x[i] * reciprocal_;
      shifted[i] = quotient + kShift;
      distance = fmaxf(distance, fabsf(quotient - (shifted[i] - kShift)));
    }
    if (exact_only_ || distance > 0.4999f) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) shifted[i] = fminf(fmaxf(x[i] / scale_, -127.0f), 127.0f) + kShift;
    }
#pragma unroll
    for (int w = 0; w < kCount / 4; ++w) {
      const uint32_t low = __byte_perm(__float_as_uint(shifted[4 * w]), __float_as_uint(shifted[4 * w + 1]), 0x0040);
      const uint32_t high =
          __byte_perm(__float_as_uint(shifted[4 * w + 2]), __float_as_uint(shifted[4 * w + 3]), 0x0040);
      words[w] = __byte_perm(low, high, 0x5410) ^ kZeroPoints;
    }
  }
  __device__ uint8_t operator()(float x) const {
    const float same[4] = {x, x, x, x};
    uint32_t word[1];
    operator()(same, word);
    return static_cast<uint8_t>(word[0]);
  }

 private:
  static constexpr float kShift = 12582912.0f;
  float scale_, reciprocal_;
  bool exact_only_;
};

/// Largest magnitude of the CTA, as float bits: integer order, and above it infinity and NaN.
__device__ uint32_t LargestOfCta(uint32_t magnitude) {
  __shared__ uint32_t of_warp[kMaxThreads / 32];
  magnitude = __reduce_max_sync(0xFFFFFFFFu, magnitude);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = magnitude;
  __syncthreads();
  const uint32_t lane = threadIdx.x % 32;
  return __reduce_max_sync(0xFFFFFFFFu, lane < blockDim.x / 32 ? of_warp[lane] : 0u);
}

__device__ __forceinline__ uint32_t MagnitudeBits(float x) { return __float_as_uint(x) & 0x7FFFFFFFu; }

/// Scale of a row from its largest magnitude; NaN for a row that holds NaN or infinity.
__device__ __forceinline__ float RowScale(uint32_t magnitude) {
  if (magnitude >= 0x7F800000u) return __uint_as_float(0x7FC00000u);
  const float scale = __uint_as_float(magnitude) / 127.0f;
  return scale == 0.0f ? 1.0f : scale;
}

/// One CTA per row, which stays in registers: thread t holds the vectors t, t + threads, ...
template <class T, int kVectors>
__global__ void __launch_bounds__(kMaxThreads)
    QuantizeRows(const T* __restrict__ x, int64_t k, uint8_t* __restrict__ q, float* __restrict__ scales) {
  ptx::AllowSuccessors();
  ptx::WaitForPredecessors();
  const int64_t row = blockIdx.x;
  const int vectors = static_cast<int>(k / kVector);
  const Vector<T>* source = reinterpret_cast<const Vector<T>*>(x + row * k);
  Vector<T> held[kVectors];
  uint32_t magnitude = 0;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int at = v * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
    if (at < vectors) held[v] = source[at];
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int at = v * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
    if (at >= vectors) continue;
#pragma unroll
    for (int i = 0; i < kVector; ++i) magnitude = max(magnitude, MagnitudeBits(Numeric<T>::ToFloat(held[v].values[i])));
  }
  const float scale = RowScale(LargestOfCta(magnitude));
  if (threadIdx.x == 0) scales[row] = scale;
  const bool finite = scale == scale;
  const Quantizer quantize(scale);
  uint2* target = reinterpret_cast<uint2*>(q + row * k);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int at = v * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
    if (at >= vectors) continue;
    float values[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[i] = Numeric<T>::ToFloat(held[v].values[i]);
    uint32_t words[2] = {kZeroPoints, kZeroPoints};
    if (finite) quantize(values, words);
    target[at] = make_uint2(words[0], words[1]);
  }
}

/// Any K and alignment: the row is read twice.
template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    QuantizeAnyRows(const T* __restrict__ x, int64_t k, uint8_t* __restrict__ q, float* __restrict__ scales) {
  ptx::AllowSuccessors();
  ptx::WaitForPredecessors();
  const int64_t first = int64_t{blockIdx.x} * k;
  uint32_t magnitude = 0;
  for (int64_t i = threadIdx.x; i < k; i += blockDim.x) {
    magnitude = max(magnitude, MagnitudeBits(Numeric<T>::ToFloat(x[first + i])));
  }
  const float scale = RowScale(LargestOfCta(magnitude));
  if (threadIdx.x == 0) scales[blockIdx.x] = scale;
  const bool finite = scale == scale;
  const Quantizer quantize(scale);
  for (int64_t i = threadIdx.x; i < k; i += blockDim.x) {
    q[first + i] = finite ? quantize(Numeric<T>::ToFloat(x[first + i])) : static_cast<uint8_t>(kZeroPoints);
  }
}

template <class T>
__global__ void __launch_bounds__(256) QuantizeStatic(const T* __restrict__ x, int64_t count, const float* scale_in,
                                                      const uint8_t* zero_point_in, uint8_t* __restrict__ q) {
  ptx::AllowSuccessors();
  ptx::WaitForPredecessors();
  const float scale = *scale_in;
  const float zero_point = static_cast<float>(*zero_point_in);
  for (int64_t i = int64_t{blockIdx.x} * 256 + threadIdx.x; i < count; i += int64_t{gridDim.x} * 256) {
    const float value = rintf(Numeric<T>::ToFloat(x[i]) / scale) + zero_point;
    q[i] = static_cast<uint8_t>(fminf(fmaxf(value, 0.0f), 255.0f));
  }
}

bool Aligned(const void* pointer, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

}  // namespace

void LaunchDynamicQuantize(const Device& device, DataType type, const void* x, int64_t m, int64_t k, uint8_t* q,
                           float* scale, Stream stream) {
  if (m == 0) return;
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(m));
  shape.shared_bytes = 0;
  shape.overlap = device.HasBulkCopies();
  const int64_t vectors = k / kVector;
  // Few rows: many threads for latency. Many rows: four vectors each, and several CTAs per multiprocessor.
  int per_thread = m <= 2 * device.multiprocessors ? 1 : 4;
  while (per_thread < 4 && vectors > int64_t{per_thread} * kMaxThreads) per_thread *= 2;
  const int64_t threads = packing::CeilDiv(packing::CeilDiv(vectors, per_thread), 32) * 32;
  ForType(type, [&](auto zero) {
    using T = decltype(zero);
    const T* source = static_cast<const T*>(x);
    if (k % kVector != 0 || threads > kMaxThreads || !Aligned(x, 16) || !Aligned(q, 8)) {
      shape.threads = static_cast<int>(std::min<int64_t>(packing::CeilDiv(k, 32) * 32, kMaxThreads));
      return Launch(QuantizeAnyRows<T>, shape, stream, source, k, q, scale);
    }
    shape.threads = static_cast<int>(threads);
    if (per_thread == 1) return Launch(QuantizeRows<T, 1>, shape, stream, source, k, q, scale);
    if (per_thread == 2) return Launch(QuantizeRows<T, 2>, shape, stream, source, k, q, scale);
    return Launch(QuantizeRows<T, 4>, shape, stream, source, k, q, scale);
  });
}

void LaunchStaticQuantize(const Device& device, DataType type, const void* x, int64_t count, const float* scale,
                          const uint8_t* zero_point, uint8_t* q, Stream stream) {
  if (count == 0) return;
  LaunchShape shape;
  shape.grid = dim3(
      static_cast<unsigned>(std::min<int64_t>(packing::CeilDiv(count, 256), int64_t{device.multiprocessors} * 16)));
  shape.threads = 256;
  shape.shared_bytes = 0;
  shape.overlap = device.HasBulkCopies();
  ForType(type, [&](auto zero) {
    using T = decltype(zero);
    Launch(QuantizeStatic<T>, shape, stream, static_cast<const T*>(x), count, scale, zero_point, q);
  });
}

}  // namespace fptq::cuda
