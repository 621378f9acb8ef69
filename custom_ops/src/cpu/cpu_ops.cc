#include "cpu/cpu_ops.h"

#include <algorithm>
#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "common/dynamic_quantize_per_token_schema.h"
#include "common/dynamic_quantize_w4a8_matmul_schema.h"
#include "common/w4a8_matmul_schema.h"
#include "common/w8a8_matmul_schema.h"
#include "cpu/attention_ops.h"
#include "cpu/fused_ops.h"
#include "cpu/isa.h"
#include "cpu/kernel_context.h"
#include "cpu/mapped_memory.h"
#include "cpu/packed_gemm.h"

namespace fptq::cpu {
namespace {

// The weights of a node, as its kernel packs them.
template <ONNXTensorElementDataType kType>
WeightSource SourceOf(const W4A8MatMulNode& node) {
  WeightSource source;
  source.k = node.k;
  source.n = node.n;
  source.block_size = node.block_size;
  source.b = node.b;
  source.b_scale = node.b_scale;
  source.type = ElementOf(kType);
  source.scale_max_multiple = node.scale_max_multiple;
  source.zero_point_is_128 = node.constant_zero_point == kActivationOffset;
  return source;
}

template <ONNXTensorElementDataType kType>
WeightSource SourceOf(const W8A8MatMulNode& node) {
  WeightSource source;
  source.bits = 8;
  source.k = node.k;
  source.n = node.n;
  source.block_size = node.k;
  source.b = node.b;
  source.b_scale = node.b_scale;
  source.type = ElementOf(kType);
  source.zero_point_is_128 = node.constant_zero_point == kActivationOffset;
  return source;
}

void WarnOfUnstructuredScales(const W4A8MatMulNode& node, const PackedGemm& gemm, Ort::ConstKernelInfo info) {
  if (node.scale_max_multiple == 0 || gemm.weights().structured) return;
  const std::string text = Concat(
      "fptq.", node.location.op, " node '", node.location.name, "': scale_max_multiple is ", node.scale_max_multiple,
      " but b_scale is not of that form (or K is too long). The kernel uses the scales as they are.");
  info.GetLogger().LogMessage(ORT_LOGGING_LEVEL_WARNING, ORT_FILE, __LINE__, "WarnOfUnstructuredScales", text.c_str());
}

// Only the packed copy is read from here on.
template <class Node>
void ForgetUnpacked(Node* node, const PackedGemm& gemm) {
  ReleasePages(node->b, static_cast<size_t>((node->k * node->n * gemm.weights().bits + 7) / 8));
  node->b = nullptr;
  node->b_scale = nullptr;
}

// W4A8MatMul and W8A8MatMul.
template <class Node, ONNXTensorElementDataType kType>
class MatMulKernel {
 public:
  static constexpr const char* kProvider = cpu::kProvider;
  static OrtMemType InputMemoryType(size_t) { return OrtMemTypeDefault; }

  explicit MatMulKernel(Ort::ConstKernelInfo info)
      : node_(Node::Read(info)), gemm_(SourceOf<kType>(node_), ChosenKernels()) {
    if constexpr (std::is_same_v<Node, W4A8MatMulNode>) WarnOfUnstructuredScales(node_, gemm_, info);
    ForgetUnpacked(&node_, gemm_);
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
    const Scratch scratch(context, memory_, gemm_.ScratchBytes(shapes.rows));
    PackedGemm::Call call;
    call.a = a.GetTensorData<uint8_t>();
    call.rows = shapes.rows;
    call.a_scale = a_scale.GetTensorData<float>();
    call.per_token = shapes.per_token;
    call.a_zero_point = *a_zero_point.GetTensorData<uint8_t>();
    call.y = y.GetTensorMutableRawData();
    call.scratch = scratch.data();
    gemm_.Run(call, PoolOf(context));
  }

 private:
  Node node_;
  PackedGemm gemm_;
  Ort::MemoryInfo memory_ = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault);
};

template <ONNXTensorElementDataType kType>
class DynamicQuantizeW4A8MatMulKernel {
 public:
  static constexpr const char* kProvider = cpu::kProvider;
  static OrtMemType InputMemoryType(size_t) { return OrtMemTypeDefault; }

