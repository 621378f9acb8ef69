#include "cuda/cuda_ops.h"

#include <cstdint>
#include <memory>
#include <vector>

#include "common/dynamic_quantize_per_token_schema.h"
#include "common/dynamic_quantize_w4a8_matmul_schema.h"
#include "common/fused_quantize_schema.h"
#include "common/w4a8_matmul_schema.h"
#include "common/w8a8_matmul_schema.h"
#include "cuda/kernels.h"
#include "cuda/workspace.h"

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

std::unique_ptr<PackedWeights> Pack(const W4A8MatMulNode& node, DataType type) {
  return PackedWeights::Pack(node.b, node.b_scale, type, node.k, node.n, node.block_size,
                             static_cast<int>(node.scale_max_multiple), nullptr);
}
std::unique_ptr<PackedWeights> Pack(const W8A8MatMulNode& node, DataType type) {
  return PackedWeights::PackInt8(node.b, node.b_scale, type, node.k, node.n, nullptr);
}

/// W4A8MatMul or W8A8MatMul.
template <class Node, ONNXTensorElementDataType kType>
class MatMulKernel {
 public:
  static constexpr const char* kProvider = kCudaProvider;

  /// Constants that are repacked stay in host memory: the device holds only the packed copy.
  static OrtMemType InputMemoryType(size_t index) {
    return index == kInputB || index == kInputBScale ? OrtMemTypeCPUInput : OrtMemTypeDefault;
  }

  explicit MatMulKernel(Ort::ConstKernelInfo info) : node_(Node::Read(info)) {
    NamingNode(node_.location, [&] {
      const DeviceGuard guard(DeviceOf(info));
      weights_ = Pack(node_, TypeOf(kType));
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
  Node node_;
  std::unique_ptr<PackedWeights> weights_;
};

template <ONNXTensorElementDataType kType>
class DynamicQuantizeW4A8MatMulKernel {
 public:
  static constexpr const char* kProvider = kCudaProvider;

  /// As of W4A8MatMul.
  static OrtMemType InputMemoryType(size_t index) {
    return index == kDynamicInputX ? OrtMemTypeDefault : OrtMemTypeCPUInput;
  }

  explicit DynamicQuantizeW4A8MatMulKernel(Ort::ConstKernelInfo info) : node_(ReadDynamicQuantizeW4A8MatMul(info)) {
    NamingNode(node_.location, [&] {
      const DeviceGuard guard(DeviceOf(info));
      weights_ = Pack(node_, TypeOf(kType));
    });
    node_.b = nullptr;
    node_.b_scale = nullptr;
  }

  void Compute(Ort::KernelContext context) {
    const Ort::ConstValue x = context.GetInput(kDynamicInputX);
    const MatMulShapes shapes = CheckDynamicMatMulShapes(node_, x.GetTensorTypeAndShapeInfo().GetShape());
    Ort::UnownedValue y = context.GetOutput(0, shapes.shape);
    if (shapes.rows == 0) return;
    DynamicMatMulCall call;
    call.x = x.GetTensorRawData();
    call.m = shapes.rows;
    call.y = y.GetTensorMutableRawData();
    NamingNode(node_.location, [&] {
      const DeviceGuard guard(weights_->device().index);
      const Stream stream = StreamOf(context);
      if (QuantizesInside(weights_->device(), weights_->view(), call)) {
        LaunchDynamicMatMul(weights_->device(), weights_->view(), call, stream);
        return;
      }
      const int64_t q_bytes = (call.m * node_.k + kAlignment - 1) / kAlignment * kAlignment;
      const int64_t scale_bytes = call.m * static_cast<int64_t>(sizeof(float));
      workspaces_.Of(stream).Use(stream, q_bytes + scale_bytes, [&](uint8_t* data) {
        call.q = data;
        call.scale = reinterpret_cast<float*>(data + q_bytes);
        LaunchDynamicMatMul(weights_->device(), weights_->view(), call, stream);
      });
    });
  }

 private:
  static constexpr int64_t kAlignment = 256;

  W4A8MatMulNode node_;
  std::unique_ptr<PackedWeights> weights_;
  Workspaces workspaces_;
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

/// One of the steps that end in uint8 activations.
template <const FusedStep& kStep, ONNXTensorElementDataType kType>
class FusedQuantizeKernel {
 public:
  static constexpr const char* kProvider = kCudaProvider;
  static OrtMemType InputMemoryType(size_t) { return OrtMemTypeDefault; }

  explicit FusedQuantizeKernel(Ort::ConstKernelInfo info)
      : node_(FusedQuantizeNode::Read(kStep, info)), device_(DeviceOf(info)) {}

  void Compute(Ort::KernelContext context) {
    const FusedQuantizeShapes shapes = FusedQuantizeShapes::Check(kStep, node_.location, context);
    FusedCall call;
    call.rows = shapes.rows;
    call.k = shapes.k;
    call.epsilon = node_.epsilon;
    call.x = context.GetInput(0).GetTensorRawData();
    if constexpr (kStep.norm) call.weight = context.GetInput(kStep.weight_input()).GetTensorRawData();
    if constexpr (kStep.skip || !kStep.norm) call.other = context.GetInput(1).GetTensorRawData();
    if constexpr (kStep.skip) {
      call.sum = context.GetOutput(kStep.sum_output(), shapes.shape).GetTensorMutableRawData();
    }
    call.y = context.GetOutput(0, shapes.shape).GetTensorMutableData<uint8_t>();
    if constexpr (kStep.dynamic) {
      call.scale = context.GetOutput(1, shapes.scale_shape).template GetTensorMutableData<float>();
    } else {
      call.static_scale = context.GetInput(kStep.scale_input()).template GetTensorData<float>();
      call.zero_point = context.GetInput(kStep.zero_point_input()).template GetTensorData<uint8_t>();
    }
    NamingNode(node_.location, [&] {
      const DeviceGuard guard(device_);
      LaunchFusedQuantize(Device::Current(), TypeOf(kType), call, StreamOf(context));
    });
  }

 private:
  FusedQuantizeNode node_;
  int device_;
};

template <const FusedStep& kStep, ONNXTensorElementDataType kType>
void AddFused(OpRegistry& registry) {
  registry.Add<FusedQuantizeOp<kStep, FusedQuantizeKernel<kStep, kType>, kType>>();
}

template <ONNXTensorElementDataType kType>
void AddType(OpRegistry& registry) {
  registry.Add<W4A8MatMulOp<MatMulKernel<W4A8MatMulNode, kType>, kType>>();
  registry.Add<W8A8MatMulOp<MatMulKernel<W8A8MatMulNode, kType>, kType>>();
  registry.Add<DynamicQuantizeW4A8MatMulOp<DynamicQuantizeW4A8MatMulKernel<kType>, kType>>();
  registry.Add<DynamicQuantizePerTokenOp<DynamicQuantizePerTokenKernel<kType>, kType>>();
  AddFused<kRmsNormQuantize, kType>(registry);
  AddFused<kRmsNormDynamicQuantize, kType>(registry);
  AddFused<kSkipRmsNormQuantize, kType>(registry);
  AddFused<kSkipRmsNormDynamicQuantize, kType>(registry);
  AddFused<kSiluMulQuantize, kType>(registry);
  AddFused<kSiluMulDynamicQuantize, kType>(registry);
}

}  // namespace

void AddCudaOps(OpRegistry& registry) {
  AddType<ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT>(registry);
  AddType<ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16>(registry);
  AddType<ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16>(registry);
}

}  // namespace fptq::cuda
