// Rounding rows of values to uint8, for the kernels that end in activations: one CTA per row.
#ifndef FPTQ_CUDA_QUANTIZER_CUH_
#define FPTQ_CUDA_QUANTIZER_CUH_

#include <algorithm>

#include "cuda/common.cuh"
#include "fptq/quantization.h"

namespace fptq::cuda {

inline constexpr int kVector = 8;  // values per load
inline constexpr int kMaxRowThreads = 1024;
inline constexpr int kFewRowThreads = 512;
inline constexpr uint32_t kZeroPoints = 0x80808080u;  // 128 in each byte

/// Eight neighbouring values.
template <class T>
struct alignas(sizeof(T) == 4 ? 16 : 8 * sizeof(T)) Vector {
  T values[kVector];
};

__device__ __forceinline__ float MagnitudeOf(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t MagnitudeBits(float x) { return __float_as_uint(x) & 0x7FFFFFFFu; }

/// round_half_even(x / scale) + 128 in 1..255, of values that are representable in T. Adding 1.5 * 2^23 rounds to an
/// integer and leaves it in the low bits: conversion instructions have a quarter of the rate or less. Branches are the
/// same for a whole row, and there is little code: it is cold wherever a kernel begins with it.
template <class T>
class Quantizer {
 public:
  /// `magnitude`: bits of the row's largest; `scale`: RowScale of it, not NaN where values are to be quantized.
  __device__ Quantizer(uint32_t magnitude, float scale)
      : row_(scale), factor_(MagnitudeOf(magnitude), scale, quantization::RoughReciprocal(scale)) {}

  /// kCount values to as many bytes, four in a word.
  template <int kCount>
  __device__ void operator()(const float (&x)[kCount], uint32_t (&words)[kCount / 4]) const {
    uint32_t shifted[kCount];
    if (sizeof(T) == 2 && factor_.Exists()) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) shifted[i] = __float_as_uint(factor_.Shifted(x[i]));
    } else {
      const quantization::RowDivision divide(row_);
      const bool rescales = divide.Rescales();
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        shifted[i] = __float_as_uint(divide(rescales ? divide.Prepare(x[i]) : x[i]) + 12582912.0f);
      }
    }
#pragma unroll
    for (int w = 0; w < kCount / 4; ++w) {
      const uint32_t low = __byte_perm(shifted[4 * w], shifted[4 * w + 1], 0x0040);
      const uint32_t high = __byte_perm(shifted[4 * w + 2], shifted[4 * w + 3], 0x0040);
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
  // Of short values the scale alone: few rows are divided, and their reciprocal takes time.
  std::conditional_t<sizeof(T) == 2, float, quantization::RowDivision> row_;
  quantization::ShortRowFactor factor_;
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

/// Scale of a row from its largest magnitude; NaN for a row that holds NaN or infinity.
__device__ __forceinline__ float RowScale(uint32_t magnitude) {
  if (magnitude >= 0x7F800000u) return __uint_as_float(0x7FC00000u);
  return quantization::RowScale(__uint_as_float(magnitude));
}

inline bool Aligned(const void* pointer, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

/// Eight neighbouring values as they lie in memory: arrays of 16-bit values would be taken apart into registers each.
template <class T>
struct RawVector {
  static constexpr int kWords = 2 * static_cast<int>(sizeof(T));
  uint32_t words[kWords];

  /// `x`: aligned to 16 bytes.
  __device__ static RawVector Load(const T* x) {
    RawVector vector;
#pragma unroll
    for (int w = 0; w < kWords; w += 4) {
      const uint4 four = reinterpret_cast<const uint4*>(x)[w / 4];
      vector.words[w] = four.x, vector.words[w + 1] = four.y, vector.words[w + 2] = four.z,
      vector.words[w + 3] = four.w;
    }
    return vector;
  }
  /// Raises `magnitude` to those of the values: bits without signs, in integer order; two 16-bit ones apart.
  __device__ void Raise(uint32_t& magnitude) const {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      if constexpr (sizeof(T) == 4) {
        magnitude = max(magnitude, words[w] & 0x7FFFFFFFu);
      } else {
        magnitude = __vmaxu2(magnitude, words[w] & 0x7FFF7FFFu);
      }
    }
  }
  /// What Raise has found, as bits of a float.
  __device__ static uint32_t Largest(uint32_t magnitude) {
    if constexpr (sizeof(T) == 4) {
      return magnitude;
    } else {
      const uint32_t bits = max(magnitude & 0xFFFFu, magnitude >> 16);
      typename Numeric<T>::Pair pair;
      memcpy(&pair, &bits, 4);
      return MagnitudeBits(Numeric<T>::ToFloat2(pair).x);
    }
  }
  __device__ void ToFloat(float (&values)[kVector]) const {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      if constexpr (sizeof(T) == 4) {
        values[w] = __uint_as_float(words[w]);
      } else {
        typename Numeric<T>::Pair pair;
        memcpy(&pair, &words[w], 4);
        const float2 two = Numeric<T>::ToFloat2(pair);
        values[2 * w] = two.x, values[2 * w + 1] = two.y;
      }
    }
  }
};

/// How a CTA walks a row of k values: `vectors_per_thread` of eight values each, or, if that is 0, single values.
struct RowShape {
  int vectors_per_thread;
  int threads;

  /// `aligned`: all rows of all operands start at whole vectors.
  static RowShape Of(const Device& device, int64_t rows, int64_t k, bool aligned) {
    const int64_t vectors = k / kVector;
    // Few rows: many threads for latency, but no more than find room beside a product of few tokens that still runs:
    // the next product starts when the last of these CTAs has. Many rows: four vectors each, and several CTAs per
    // multiprocessor.
    const bool few = rows <= 2 * device.multiprocessors;
    const int64_t most = few && vectors <= 4 * kFewRowThreads ? kFewRowThreads : kMaxRowThreads;
    int per_thread = few ? 1 : 4;
    while (per_thread < 4 && vectors > per_thread * most) per_thread *= 2;
    const int64_t threads = packing::CeilDiv(packing::CeilDiv(vectors, per_thread), 32) * 32;
    if (!aligned || k % kVector != 0 || threads > kMaxRowThreads) {
      return {0, static_cast<int>(std::min<int64_t>(packing::CeilDiv(k, 32) * 32, kMaxRowThreads))};
    }
    return {per_thread, static_cast<int>(threads)};
  }
};

}  // namespace fptq::cuda

#endif  // FPTQ_CUDA_QUANTIZER_CUH_
