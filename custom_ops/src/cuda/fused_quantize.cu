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
  const unsigned lane = threadIdx.x % 32;
  double sum = lane < blockDim.x / 32 ? of_warp[lane] : 0.0;
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, distance);
  return sum;
}

/// ONNX QuantizeLinear; NaN gives 0.
__device__ __forceinline__ uint32_t QuantizeLinear(float x, float scale, float zero_point) {
  return static_cast<uint32_t>(fminf(fmaxf(rintf(x / scale) + zero_point, 0.0f), 255.0f));
}

__device__ __forceinline__ void QuantizeLinear(const float (&x)[kVector], float scale, float zero_point,
                                               uint32_t (&words)[kVector / 4]) {
  words[0] = words[1] = 0;
#pragma unroll
  for (int i = 0; i < kVector; ++i) words[i / 4] |= QuantizeLinear(x[i], scale, zero_point) << (8 * (i % 4));
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
  const auto* weight = static_cast<const Vector<T>*>(call.weight);
  if (kNorm && threadIdx.x < call.k / kVector) ptx::PrefetchToL2(weight + threadIdx.x);  // constant in all but theory
  ptx::WaitForPredecessors();
  const int vectors = static_cast<int>(call.k / kVector);
  const int64_t first = int64_t{blockIdx.x} * vectors;
  const auto* x = static_cast<const Vector<T>*>(call.x) + first;
  const auto* other = static_cast<const Vector<T>*>(call.other) + first;
  const auto at = [](int v) { return v * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x); };

  // Everything is read at once: one latency, not one after the other.
  const bool is_static = call.scale == nullptr;
  const float static_scale = is_static ? *call.static_scale : 1.0f;
  const float zero_point = is_static ? static_cast<float>(*call.zero_point) : 0.0f;
  constexpr bool kFewRows = kVectors == 1;  // where registers allow it
  Vector<T> held[kVectors], factors[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (at(v) < vectors) held[v] = x[at(v)];
    if (kNorm && kFewRows && at(v) < vectors) factors[v] = weight[at(v)];
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
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (at(v) >= vectors) continue;
      if (!kFewRows) factors[v] = weight[at(v)];
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        held[v].values[i] = Numeric<T>::FromFloat(
            Scaled<T>(Numeric<T>::ToFloat(held[v].values[i]), rms, Numeric<T>::ToFloat(factors[v].values[i])));
      }
    }
  }

  uint32_t magnitude = 0;
  float scale = 1;
  if (!is_static) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (at(v) >= vectors) continue;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        magnitude = max(magnitude, MagnitudeBits(Numeric<T>::ToFloat(held[v].values[i])));
      }
    }
    magnitude = LargestOfCta(magnitude);
    scale = RowScale(magnitude);
    if (threadIdx.x == 0) call.scale[blockIdx.x] = scale;
  }
  const bool finite = scale == scale;
  const Quantizer<T> quantize(magnitude, scale);
  uint2* target = reinterpret_cast<uint2*>(call.y) + first;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (at(v) >= vectors) continue;
    float values[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[i] = Numeric<T>::ToFloat(held[v].values[i]);
    uint32_t words[2] = {kZeroPoints, kZeroPoints};
    if (is_static) {
      QuantizeLinear(values, static_scale, zero_point, words);
    } else if (finite) {
      quantize(values, words);
    }
    target[at(v)] = make_uint2(words[0], words[1]);
  }
}

constexpr int kShares = 8;               // CTAs of a cluster that share a row
constexpr int kMinSharedVectors = 512;   // of a row
constexpr int kMaxSharedThreads = 1024;  // one vector each

/// SiLU * up of few rows, which take one CTA long: a cluster shares a row and exchanges its largest magnitudes. sm_90
/// and newer; the same bytes as FusedRows.
template <class T>
__global__ void __launch_bounds__(kMaxSharedThreads) SiluMulShared(const __grid_constant__ FusedCall call) {
#if __CUDA_ARCH__ >= 900
  __shared__ uint64_t received;
  __shared__ uint2 largest[kShares];
  const bool is_static = call.scale == nullptr;
  if (threadIdx.x == 0 && !is_static) {
    ptx::BarrierInit(&received, 1);
    ptx::BarrierInitFence();
    ptx::BarrierArriveExpect(&received, sizeof(largest));
  }
  __syncthreads();
  ptx::AllowSuccessors();
  ptx::ClusterArriveRelaxed();
  ptx::WaitForPredecessors();
  const uint32_t rank = ptx::ClusterRank();
  const int vectors = static_cast<int>(call.k / kVector);
  const plan::Range mine = plan::Share(vectors, static_cast<int>(rank), kShares);
  const int64_t row = blockIdx.x / kShares;
  const int64_t at = row * vectors + mine.begin + static_cast<int>(threadIdx.x);
  const bool is_mine = static_cast<int>(threadIdx.x) < mine.end - mine.begin;
  const float static_scale = is_static ? *call.static_scale : 1.0f;
  const float zero_point = is_static ? static_cast<float>(*call.zero_point) : 0.0f;
  float values[kVector] = {};
  uint32_t magnitude = 0;
  if (is_mine) {
    const Vector<T> gate = static_cast<const Vector<T>*>(call.x)[at];
    const Vector<T> up = static_cast<const Vector<T>*>(call.other)[at];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      values[i] = SiluMul<T>(Numeric<T>::ToFloat(gate.values[i]), Numeric<T>::ToFloat(up.values[i]));
      magnitude = max(magnitude, MagnitudeBits(values[i]));
    }
  }
  ptx::ClusterWait();  // the barriers of the others are ready
  uint32_t words[2] = {kZeroPoints, kZeroPoints};
  if (is_static) {
    QuantizeLinear(values, static_scale, zero_point, words);
  } else {
    magnitude = LargestOfCta(magnitude);
    if (threadIdx.x < kShares) {
      ptx::StoreClusterAsync(ptx::SharedAddress(largest + rank), make_uint2(magnitude, 0), &received, threadIdx.x);
    }
    ptx::BarrierWait(&received, 0);  // and until then nobody leaves to whom something is sent
#pragma unroll
    for (int i = 0; i < kShares; ++i) magnitude = max(magnitude, largest[i].x);
    const float scale = RowScale(magnitude);
    if (threadIdx.x == 0 && rank == 0) call.scale[row] = scale;
    const Quantizer<T> quantize(magnitude, scale);
    if (scale == scale) quantize(values, words);
  }
  if (is_mine) reinterpret_cast<uint2*>(call.y)[at] = make_uint2(words[0], words[1]);
#endif
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
  magnitude = LargestOfCta(magnitude);
  const float scale = RowScale(magnitude);
  if (threadIdx.x == 0) call.scale[blockIdx.x] = scale;
  const bool finite = scale == scale;
  const Quantizer<T> quantize(magnitude, scale);
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
    const int64_t vectors = call.k / kVector;
    if (device.HasBulkCopies() && row.vectors_per_thread > 0 && call.rows * kShares <= 2 * device.multiprocessors &&
        vectors >= kMinSharedVectors && vectors <= kShares * kMaxSharedThreads) {
      LaunchShape shared = shape;
      shared.grid.x *= kShares;
      shared.cluster = kShares;
      shared.threads = static_cast<int>(packing::CeilDiv(packing::CeilDiv(vectors, kShares), 32) * 32);
      return Launch(SiluMulShared<T>, shared, stream, call);
    }
    return LaunchFusedOf<T, false>(row, shape, stream, call);
  });
}

}  // namespace fptq::cuda
