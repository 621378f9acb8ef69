// From the sums of a tile to results, for the accumulators of wgmma.
#ifndef FPTQ_CUDA_TILE_EPILOGUE_CUH_
#define FPTQ_CUDA_TILE_EPILOGUE_CUH_

#include "cuda/common.cuh"

namespace fptq::cuda {

/// What one thread of a tile makes of its sums: two neighbouring channels of rows first + offset + 8 i and the next. A
/// tile has thousands of results, and each instruction per result is a tenth of a microsecond at the end of the kernel:
/// a tile without edges takes a path without bounds, with offsets that are known when compiling.
template <class T, Encoding kEncoding>
class TileEpilogue {
 public:
  /// `rows`: of the tile from `first_row` on, a multiple of 8; `offset`: of this thread in them, below 8; `n`: an even
  /// channel, which may be beyond the last.
  __device__ TileEpilogue(const MatMulArguments& args, int64_t first_row, int offset, int rows, int64_t n) {
    const MatMulCall& call = args.call;
    const int64_t channels = args.weights.layout.n;
    const int64_t left = call.m - first_row;
    whole_ = left >= rows && channels % 2 == 0 && n < channels && call.per_token;
    rows_ = (n >= channels ? 0 : left < rows ? static_cast<int>(left) : rows) - offset;
    per_token_ = call.per_token;
    pairs_ = channels % 2 == 0;
    second_ = n + 1 < channels;
    scale_ = call.a_scale + (per_token_ ? first_row + offset : 0);
    row_bytes_ = channels * sizeof(T);
    y_ = static_cast<uint8_t*>(call.y) + (first_row + offset) * row_bytes_ + n * sizeof(T);
    zero_point_ = ZeroPointOf(call);
    if (rows_ <= 0) return;
    base_ = *reinterpret_cast<const float2*>(args.weights.column_base + n);
    if (kEncoding == Encoding::kInteger) sum_ = *reinterpret_cast<const int2*>(args.weights.column_sum + n);
  }

  /// Asks for a channel's factors, which come from device memory, while the sums are made.
  __device__ static void Prefetch(const MatMulArguments& args, int64_t n) {
    if (n >= args.weights.layout.n) return;
    ptx::PrefetchLine(args.weights.column_base + n);
    if (kEncoding == Encoding::kInteger) ptx::PrefetchLine(args.weights.column_sum + n);
  }

  /// Of rows 8 i and 8 i + 1; zeros beyond the last.
  template <int kCount>
  __device__ __forceinline__ void Scales(float2 (&scales)[kCount]) const {
    if (whole_ && rows_ > 8 * (kCount - 1)) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) scales[i] = make_float2(scale_[8 * i], scale_[8 * i + 1]);
      return;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      scales[i].x = 8 * i < rows_ ? scale_[per_token_ ? 8 * i : 0] : 0.0f;
      scales[i].y = 8 * i + 1 < rows_ ? scale_[per_token_ ? 8 * i + 1 : 0] : 0.0f;
    }
  }

  /// `sums`: bits of float (float encoding) or int32 (integer encoding) sums: both rows' even channel, then both rows'
  /// odd channel.
  template <int kCount>
  __device__ __forceinline__ void Store(const uint4 (&sums)[kCount], const float2 (&scales)[kCount]) const {
    uint8_t* row = y_;
    if (whole_ && rows_ > 8 * (kCount - 1)) {
#pragma unroll
      for (int i = 0; i < kCount; ++i, row += 8 * row_bytes_) {
        Put<true>(row, sums[i].x, sums[i].z, scales[i].x);
        Put<true>(row + row_bytes_, sums[i].y, sums[i].w, scales[i].y);
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i, row += 8 * row_bytes_) {
      if (8 * i < rows_) Put<false>(row, sums[i].x, sums[i].z, scales[i].x);
      if (8 * i + 1 < rows_) Put<false>(row + row_bytes_, sums[i].y, sums[i].w, scales[i].y);
    }
  }

  /// The order of calls fixes the order of float additions.
  __device__ static __forceinline__ uint4 Add(uint4 a, uint4 b) {
    const uint2 x = AddSums<kEncoding>({a.x, a.y}, {b.x, b.y});
    const uint2 z = AddSums<kEncoding>({a.z, a.w}, {b.z, b.w});
    return {x.x, x.y, z.x, z.y};
  }

 private:
  template <bool kWhole>
  __device__ __forceinline__ void Put(uint8_t* to, uint32_t even, uint32_t odd, float scale) const {
    float2 y;
    if constexpr (kEncoding == Encoding::kInteger) {
      y.x = packing::DequantizeInteger(static_cast<int>(even), sum_.x, base_.x, zero_point_, scale);
      y.y = packing::DequantizeInteger(static_cast<int>(odd), sum_.y, base_.y, zero_point_, scale);
    } else {
      y.x = packing::DequantizeFloat(__uint_as_float(even), base_.x, zero_point_, scale);
      y.y = packing::DequantizeFloat(__uint_as_float(odd), base_.y, zero_point_, scale);
    }
    T* row = reinterpret_cast<T*>(to);
    if (kWhole || pairs_) {
      *reinterpret_cast<typename Numeric<T>::Pair*>(row) = Numeric<T>::FromFloat2(y);
    } else {
      row[0] = Numeric<T>::FromFloat(y.x);
      if (second_) row[1] = Numeric<T>::FromFloat(y.y);
    }
  }

  int rows_;  ///< of the tile that exist, from this thread's first on
  bool whole_, pairs_, second_, per_token_;
  const float* scale_;
  uint8_t* y_;
  int64_t row_bytes_;
  int zero_point_ = 0;
  float2 base_ = {0, 0};
  int2 sum_ = {0, 0};
};

}  // namespace fptq::cuda

#endif  // FPTQ_CUDA_TILE_EPILOGUE_CUH_
