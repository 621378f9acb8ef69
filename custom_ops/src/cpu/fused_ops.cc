#include "cpu/fused_ops.h"

#include <algorithm>
#include <cstdint>

#include "common/fused_quantize_schema.h"
#include "cpu/aligned_buffer.h"
#include "cpu/isa.h"
#include "cpu/kernel_context.h"

namespace fptq::cpu {
namespace {

// Room for one row of this thread; it stays, and is as large as the longest row so far.
float* RowBuffer(int64_t k) {
  static thread_local AlignedVector<float> buffer;
  const auto size = static_cast<size_t>(RoundUp(k, 16));
  if (buffer.size() < size) buffer.resize(size);
  return buffer.data();
}

template <const FusedStep& kStep, ONNXTensorElementDataType kType>
class FusedQuantizeKernel {
 public:
  static constexpr const char* kProvider = cpu::kProvider;
  static OrtMemType InputMemoryType(size_t) { return OrtMemTypeDefault; }

  explicit FusedQuantizeKernel(Ort::ConstKernelInfo info)
      : node_(FusedQuantizeNode::Read(kStep, info)), kernels_(ChosenKernels()) {}

  void Compute(Ort::KernelContext context) {
    const FusedQuantizeShapes shapes = FusedQuantizeShapes::Check(kStep, node_.location, context);
    QuantizedRows target;
    target.k = shapes.k;
    target.y = context.GetOutput(0, shapes.shape).GetTensorMutableData<uint8_t>();
    if constexpr (kStep.dynamic) {
      target.scale = context.GetOutput(1, shapes.scale_shape).template GetTensorMutableData<float>();
    } else {
      target.static_scale = context.GetInput(kStep.scale_input()).template GetTensorData<float>();
      target.zero_point = *context.GetInput(kStep.zero_point_input()).template GetTensorData<uint8_t>();
    }
    if constexpr (kStep.norm) {
      NormCall call;
      call.x = context.GetInput(0).GetTensorRawData();
      call.weight = context.GetInput(kStep.weight_input()).GetTensorRawData();
      if constexpr (kStep.skip) {
        call.skip = context.GetInput(1).GetTensorRawData();
        call.sum = context.GetOutput(kStep.sum_output(), shapes.shape).GetTensorMutableRawData();
      }
      call.epsilon = node_.epsilon;
      Run(context, kernels_.norm, call, target, shapes.rows);
    } else {
      SiluMulCall call;
      call.gate = context.GetInput(0).GetTensorRawData();
      call.up = context.GetInput(1).GetTensorRawData();
      Run(context, kernels_.silu_mul, call, target, shapes.rows);
    }
  }

 private:
  template <class Function, class Call>
  static void Run(const Ort::KernelContext& context, Function function, Call& call, const QuantizedRows& target,
                  int64_t rows) {
    call.type = ElementOf(kType);
    call.target = target;
    const int64_t rows_per_task = RowsPerTask(target.k);
    PoolOf(context).For(CeilDiv(rows, rows_per_task), [&](int64_t task) {
      const int64_t row = task * rows_per_task;
      function(call, row, std::min(rows, row + rows_per_task), RowBuffer(target.k));
    });
  }

  FusedQuantizeNode node_;
  const Kernels& kernels_;
};

template <const FusedStep& kStep, ONNXTensorElementDataType kType>
void Add(OpRegistry& registry) {
  registry.Add<FusedQuantizeOp<kStep, FusedQuantizeKernel<kStep, kType>, kType>>();
}

}  // namespace

template <ONNXTensorElementDataType kType>
void AddFusedOps(OpRegistry& registry) {
  Add<kRmsNormQuantize, kType>(registry);
  Add<kRmsNormDynamicQuantize, kType>(registry);
  Add<kSkipRmsNormQuantize, kType>(registry);
  Add<kSkipRmsNormDynamicQuantize, kType>(registry);
  Add<kSiluMulQuantize, kType>(registry);
  Add<kSiluMulDynamicQuantize, kType>(registry);
}

template void AddFusedOps<ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT>(OpRegistry& registry);
template void AddFusedOps<ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16>(OpRegistry& registry);
template void AddFusedOps<ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16>(OpRegistry& registry);

}  // namespace fptq::cpu
