#include "cuda/cuda_ops.h"

#include <cstdint>
#include <memory>
#include <vector>

#include "common/dynamic_quantize_per_token_schema.h"
#include "common/w4a8_matmul_schema.h"
#include "cuda/kernels.h"

namespace fptq::cuda {
namespace {

constexpr char kCudaProvider[] = "CUDAExecutionProvider";

constexpr DataType TypeOf(ONNXTensorElementDataType type) {
  return type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT     ? DataType::kFloat32
         : type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 ? DataType::kFloat16
                                                         : DataType::kBFloat16;
}

/// The device that the session's provider runs on; it need not be the thread's current one.
int DeviceOf(Ort::ConstKernelInfo info) {
  OrtAllocator* raw = nullptr;
  Ort::ThrowOnError(Ort::GetApi().KernelInfoGetAllocator(info, OrtMemTypeDefault, &raw));
  const Ort::Allocator allocator(raw);
  return allocator.GetInfo().GetDeviceId();
}

Stream StreamOf(const Ort::KernelContext& context) { return static_cast<Stream>(context.GetGPUComputeStream()); }

/// Runs `body`; a CUDA error names the node.
template <class Body>
auto NamingNode(const NodeLocation& location, Body&& body) {
  try {
    return body();
  } catch (const CudaError& error) {
    throw Ort::Exception(Concat("fptq.", location.op, " node '", location.name, "': ", error.what()),
                         ORT_RUNTIME_EXCEPTION);
  }
}

template <ONNXTensorElementDataType kType>
class W4A8MatMulKernel {
 public:
  static constexpr const char* kProvider = kCudaProvider;

  /// Constants that are repacked stay in host memory: the device holds only the packed copy.
  static OrtMemType InputMemoryType(size_t index) {
    return index == kInputB || index == kInputBScale ? OrtMemTypeCPUInput : OrtMemTypeDefault;
  }

  explicit W4A8MatMulKernel(Ort::ConstKernelInfo info) : node_(W4A8MatMulNode::Read(info)) {
    NamingNode(node_.location, [&] {
      const DeviceGuard guard(DeviceOf(info));
      weights_ = PackedWeights::Pack(node_.b, node_.b_scale, TypeOf(kType), node_.k, node_.n, node_.block_size,
                                     static_cast<int>(node_.scale_max_multiple), nullptr);
    });
    node_.b = nullptr;
    node_.b_scale = nullptr;
  }

  void Compute(Ort::KernelContext context) {
    const Ort::ConstValue a = context.GetInput(kInputA);
    const Ort::ConstValue a_scale = context.GetInput(kInputAScale);
    const Ort::ConstValue a_zero_point = context.GetInput(kInputAZeroPoint);
    const MatMulShapes shapes = MatMulShapes::Check(node_, a.GetTensorTypeAndShapeInfo().GetShape(),
                                                    a_scale.GetTensorTypeAndShapeInfo().GetShape(),
                                                    a_zero_point.GetTensorTypeAndShapeInfo().GetShape());
    Ort::UnownedValue y = context.GetOutput(0, shapes.shape);
    if (shapes.rows == 0) return;
    MatMulCall call;
    call.a = a.GetTensorData<uint8_t>();
    call.a_scale = a_scale.GetTensorData<float>();
    call.per_token = shapes.per_token;
    call.a_zero_point = a_zero_point.GetTensorData<uint8_t>();
    call.m = shapes.rows;
    call.y = y.GetTensorMutableRawData();
    NamingNode(node_.location, [&] {
      const DeviceGuard guard(weights_->device().index);
      LaunchMatMul(weights_->device(), weights_->view(), call, StreamOf(context));
    });
  }

 private:
  W4A8MatMulNode node_;
  std::unique_ptr<PackedWeights> weights_;
};

template <ONNXTensorElementDataType kType>
class DynamicQuantizePerTokenKernel {
 public:
  static constexpr const char* kProvider = kCudaProvider;
  static OrtMemType InputMemoryType(size_t) { return OrtMemTypeDefault; }

  explicit DynamicQuantizePerTokenKernel(Ort::ConstKernelInfo info)
      : location_(NodeLocation::Of(kDynamicQuantizePerToken, info)), device_(DeviceOf(info)) {
    CheckDynamicQuantizeNode(location_, info);
  }

  void Compute(Ort::KernelContext context) {
    const Ort::ConstValue x = context.GetInput(0);
    const std::vector<int64_t> shape = x.GetTensorTypeAndShapeInfo().GetShape();
    const DynamicQuantizeCall shapes = DynamicQuantizeCall::Check(location_, shape);
    auto* y = context.GetOutput(0, shape).GetTensorMutableData<uint8_t>();
    auto* scale = context.GetOutput(1, shapes.scale_shape).GetTensorMutableData<float>();
    NamingNode(location_, [&] {
      const DeviceGuard guard(device_);
      LaunchDynamicQuantize(Device::Current(), TypeOf(kType), x.GetTensorRawData(), shapes.rows, shapes.k, y, scale,
                            StreamOf(context));
    });
  }

 private:
  NodeLocation location_;
  int device_;
};

template <ONNXTensorElementDataType kType>
void AddType(OpRegistry& registry) {
  registry.Add<W4A8MatMulOp<W4A8MatMulKernel<kType>, kType>>();
  registry.Add<DynamicQuantizePerTokenOp<DynamicQuantizePerTokenKernel<kType>, kType>>();
}

}  // namespace

void AddCudaOps(OpRegistry& registry) {
  AddType<ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT>(registry);
  AddType<ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16>(registry);
  AddType<ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16>(registry);
}

}  // namespace fptq::cuda
