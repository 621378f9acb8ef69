// Launchers of the CUDA kernels. Plain C++: no onnxruntime type, and no CUDA header where only this is included.
//
// Apart from PackedWeights::Pack, nothing here allocates device memory, synchronises or reads back, and no launch keeps
// state: launches may be captured into a CUDA graph and issued from several threads at once.
#ifndef FPTQ_CUDA_KERNELS_H_
#define FPTQ_CUDA_KERNELS_H_

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

#include "fptq/packing.h"
#include "fptq/tile_plan.h"

struct CUstream_st;  // cudaStream_t

namespace fptq::cuda {

using Stream = CUstream_st*;

enum class DataType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

/// A CUDA call that failed; the message names the call and CUDA's reason.
class CudaError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// What the launchers know about a device.
struct Device {
  int index = 0;
  int capability = 0;  ///< 10 * major + minor
  int multiprocessors = 0;
  int max_shared_bytes = 0;           ///< per CTA
  void* encode_tensor_map = nullptr;  ///< cuTensorMapEncodeTiled, null before sm_90

  int shared_per_multiprocessor = 0;

  int clusters[9] = {};  ///< see plan::DeviceLimits; zeros before sm_90
  int block_clocks = 0;  ///< likewise

  plan::DeviceLimits Limits() const {
    plan::DeviceLimits limits{multiprocessors, max_shared_bytes, shared_per_multiprocessor, {}, block_clocks};
    for (int size = 1; size <= 8; ++size) limits.clusters[size] = clusters[size];
    return limits;
  }
  bool HasBulkCopies() const { return capability >= 90; }
  bool HasWgmma() const { return capability == 90; }

  /// The calling thread's current device. Queried once per device and process.
  static const Device& Current();
};

/// Switches the calling thread to a device and back.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_;
  bool switched_;
};

/// Device pointers and sizes of one packed weight, as kernels receive them.
struct WeightView {
  packing::Layout layout;
  packing::Encoding encoding = packing::Encoding::kFloat;
  DataType type = DataType::kFloat32;
  const uint8_t* blocks = nullptr;      ///< [strips][k_blocks][block_stride], see packing.h
  const void* scales = nullptr;         ///< T [groups][n], for the reference kernel where promotion_k is 0
  const float* column_base = nullptr;   ///< [strips * 64]: sum_k scale * q, or the column's base scale
  const int32_t* column_sum = nullptr;  ///< [strips * 64]: sum_k q * i; integer encoding only
};

/// One weight in device memory, in the kernels' own layout.
class PackedWeights {
 public:
  /// Packs on the current device; `b` (int4 [k, n]) and `b_scale` (T [ceil(k / block_size), n]) may lie on the host or
  /// on the device. Integer-structured scales (scale_max_multiple > 0) are used only where they are verified here.
  /// Synchronises `stream`. Throws CudaError.
  static std::unique_ptr<PackedWeights> Pack(const void* b, const void* b_scale, DataType type, int64_t k, int64_t n,
                                             int64_t block_size, int scale_max_multiple, Stream stream);
  /// The same for int8 weights b [k, n] with one scale T [n] per channel (W8A8).
  static std::unique_ptr<PackedWeights> PackInt8(const int8_t* b, const void* b_scale, DataType type, int64_t k,
                                                 int64_t n, Stream stream);
  ~PackedWeights();
  PackedWeights(const PackedWeights&) = delete;
  PackedWeights& operator=(const PackedWeights&) = delete;

  const WeightView& view() const { return view_; }
  const Device& device() const { return device_; }
  int64_t bytes() const { return bytes_; }

 private:
  explicit PackedWeights(const Device& device) : device_(device) {}

  const Device& device_;
  void* memory_ = nullptr;
  int64_t bytes_ = 0;
  WeightView view_;
};

inline constexpr int kDynamicZeroPoint = 128;  ///< of activations that are quantized per token

