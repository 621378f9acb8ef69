#include "cpu/attention_ops.h"

#include <cmath>
#include <cstdint>
#include <optional>

#include "common/group_query_attention_schema.h"
#include "cpu/attention.h"
#include "cpu/isa.h"
#include "cpu/kernel_context.h"

namespace fptq::cpu {
namespace {

template <const AttentionForm& kForm>
class AttentionKernel {
 public:
  static constexpr const char* kProvider = cpu::kProvider;
  static OrtMemType InputMemoryType(size_t) { return OrtMemTypeDefault; }

  explicit AttentionKernel(Ort::ConstKernelInfo info)
      : node_(AttentionNode::Read(kForm, info)), kernels_(ChosenKernels()) {}

  void Compute(Ort::KernelContext context) {
    const AttentionShapes shapes = AttentionShapes::Check(kForm, node_, context);
    const auto floats = [&](size_t input) {
      return static_cast<const float*>(context.GetInput(input).GetTensorRawData());
    };
    AttentionCall call;
    call.batch = shapes.batch;
    call.rows = shapes.rows;
    call.heads = node_.heads;
    call.kv_heads = node_.kv_heads;
    call.head_size = shapes.head_size;
    call.scale = node_.scale > 0.0f ? node_.scale : 1.0f / std::sqrt(static_cast<float>(shapes.head_size));
    call.q = floats(0);
    if constexpr (kForm.packed) {
      call.k = call.q + node_.heads * shapes.head_size;
      call.v = call.k + node_.kv_heads * shapes.head_size;
      call.q_stride = call.kv_stride = node_.HeadsOfFirst(kForm) * shapes.head_size;
    } else {
      call.k = floats(1);
      call.v = floats(2);
      call.q_stride = node_.heads * shapes.head_size;
      call.kv_stride = node_.kv_heads * shapes.head_size;
    }
    if constexpr (kForm.rotary) {
      call.rotary_half = shapes.rotary_half;
      call.interleaved = node_.interleaved;
      call.cos = floats(kForm.cos_input());
      call.sin = floats(kForm.sin_input());
    }
    call.seqlens_k = static_cast<const int32_t*>(context.GetInput(kForm.seqlens_input()).GetTensorRawData());
    call.first = shapes.rows == shapes.total;
    call.past_key = floats(kForm.past_key_input());
    call.past_value = floats(kForm.past_value_input());
    call.past_length = shapes.past_length;
    call.y = context.GetOutput(0, shapes.y).GetTensorMutableData<float>();
    call.present_key = context.GetOutput(1, shapes.present).template GetTensorMutableData<float>();
    call.present_value = context.GetOutput(2, shapes.present).template GetTensorMutableData<float>();
    call.present_length = shapes.present[2];
    if (shapes.batch == 0) return;
    const bool in_place = call.past_key == call.present_key || call.past_value == call.present_value;
    if (in_place && call.present_length != call.past_length) {
      node_.location.Fail("the caches are updated in place but are shorter than total_sequence_length",
                          "Bind caches with room for all positions");
    }
    const AttentionPlan plan(call);
    std::optional<Scratch> partial;
    const int64_t partial_floats = plan.PartialFloats(call);
    if (partial_floats > 0) partial.emplace(context, memory_, static_cast<size_t>(partial_floats) * sizeof(float));
    RunAttention(call, plan, kernels_, PoolOf(context), partial ? static_cast<float*>(partial->data()) : nullptr);
  }

 private:
  AttentionNode node_;
  const Kernels& kernels_;
  Ort::MemoryInfo memory_ = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault);
};

template <const AttentionForm& kForm>
void Add(OpRegistry& registry) {
  registry.Add<AttentionOp<kForm, AttentionKernel<kForm>>>();
}

}  // namespace

void AddAttentionOps(OpRegistry& registry) {
  Add<kGroupQueryAttention>(registry);
  Add<kRotaryGroupQueryAttention>(registry);
  Add<kPackedGroupQueryAttention>(registry);
  Add<kPackedRotaryGroupQueryAttention>(registry);
}

}  // namespace fptq::cpu
