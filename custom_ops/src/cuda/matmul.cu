// Choice of kernel and configuration; what the launchers know about devices.

#include <algorithm>
#include <mutex>

#include "cuda/common.cuh"

namespace fptq::cuda {
namespace {

constexpr int kMaxDevices = 64;

/// Rows up to which the streaming kernel is faster than the warpgroup kernel (measured). Small weights make too few
/// tiles of the latter to fill the device; and it is slow where scales change within 128 rows of K.
int64_t StreamRows(const WeightView& weights) {
  const packing::Layout& layout = weights.layout;
  const int64_t bytes = layout.WeightBytes();
  if (weights.encoding == Encoding::kFloat && layout.promotion_k != kBlockK) return bytes <= 16 << 20 ? 64 : 16;
  return bytes <= 3 << 19 ? 64 : bytes <= 10 << 20 ? 32 : 16;
}

plan::StreamScales ScalesOf(const WeightView& weights) {
  const bool is_float = weights.encoding == Encoding::kFloat && weights.layout.promotion_k == kBlockK;
  return {is_float || weights.encoding == Encoding::kInteger, is_float};
}

Device Query(int index) {
  Device device;
  device.index = index;
  int major = 0, minor = 0;
  Check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index), "cudaDeviceGetAttribute");
  Check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index), "cudaDeviceGetAttribute");
  Check(cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index),
        "cudaDeviceGetAttribute");
  Check(cudaDeviceGetAttribute(&device.max_shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index),
        "cudaDeviceGetAttribute");
  Check(cudaDeviceGetAttribute(&device.shared_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, index),
        "cudaDeviceGetAttribute");
  device.capability = 10 * major + minor;
  if (device.HasBulkCopies()) {
    cudaDriverEntryPointQueryResult result;
    Check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &device.encode_tensor_map, 12000,
                                           cudaEnableDefault, &result),
          "cudaGetDriverEntryPointByVersion");
    for (int size = 1; size <= 8; ++size) device.clusters[size] = MaxActiveClusters(device, size);
    int clock_khz = 0, memory_khz = 0, bus_bits = 0;
    Check(cudaDeviceGetAttribute(&clock_khz, cudaDevAttrClockRate, index), "cudaDeviceGetAttribute");
    Check(cudaDeviceGetAttribute(&memory_khz, cudaDevAttrMemoryClockRate, index), "cudaDeviceGetAttribute");
    Check(cudaDeviceGetAttribute(&bus_bits, cudaDevAttrGlobalMemoryBusWidth, index), "cudaDeviceGetAttribute");
    const double bytes_per_ms = memory_khz * 2.0 * bus_bits / 8;  // two transfers a clock
    const double block_bytes = kBlockBytes + kStripN * 2;         // with scales of 16 bits
    // A driver that does not tell leaves an H200's.
    device.block_clocks =
        bytes_per_ms > 0 ? static_cast<int>(block_bytes * device.multiprocessors * clock_khz / bytes_per_ms) : 224;
  }
  return device;
}

}  // namespace

const Device& Device::Current() {
  static std::mutex mutex;
  static Device devices[kMaxDevices];
  static bool known[kMaxDevices] = {};
  int index = 0;
  Check(cudaGetDevice(&index), "cudaGetDevice");
  if (index >= kMaxDevices) throw CudaError("device " + std::to_string(index) + " is beyond the last supported one");
  const std::lock_guard<std::mutex> lock(mutex);
  if (!known[index]) devices[index] = Query(index);
  known[index] = true;
  return devices[index];
}

DeviceGuard::DeviceGuard(int device) : previous_(device), switched_(false) {
  if (cudaGetDevice(&previous_) == cudaSuccess && previous_ != device) switched_ = cudaSetDevice(device) == cudaSuccess;
}
DeviceGuard::~DeviceGuard() {
  if (switched_) cudaSetDevice(previous_);
}

CUtensorMap ActivationMap(const Device& device, const MatMulCall& call, int64_t k, int rows) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  const Encode encode = reinterpret_cast<Encode>(device.encode_tensor_map);
  if (encode == nullptr) throw CudaError("this driver has no cuTensorMapEncodeTiled");
  CUtensorMap map;
  const cuuint64_t size[] = {static_cast<cuuint64_t>(k), static_cast<cuuint64_t>(call.m)};
  const cuuint64_t stride[] = {static_cast<cuuint64_t>(k)};
  const cuuint32_t box[] = {kBlockK, static_cast<cuuint32_t>(rows)};
  const cuuint32_t element_stride[] = {1, 1};
  const CUresult result = encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<uint8_t*>(call.a), size, stride,
                                 box, element_stride, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) throw CudaError("cuTensorMapEncodeTiled: error " + std::to_string(result));
  return map;
}