/// The operands of one product; device memory.
struct MatMulCall {
  const uint8_t* a = nullptr;      ///< [m, k]
  const float* a_scale = nullptr;  ///< [1], or [m] where per_token
  bool per_token = false;
  const uint8_t* a_zero_point = nullptr;  ///< [1]; null: kDynamicZeroPoint
  int64_t m = 0;
  void* y = nullptr;  ///< T [m, n]
};

enum class Kernel : int32_t { kChosen = 0, kStream = 1, kWarpgroup = 2, kReference = 3 };
enum class Loader : int32_t { kChosen = 0, kBulk = 1, kAsync = 2 };  // streaming: bulk copies, or cp.async (any device)

/// A kernel with its configuration.
struct Plan {
  Kernel kernel = Kernel::kChosen;
  Loader loader = Loader::kChosen;
  plan::Config config;
  bool overlap = true;  ///< programmatic dependent launch
};

/// Fills what `wanted` leaves open, for m rows. `aligned`: rows of A start at multiples of 16 bytes.
Plan ChoosePlan(const Device& device, const WeightView& weights, int64_t m, bool aligned, const Plan& wanted = {});

/// Y = A * B. Nothing is launched for m = 0.
void LaunchMatMul(const Device& device, const WeightView& weights, const MatMulCall& call, Stream stream,
                  const Plan& wanted = {});

/// Operands of one product whose activations are float, quantized per token on the way; device memory.
struct DynamicMatMulCall {
  const void* x = nullptr;  ///< T [m, k]
  int64_t m = 0;
  void* y = nullptr;  ///< T [m, n]
  // Workspace, not touched where QuantizesInside.
  uint8_t* q = nullptr;    ///< [m, k]
  float* scale = nullptr;  ///< [m]
};

/// Whether one kernel quantizes and multiplies, without workspace.
bool QuantizesInside(const Device& device, const WeightView& weights, const DynamicMatMulCall& call,
                     const Plan& wanted = {});

/// LaunchDynamicQuantize and LaunchMatMul in one, with the same results.
void LaunchDynamicMatMul(const Device& device, const WeightView& weights, const DynamicMatMulCall& call, Stream stream,
                         const Plan& wanted = {});

/// fptq.DynamicQuantizePerToken: x T [m, k] -> q uint8 [m, k] and scale float32 [m].
void LaunchDynamicQuantize(const Device& device, DataType type, const void* x, int64_t m, int64_t k, uint8_t* q,
                           float* scale, Stream stream);
/// ONNX QuantizeLinear with one scale: x T [count] -> q uint8 [count].
void LaunchStaticQuantize(const Device& device, DataType type, const void* x, int64_t count, const float* scale,
                          const uint8_t* zero_point, uint8_t* q, Stream stream);

/// Operands of the steps that end in uint8 activations (fused_quantize_schema.h); device memory.
struct FusedCall {
  const void* x = nullptr;       ///< T [rows, k]: X, or gate
  const void* other = nullptr;   ///< T [rows, k]: skip (or null), or up
  const void* weight = nullptr;  ///< T [k] of a norm; null for SiLU
  void* sum = nullptr;           ///< T [rows, k]: X + skip, where there is a skip
  float epsilon = 0.0f;
  int64_t rows = 0;
  int64_t k = 0;
  uint8_t* y = nullptr;                 ///< [rows, k]
  float* scale = nullptr;               ///< [rows]; null for static quantization
  const float* static_scale = nullptr;  ///< [1]
  const uint8_t* zero_point = nullptr;  ///< [1], static
};
void LaunchFusedQuantize(const Device& device, DataType type, const FusedCall& call, Stream stream);

/// Ceilings for benchmarks, see kernels_c_api.h.
void LaunchReadBenchmark(const Device& device, const void* data, int64_t bytes, void* sink, Stream stream);
void LaunchWgmmaBenchmark(const Device& device, int iterations, void* sink, Stream stream);

}  // namespace fptq::cuda

#endif  // FPTQ_CUDA_KERNELS_H_
