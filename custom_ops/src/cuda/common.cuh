// What the matrix kernels share: arguments, epilogue, launch helpers.
#ifndef FPTQ_CUDA_COMMON_CUH_
#define FPTQ_CUDA_COMMON_CUH_

#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <type_traits>
#include <utility>

#include "cuda/kernels.h"
#include "cuda/numeric.cuh"
#include "cuda/ptx.cuh"
#include "fptq/packing.h"
#include "fptq/tile_plan.h"

namespace fptq::cuda {

using packing::Encoding;
using packing::kBlockBytes;
using packing::kBlockK;
using packing::kGroupThreads;
using packing::kHalfBytes;
using packing::kStepsPerBlock;
using packing::kStripN;

inline void Check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    cudaGetLastError();  // or the next check would report it again
    throw CudaError(std::string(what) + ": " + cudaGetErrorString(status));
  }
}

/// Kernel arguments of one product.
struct MatMulArguments {
  WeightView weights;
  MatMulCall call;
  int split;             ///< CTAs of a cluster that share a tile
  int stages;            ///< depth of the shared-memory ring
  int tiles_m, tiles_n;  ///< warpgroup kernel: tiles of the output; of deep ones, pairs
  // Streaming kernel. What is the same for all CTAs is computed once, on the host: a kernel's first request for weights
  // waits for whatever is computed before it.
  int log_split, log_parts, inboxes;  ///< see plan::Config
  int cluster_strips, longer;         ///< strips of a cluster; the first `longer` clusters have one more
  int prefetch_bytes;                 ///< of a strip, see plan::StreamPrefetch
  int depth, window;                  ///< stages of one group's ring; those in flight while it is filled first
  int stage_bytes;                    ///< of weights in a stage
  int copy_rows;                      ///< warpgroup kernel: see plan::CopyRows. Here, where it moves nothing else
  int64_t strip_bytes;                ///< from one strip to the next
  plan::StreamMemory memory;
};

/// How a kernel scales its integer sums.
enum class Promotion {
  kBlock,    ///< float scales, one group (or part of one) per 128 rows of K
  kStep,     ///< float scales, groups of 32 or 64
  kInteger,  ///< integer-structured scales: one int32 sum over all K
  kInt8,     ///< int8 weights: the same, with nothing to unpack
};
FPTQ_HD constexpr bool HasFloatScales(Promotion promotion) {
  return promotion == Promotion::kBlock || promotion == Promotion::kStep;
}

/// How sums become results: float sums, or int32 ones times the channel's base scale.
FPTQ_HD constexpr Encoding EncodingOf(Promotion promotion) {
  return HasFloatScales(promotion) ? Encoding::kFloat : Encoding::kInteger;
}

/// Position in a ring of stages: the stage, and the parity of its barriers' lap.
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void Advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

/// The map of A [m, k] for tiles of `rows` rows x 128 bytes, swizzled. Encoded on the host, passed by value.
CUtensorMap ActivationMap(const Device& device, const MatMulCall& call, int64_t k, int rows);

/// Zero point of the activations.
__device__ __forceinline__ int ZeroPointOf(const MatMulCall& call) {
  return call.a_zero_point == nullptr ? kDynamicZeroPoint : *call.a_zero_point;
}

/// Sums of two neighbouring channels become two results. The factors that depend on the channel are read once.
template <class T, Encoding kEncoding>
class Epilogue {
 public:
  /// `n`: an even channel, below the padded channel count.
  __device__ Epilogue(const MatMulArguments& args, int64_t n) : args_(args), n_(static_cast<int>(n)) {
    if (kEncoding == Encoding::kInteger) sum_ = *reinterpret_cast<const int2*>(args.weights.column_sum + n);
    base_ = *reinterpret_cast<const float2*>(args.weights.column_base + n);
  }

  /// Before any Store, and once the kernels ahead have finished.
  __device__ void ReadZeroPoint() { zero_point_ = ZeroPointOf(args_.call); }

  /// Scale of row m of the activations.
  __device__ float Scale(int64_t m) const {
    const MatMulCall& call = args_.call;
    return call.a_scale[!call.per_token || m >= call.m ? 0 : m];
  }

