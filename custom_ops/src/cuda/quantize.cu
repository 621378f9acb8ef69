// Activation quantization.

#include "cuda/quantizer.cuh"

namespace fptq::cuda {
namespace {

/// One CTA per row, which stays in registers: thread t holds the vectors t, t + threads, ...
template <class T, int kVectors>
__global__ void __launch_bounds__(kMaxRowThreads)
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
  magnitude = LargestOfCta(magnitude);
  const float scale = RowScale(magnitude);
  if (threadIdx.x == 0) scales[row] = scale;
  const bool finite = scale == scale;
  const Quantizer<T> quantize(magnitude, scale);
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
__global__ void __launch_bounds__(kMaxRowThreads)
    QuantizeAnyRows(const T* __restrict__ x, int64_t k, uint8_t* __restrict__ q, float* __restrict__ scales) {
  ptx::AllowSuccessors();
  ptx::WaitForPredecessors();
  const int64_t first = int64_t{blockIdx.x} * k;
  uint32_t magnitude = 0;
  for (int64_t i = threadIdx.x; i < k; i += blockDim.x) {
    magnitude = max(magnitude, MagnitudeBits(Numeric<T>::ToFloat(x[first + i])));
  }
  magnitude = LargestOfCta(magnitude);
  const float scale = RowScale(magnitude);
  if (threadIdx.x == 0) scales[blockIdx.x] = scale;
  const bool finite = scale == scale;
  const Quantizer<T> quantize(magnitude, scale);
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

}  // namespace

void LaunchDynamicQuantize(const Device& device, DataType type, const void* x, int64_t m, int64_t k, uint8_t* q,
                           float* scale, Stream stream) {
  if (m == 0) return;
  const RowShape row = RowShape::Of(device, m, k, Aligned(x, 16) && Aligned(q, 8));
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(m));
  shape.threads = row.threads;
  shape.shared_bytes = 0;
  shape.overlap = device.HasBulkCopies();
  ForType(type, [&](auto zero) {
    using T = decltype(zero);
    const T* source = static_cast<const T*>(x);
    if (row.vectors_per_thread == 0) return Launch(QuantizeAnyRows<T>, shape, stream, source, k, q, scale);
    if (row.vectors_per_thread == 1) return Launch(QuantizeRows<T, 1>, shape, stream, source, k, q, scale);
    if (row.vectors_per_thread == 2) return Launch(QuantizeRows<T, 2>, shape, stream, source, k, q, scale);
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
