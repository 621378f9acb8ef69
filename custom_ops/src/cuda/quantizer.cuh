// Rounding rows of values to uint8, for the kernels that end in activations: one CTA per row.
#ifndef FPTQ_CUDA_QUANTIZER_CUH_
#define FPTQ_CUDA_QUANTIZER_CUH_

#include <algorithm>

#include "cuda/common.cuh"

namespace fptq::cuda {

inline constexpr int kVector = 8;  // values per load
inline constexpr int kMaxRowThreads = 1024;
inline constexpr uint32_t kZeroPoints = 0x80808080u;  // 128 in each byte

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
__device__ __forceinline__ uint32_t LargestOfCta(uint32_t magnitude) {
  __shared__ uint32_t of_warp[kMaxRowThreads / 32];
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

inline bool Aligned(const void* pointer, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

/// How a CTA walks a row of k values: `vectors_per_thread` of eight values each, or, if that is 0, single values.
struct RowShape {
  int vectors_per_thread;
  int threads;

  /// `aligned`: all rows of all operands start at whole vectors.
  static RowShape Of(const Device& device, int64_t rows, int64_t k, bool aligned) {
    const int64_t vectors = k / kVector;
    // Few rows: many threads for latency. Many rows: four vectors each, and several CTAs per multiprocessor.
    int per_thread = rows <= 2 * device.multiprocessors ? 1 : 4;
    while (per_thread < 4 && vectors > int64_t{per_thread} * kMaxRowThreads) per_thread *= 2;
    const int64_t threads = packing::CeilDiv(packing::CeilDiv(vectors, per_thread), 32) * 32;
    if (!aligned || k % kVector != 0 || threads > kMaxRowThreads) {
      return {0, static_cast<int>(std::min<int64_t>(packing::CeilDiv(k, 32) * 32, kMaxRowThreads))};
    }
    return {per_thread, static_cast<int>(threads)};
  }
};

}  // namespace fptq::cuda

#endif  // FPTQ_CUDA_QUANTIZER_CUH_
