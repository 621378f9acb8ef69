#include "cuda/describe_cuda.h"

#include <cuda_runtime_api.h>

#include "cuda/kernels.h"

namespace fptq::cuda {
namespace {

constexpr int kOldestCapability = 80;

std::string Kernels(int capability) {
  if (capability < kOldestCapability) return "[]";
  if (capability < 90) return R"(["tile", "reference"])";
  return capability == 90 ? R"(["stream", "warpgroup", "tile", "reference"])" : R"(["stream", "tile", "reference"])";
}

// Device names hold no character that JSON would escape but these two.
std::string Quoted(const std::string& text) {
  std::string quoted = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') quoted += '\\';
    quoted += c;
  }
  return quoted + "\"";
}

}  // namespace

std::string DescribeDevices() {
  int count = 0;
  cudaError_t status = cudaGetDeviceCount(&count);
  std::string devices;
  for (int index = 0; status == cudaSuccess && index < count; ++index) {
    cudaDeviceProp properties;
    status = cudaGetDeviceProperties(&properties, index);
    if (status != cudaSuccess) break;
    const int capability = 10 * properties.major + properties.minor;
    devices += std::string(devices.empty() ? "" : ", ") + "{\"index\": " + std::to_string(index) +
               ", \"name\": " + Quoted(properties.name) + ", \"capability\": " + std::to_string(capability) +
               ", \"bytes\": " + std::to_string(properties.totalGlobalMem) + ", \"kernels\": " + Kernels(capability) +
               "}";
  }
  const std::string error = status == cudaSuccess ? "null" : Quoted(cudaGetErrorString(status));
  cudaGetLastError();  // leave no sticky error to the kernels
  return "{\"devices\": [" + devices + "], \"error\": " + error + "}";
}

std::string DescribeProduct(const FptqProduct& product) {
  const DeviceGuard guard(product.cuda_device);
  const Device& device = Device::Current();
  if (device.index != product.cuda_device) {
    throw CudaError("there is no CUDA device " + std::to_string(product.cuda_device));
  }
  WeightView view;
  const bool integer = product.integer_scales != 0;
  view.encoding = integer ? packing::Encoding::kInteger : packing::Encoding::kFloat;
  view.type = product.float_bytes == 4 ? DataType::kFloat32 : DataType::kFloat16;
  view.layout = packing::Layout::Of(product.k, product.n, product.block_size,
                                    integer ? static_cast<int>(sizeof(packing::IntegerScale)) : product.float_bytes);
  const Plan plan = ChoosePlan(device, view, product.rows, product.k % 16 == 0);
  if (plan.kernel == Kernel::kReference) return "reference";
  const char* name = plan.kernel == Kernel::kWarpgroup ? "warpgroup"
                     : plan.loader == Loader::kAsync   ? "tile"
                                                       : "stream";
  DynamicMatMulCall call;
  call.m = product.rows;
  const bool inside = product.quantizes != 0 && QuantizesInside(device, view, call);
  return std::string(name) + " " + std::to_string(plan.config.tile_m) + "x" + std::to_string(plan.config.tile_n) +
         (inside ? " quantizing" : "");
}

}  // namespace fptq::cuda
