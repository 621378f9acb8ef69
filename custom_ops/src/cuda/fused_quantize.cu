// RMSNorm (of a sum) and SiLU * up that end in uint8 activations; fused_quantize_schema.h says what they compute.

#include "cuda/quantizer.cuh"

namespace fptq::cuda {
namespace {

/// Sum over the CTA, always in the same order.
__device__ double SumOfCta(double value) {
  __shared__ double of_warp[kMaxRowThreads / 32];
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, distance);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) sum += of_warp[warp];
  return sum;
}

/// ONNX QuantizeLinear; NaN gives 0.
__device__ __forceinline__ uint32_t QuantizeLinear(float x, float scale, float zero_point) {
  return static_cast<uint32_t>(fminf(fmaxf(rintf(x / scale) + zero_point, 0.0f), 255.0f));
}

template <class T>
__device__ __forceinline__ float Rounded(float x) {
  return Numeric<T>::ToFloat(Numeric<T>::FromFloat(x));
}

template <class T>
__device__ __forceinline__ float SiluMul(float gate, float up) {
  return Rounded<T>(gate / (1.0f + expf(-gate)) * up);
}

template <class T>
__device__ __forceinline__ float Scaled(float x, float rms, float weight) {
  return Rounded<T>(x / rms * weight);
}

__device__ __forceinline__ float Rms(double squares, const FusedCall& call) {
  return sqrtf(static_cast<float>(squares / static_cast<double>(call.k)) + call.epsilon);
}

/// One CTA per row, which stays in registers: thread t holds the vectors t, t + threads, ...
template <class T, bool kNorm, int kVectors>
__global__ void __launch_bounds__(kMaxRowThreads, 1) FusedRows(const __grid_constant__ FusedCall call) {
  ptx::AllowSuccessors();
  ptx::WaitForPredecessors();
  const int vectors = static_cast<int>(call.k / kVector);
  const int64_t first = int64_t{blockIdx.x} * vectors;
  const auto* x = static_cast<const Vector<T>*>(call.x) + first;
  const auto* other = static_cast<const Vector<T>*>(call.other) + first;
  const auto at = [](int v) { return v * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x); };

  Vector<T> held[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (at(v) < vectors) held[v] = x[at(v)];
  }
  double squares = 0;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (at(v) >= vectors || (kNorm && call.other == nullptr)) continue;
    const Vector<T> second = other[at(v)];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float a = Numeric<T>::ToFloat(held[v].values[i]);
      const float b = Numeric<T>::ToFloat(second.values[i]);
      held[v].values[i] = Numeric<T>::FromFloat(kNorm ? a + b : SiluMul<T>(a, b));
    }
    if constexpr (kNorm) (static_cast<Vector<T>*>(call.sum) + first)[at(v)] = held[v];
  }
  if constexpr (kNorm) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (at(v) >= vectors) continue;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const double value = Numeric<T>::ToFloat(held[v].values[i]);
        squares += value * value;
      }
    }
    const float rms = Rms(SumOfCta(squares), call);
    const auto* weight = static_cast<const Vector<T>*>(call.weight);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (at(v) >= vectors) continue;
      const Vector<T> factors = weight[at(v)];
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        held[v].values[i] = Numeric<T>::FromFloat(
            Scaled<T>(Numeric<T>::ToFloat(held[v].values[i]), rms, Numeric<T>::ToFloat(factors.values[i])));
      }
    }
  }

  uint32_t magnitude = 0;
  float scale = 1;
  if (call.scale != nullptr) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (at(v) >= vectors) continue;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        magnitude = max(magnitude, MagnitudeBits(Numeric<T>::ToFloat(held[v].values[i])));
      }
    }
    scale = RowScale(LargestOfCta(magnitude));
    if (threadIdx.x == 0) call.scale[blockIdx.x] = scale;
  }
  const bool finite = scale == scale;
  const Quantizer quantize(scale);
  const float static_scale = call.scale == nullptr ? *call.static_scale : 1.0f;
  const float zero_point = call.scale == nullptr ? static_cast<float>(*call.zero_point) : 0.0f;
  uint2* target = reinterpret_cast<uint2*>(call.y) + first;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (at(v) >= vectors) continue;
    float values[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[i] = Numeric<T>::ToFloat(held[v].values[i]);
    uint32_t words[2] = {kZeroPoints, kZeroPoints};
    if (call.scale == nullptr) {
      words[0] = words[1] = 0;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        words[i / 4] |= QuantizeLinear(values[i], static_scale, zero_point) << (8 * (i % 4));
      }
    } else if (finite) {
      quantize(values, words);
    }
    target[at(v)] = make_uint2(words[0], words[1]);
  }
}