Plan ChoosePlan(const Device& device, const WeightView& weights, int64_t m, bool aligned, const Plan& wanted) {
  Plan plan = wanted;
  const packing::Layout& layout = weights.layout;
  const bool bulk = device.HasBulkCopies() && aligned && wanted.loader != Loader::kAsync;
  if (layout.promotion_k == 0) plan.kernel = Kernel::kReference;
  const auto choose_stream = [&] {
    plan.kernel = Kernel::kStream;
    plan.loader = Loader::kBulk;
    plan.config = plan::ChooseStream(device.Limits(), layout, ScalesOf(weights), m, wanted.config);
    return plan.config.stages > 0;
  };
  const auto choose_warpgroup = [&] {
    plan.kernel = Kernel::kWarpgroup;
    plan.loader = Loader::kBulk;
    plan.config = plan::ChooseWarpgroup(device.Limits(), layout, m, weights.encoding, wanted.config);
    if (plan.config.stages == 0) throw CudaError("the warpgroup kernel has no such tile or split for these weights");
    return device.HasWgmma();
  };
  switch (plan.kernel) {
    case Kernel::kReference:
      return plan;
    case Kernel::kWarpgroup:
      if (bulk && choose_warpgroup()) return plan;
      throw CudaError("the warpgroup kernel needs sm_90 and rows of A aligned to 16 bytes");
    case Kernel::kStream:
      if (bulk && choose_stream()) return plan;
      break;
    case Kernel::kChosen:
      if (bulk && m <= StreamRows(weights) && choose_stream()) return plan;
      if (bulk && choose_warpgroup()) return plan;
      if (bulk && choose_stream()) return plan;
  }
  const bool small = m <= 8;
  plan.kernel = Kernel::kStream;
  plan.loader = Loader::kAsync;
  plan.config = {small ? 8 : 64, small ? 64 : 128, 1, plan::kAsyncStages, 0};
  return plan;
}

void LaunchMatMul(const Device& device, const WeightView& weights, const MatMulCall& call, Stream stream,
                  const Plan& wanted) {
  if (call.m == 0) return;
  const bool aligned = weights.layout.k % 16 == 0 && reinterpret_cast<uintptr_t>(call.a) % 16 == 0;
  const Plan plan = ChoosePlan(device, weights, call.m, aligned, wanted);
  MatMulArguments args = {};
  args.weights = weights;
  args.call = call;
  args.split = plan.config.split_k;
  args.stages = plan.config.stages;
  switch (plan.kernel) {
    case Kernel::kStream:
      if (plan.loader == Loader::kAsync) return LaunchTile(device, args, stream);
      return LaunchStream(device, args, plan, stream);
    case Kernel::kWarpgroup:
      return LaunchWarpgroup(device, args, plan, stream);
    default:
      return LaunchReference(device, args, stream);
  }
}

namespace {

/// The plan of one kernel that quantizes and multiplies; kReference where there is none.
Plan ChooseDynamicPlan(const Device& device, const WeightView& weights, const DynamicMatMulCall& call,
                       const Plan& wanted) {
  const packing::Layout& layout = weights.layout;
  const bool aligned = layout.k % 16 == 0 && reinterpret_cast<uintptr_t>(call.x) % 16 == 0;
  const bool can = aligned && device.HasBulkCopies() && layout.promotion_k != 0 && weights.encoding != Encoding::kInt8;
  Plan plan;
  plan.kernel = Kernel::kReference;
  if (!can || call.m > plan::kMaxQuantizedTokens) return plan;
  plan = ChoosePlan(device, weights, call.m, true, wanted);
  const int value_bytes = weights.type == DataType::kFloat32 ? 4 : 2;
  const bool quantizes = plan.kernel == Kernel::kStream && plan.loader == Loader::kBulk &&
                         plan.config.tile_m == plan::kQuantizingTile &&
                         plan::StreamQuantizes(plan.config, layout, ScalesOf(weights), call.m, value_bytes);
  if (!quantizes) plan.kernel = Kernel::kReference;
  return plan;
}

}  // namespace

bool QuantizesInside(const Device& device, const WeightView& weights, const DynamicMatMulCall& call,
                     const Plan& wanted) {
  return call.m == 0 || ChooseDynamicPlan(device, weights, call, wanted).kernel == Kernel::kStream;
}

void LaunchDynamicMatMul(const Device& device, const WeightView& weights, const DynamicMatMulCall& call, Stream stream,
                         const Plan& wanted) {
  if (call.m == 0) return;
  MatMulCall product;
  product.a = call.q;
  product.a_scale = call.scale;
  product.per_token = true;
  product.m = call.m;
  product.y = call.y;
  const Plan plan = ChooseDynamicPlan(device, weights, call, wanted);
  if (plan.kernel == Kernel::kStream) {
    MatMulArguments args = {};
    args.weights = weights;
    args.call = product;
    args.split = plan.config.split_k;
    args.stages = plan.config.stages;
    return LaunchStreamDynamic(device, args, call, plan, stream);
  }
  LaunchDynamicQuantize(device, weights.type, call.x, call.m, weights.layout.k, call.q, call.scale, stream);
  LaunchMatMul(device, weights, product, stream, wanted);
}

}  // namespace fptq::cuda