  explicit DynamicQuantizeW4A8MatMulKernel(Ort::ConstKernelInfo info)
      : node_(ReadDynamicQuantizeW4A8MatMul(info)), gemm_(SourceOf<kType>(node_), ChosenKernels()) {
    WarnOfUnstructuredScales(node_, gemm_, info);
    ForgetUnpacked(&node_, gemm_);
  }

  void Compute(Ort::KernelContext context) {
    const Ort::ConstValue x = context.GetInput(kDynamicInputX);
    const MatMulShapes shapes = CheckDynamicMatMulShapes(node_, x.GetTensorTypeAndShapeInfo().GetShape());
    Ort::UnownedValue y = context.GetOutput(0, shapes.shape);
    if (shapes.rows == 0) return;
    const Scratch scratch(context, memory_, gemm_.ScratchBytes(shapes.rows, PackedGemm::Activations::kFloat));
    PackedGemm::Call call;
    call.x = x.GetTensorRawData();
    call.rows = shapes.rows;
    call.y = y.GetTensorMutableRawData();
    call.scratch = scratch.data();
    gemm_.Run(call, PoolOf(context));
  }

 private:
  W4A8MatMulNode node_;
  PackedGemm gemm_;
  Ort::MemoryInfo memory_ = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault);
};

template <ONNXTensorElementDataType kType>
class DynamicQuantizePerTokenKernel {
 public:
  static constexpr const char* kProvider = cpu::kProvider;
  static OrtMemType InputMemoryType(size_t) { return OrtMemTypeDefault; }

  explicit DynamicQuantizePerTokenKernel(Ort::ConstKernelInfo info)
      : location_(NodeLocation::Of(kDynamicQuantizePerToken, info)), kernels_(ChosenKernels()) {
    CheckDynamicQuantizeNode(location_, info);
  }

  void Compute(Ort::KernelContext context) {
    const Ort::ConstValue x = context.GetInput(0);
    const std::vector<int64_t> shape = x.GetTensorTypeAndShapeInfo().GetShape();
    const DynamicQuantizeCall shapes = DynamicQuantizeCall::Check(location_, shape);
    auto* y = context.GetOutput(0, shape).GetTensorMutableData<uint8_t>();
    auto* scale = context.GetOutput(1, shapes.scale_shape).GetTensorMutableData<float>();
    const auto* data = static_cast<const char*>(x.GetTensorRawData());
    constexpr int64_t kBytes = kType == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT ? 4 : 2;
    const int64_t rows_per_task = RowsPerTask(shapes.k);
    PoolOf(context).For(CeilDiv(shapes.rows, rows_per_task), [&](int64_t task) {
      const int64_t row = task * rows_per_task;
      const int64_t rows = std::min(rows_per_task, shapes.rows - row);
      kernels_.quantize(data + row * shapes.k * kBytes, ElementOf(kType), rows, shapes.k, y + row * shapes.k,
                        scale + row);
    });
  }

 private:
  NodeLocation location_;
  const Kernels& kernels_;
};

template <ONNXTensorElementDataType kType>
void AddOps(OpRegistry& registry) {
  registry.Add<W4A8MatMulOp<MatMulKernel<W4A8MatMulNode, kType>, kType>>();
  registry.Add<W8A8MatMulOp<MatMulKernel<W8A8MatMulNode, kType>, kType>>();
  registry.Add<DynamicQuantizeW4A8MatMulOp<DynamicQuantizeW4A8MatMulKernel<kType>, kType>>();
  AddFusedOps<kType>(registry);
  registry.Add<DynamicQuantizePerTokenOp<DynamicQuantizePerTokenKernel<kType>, kType>>();
}

}  // namespace

void AddCpuOps(OpRegistry& registry) {
  AddOps<ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT>(registry);
  AddOps<ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16>(registry);
  AddOps<ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16>(registry);
  AddAttentionOps(registry);
}

}  // namespace fptq::cpu