/// Any K and alignment: the row is read as often as it is needed.
template <class T, bool kNorm>
__global__ void __launch_bounds__(kMaxRowThreads) FusedAnyRows(const __grid_constant__ FusedCall call) {
  ptx::AllowSuccessors();
  ptx::WaitForPredecessors();
  const int64_t first = int64_t{blockIdx.x} * call.k;
  const T* x = static_cast<const T*>(call.x) + first;
  const T* other = static_cast<const T*>(call.other) + first;
  const auto normalized = [&](int64_t i) {  // what the norm is of
    const float value = Numeric<T>::ToFloat(x[i]);
    return call.other == nullptr ? value : Rounded<T>(value + Numeric<T>::ToFloat(other[i]));
  };
  float rms = 1;
  if constexpr (kNorm) {
    double squares = 0;
    for (int64_t i = threadIdx.x; i < call.k; i += blockDim.x) {
      const float value = normalized(i);
      if (call.other != nullptr) static_cast<T*>(call.sum)[first + i] = Numeric<T>::FromFloat(value);
      squares += double{value} * double{value};
    }
    rms = Rms(SumOfCta(squares), call);
  }
  const auto result = [&](int64_t i) {
    if constexpr (kNorm) {
      return Scaled<T>(normalized(i), rms, Numeric<T>::ToFloat(static_cast<const T*>(call.weight)[i]));
    } else {
      return SiluMul<T>(Numeric<T>::ToFloat(x[i]), Numeric<T>::ToFloat(other[i]));
    }
  };
  if (call.scale == nullptr) {
    const float zero_point = static_cast<float>(*call.zero_point);
    for (int64_t i = threadIdx.x; i < call.k; i += blockDim.x) {
      call.y[first + i] = static_cast<uint8_t>(QuantizeLinear(result(i), *call.static_scale, zero_point));
    }
    return;
  }
  uint32_t magnitude = 0;
  for (int64_t i = threadIdx.x; i < call.k; i += blockDim.x) magnitude = max(magnitude, MagnitudeBits(result(i)));
  const float scale = RowScale(LargestOfCta(magnitude));
  if (threadIdx.x == 0) call.scale[blockIdx.x] = scale;
  const bool finite = scale == scale;
  const Quantizer quantize(scale);
  for (int64_t i = threadIdx.x; i < call.k; i += blockDim.x) {
    call.y[first + i] = finite ? quantize(result(i)) : static_cast<uint8_t>(kZeroPoints);
  }
}

template <class T, bool kNorm>
void LaunchFusedOf(const RowShape& row, const LaunchShape& shape, Stream stream, const FusedCall& call) {
  switch (row.vectors_per_thread) {
    case 1:
      return Launch(FusedRows<T, kNorm, 1>, shape, stream, call);
    case 2:
      return Launch(FusedRows<T, kNorm, 2>, shape, stream, call);
    case 4:
      return Launch(FusedRows<T, kNorm, 4>, shape, stream, call);
    default:
      return Launch(FusedAnyRows<T, kNorm>, shape, stream, call);
  }
}

}  // namespace

void LaunchFusedQuantize(const Device& device, DataType type, const FusedCall& call, Stream stream) {
  if (call.rows == 0) return;
  const bool aligned = Aligned(call.x, 16) && Aligned(call.other, 16) && Aligned(call.weight, 16) &&
                       Aligned(call.sum, 16) && Aligned(call.y, 8);
  const RowShape row = RowShape::Of(device, call.rows, call.k, aligned);
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(call.rows));
  shape.threads = row.threads;
  shape.shared_bytes = 0;
  shape.overlap = device.HasBulkCopies();
  ForType(type, [&](auto zero) {
    using T = decltype(zero);
    if (call.weight != nullptr) return LaunchFusedOf<T, true>(row, shape, stream, call);
    return LaunchFusedOf<T, false>(row, shape, stream, call);
  });
}

}  // namespace fptq::cuda