  /// `sums`: bits of two float (float encoding) or int32 (integer encoding) sums of row m.
  __device__ void Store(int64_t m, uint2 sums, float a_scale) const {
    const int64_t channels = args_.weights.layout.n;
    if (m >= args_.call.m || n_ >= channels) return;
    float2 y;
    if constexpr (kEncoding == Encoding::kInteger) {
      y.x = packing::DequantizeInteger(static_cast<int>(sums.x), sum_.x, base_.x, zero_point_, a_scale);
      y.y = packing::DequantizeInteger(static_cast<int>(sums.y), sum_.y, base_.y, zero_point_, a_scale);
    } else {
      y.x = packing::DequantizeFloat(__uint_as_float(sums.x), base_.x, zero_point_, a_scale);
      y.y = packing::DequantizeFloat(__uint_as_float(sums.y), base_.y, zero_point_, a_scale);
    }
    T* row = static_cast<T*>(args_.call.y) + m * channels + n_;
    if (channels % 2 == 0) {
      *reinterpret_cast<typename Numeric<T>::Pair*>(row) = Numeric<T>::FromFloat2(y);
    } else {
      row[0] = Numeric<T>::FromFloat(y.x);
      if (n_ + 1 < channels) row[1] = Numeric<T>::FromFloat(y.y);
    }
  }

 private:
  const MatMulArguments& args_;
  int n_;
  int zero_point_;
  float2 base_;
  int2 sum_;
};

/// Adds two pairs of sums; the order of calls fixes the order of float additions.
template <Encoding kEncoding>
__device__ __forceinline__ uint2 AddSums(uint2 a, uint2 b) {
  if constexpr (kEncoding == Encoding::kInteger) return {a.x + b.x, a.y + b.y};
  return {__float_as_uint(__uint_as_float(a.x) + __uint_as_float(b.x)),
          __float_as_uint(__uint_as_float(a.y) + __uint_as_float(b.y))};
}

/// One launch with cluster size and programmatic dependent launch as wanted.
struct LaunchShape {
  dim3 grid;
  int threads;
  int shared_bytes;
  int cluster = 1;
  bool overlap = false;
};

/// Lets a kernel have `bytes` of dynamic shared memory on the current device. Threads launch it with different amounts
/// at the same time, so what it may have only grows.
inline void AllowSharedMemory(const void* kernel, int bytes) {
  static std::mutex mutex;
  static auto* allowed = new std::map<std::pair<int, const void*>, int>;
  int device = 0;
  Check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  int& most = (*allowed)[{device, kernel}];
  if (bytes <= most) return;
  Check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "cudaFuncSetAttribute");
  most = bytes;
}

template <class... Parameters, class... Arguments>
void Launch(void (*kernel)(Parameters...), const LaunchShape& shape, Stream stream, const Arguments&... arguments) {
  cudaLaunchAttribute attributes[2];
  int count = 0;
  if (shape.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
  }
  if (shape.overlap) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = static_cast<unsigned>(count);
  if (shape.shared_bytes > 48 * 1024) {
    AllowSharedMemory(reinterpret_cast<const void*>(kernel), shape.shared_bytes);
  }
  Check(cudaLaunchKernelEx(&config, kernel, arguments...), "cudaLaunchKernelEx");
}

/// Calls `body(T{})` for the type.
template <class Body>
void ForType(DataType type, Body&& body) {
  switch (type) {
    case DataType::kFloat32:
      return body(float{});
    case DataType::kFloat16:
      return body(__half{});
    case DataType::kBFloat16:
      return body(__nv_bfloat16{});
  }
}

/// Calls `body(std::integral_constant<Promotion, ...>{})` for what the weights need.
template <class Body>
void ForPromotion(const WeightView& weights, Body&& body) {
  if (weights.encoding == Encoding::kInteger) {
    body(std::integral_constant<Promotion, Promotion::kInteger>{});
  } else if (weights.encoding == Encoding::kInt8) {
    body(std::integral_constant<Promotion, Promotion::kInt8>{});
  } else if (weights.layout.promotion_k == kBlockK) {
    body(std::integral_constant<Promotion, Promotion::kBlock>{});
  } else {
    body(std::integral_constant<Promotion, Promotion::kStep>{});
  }
}

// The launchers of the single kernels; LaunchMatMul chooses among them.
void LaunchStream(const Device& device, const MatMulArguments& args, const Plan& plan, Stream stream);
void LaunchStreamDynamic(const Device& device, const MatMulArguments& args, const DynamicMatMulCall& call,
                         const Plan& plan, Stream stream);
void LaunchWarpgroup(const Device& device, const MatMulArguments& args, const Plan& plan, Stream stream);
void LaunchTile(const Device& device, const MatMulArguments& args, Stream stream);
void LaunchReference(const Device& device, const MatMulArguments& args, Stream stream);

/// Clusters of `size` CTAs that the current device runs at once, one CTA of the streaming kernel on each
/// multiprocessor.
int MaxActiveClusters(const Device& device, int size);

}  // namespace fptq::cuda

#endif  // FPTQ_CUDA_COMMON_CUH_
