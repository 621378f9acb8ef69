// Causal attention over a cache of keys and values: four ops, common to all execution providers.
//
//   GroupQueryAttention             (query, key, value, <cache>)
//   RotaryGroupQueryAttention       (query, key, value, <cache>, cos_cache, sin_cache)
//   PackedGroupQueryAttention       (qkv, <cache>)
//   PackedRotaryGroupQueryAttention (qkv, <cache>, cos_cache, sin_cache)
//   <cache>: past_key, past_value, seqlens_k, total_sequence_length;   all -> Y, present_key, present_value
//
// They are com.microsoft.GroupQueryAttention without its options (windows, soft caps, sinks, biases, quantized caches),
// and take the values of that operator's inputs:
//
//   query                  float [B, S, num_heads * H]      key, value  float [B, S, kv_num_heads * H]
//   qkv                    float [B, S, (num_heads + 2 * kv_num_heads) * H], the three side by side
//   past_key, past_value   float [B, kv_num_heads, P, H]
//   seqlens_k              int32 [B] or [B, 1]   length of each sequence, new positions included, minus 1
//   total_sequence_length  int32 [] or [1]       T, of the longest sequence; S <= T <= P + S
//   cos_cache, sin_cache   float [>= T, R]       R values or pairs of a head are rotated, 2 R <= H
//   Y                      float [B, S, num_heads * H]
//   present_key, _value    float [B, kv_num_heads, max(T, P), H]; where a caller binds the memory of past_key and
//                          past_value, only the new positions are written
//
// Where S = T, sequences start here, and shorter ones are padded at their end; else sequence b has seqlens_k[b] + 1 - S
// positions in past_key. Position p of a sequence sees positions 0 to p:
//
//   Y = softmax(scale * rotate(Q) . rotate(K)) V, each key/value head shared by num_heads / kv_num_heads query heads
//
//   scale               0 stands for 1 / sqrt(H)
//   rotary_interleaved  1: values 2 i and 2 i + 1 of a head are a pair, 0: i and i + R
#ifndef FPTQ_COMMON_GROUP_QUERY_ATTENTION_SCHEMA_H_
#define FPTQ_COMMON_GROUP_QUERY_ATTENTION_SCHEMA_H_

#include <cstdint>
#include <vector>

#include "common/node_location.h"
#include "common/op_base.h"
#include "common/shape_inference.h"
#include "onnxruntime_cxx_api.h"

namespace fptq {

/// One of the four.
struct AttentionForm {
  const char* name;
  bool packed;
  bool rotary;

  constexpr size_t past_key_input() const { return packed ? 1 : 3; }
  constexpr size_t past_value_input() const { return past_key_input() + 1; }
  constexpr size_t seqlens_input() const { return past_key_input() + 2; }
  constexpr size_t total_input() const { return past_key_input() + 3; }
  constexpr size_t cos_input() const { return past_key_input() + 4; }
  constexpr size_t sin_input() const { return past_key_input() + 5; }
  constexpr size_t inputs() const { return past_key_input() + (rotary ? 6 : 4); }
};

inline constexpr AttentionForm kGroupQueryAttention = {"GroupQueryAttention", false, false};
inline constexpr AttentionForm kRotaryGroupQueryAttention = {"RotaryGroupQueryAttention", false, true};
inline constexpr AttentionForm kPackedGroupQueryAttention = {"PackedGroupQueryAttention", true, false};
inline constexpr AttentionForm kPackedRotaryGroupQueryAttention = {"PackedRotaryGroupQueryAttention", true, true};

/// What is known when a kernel is created.
struct AttentionNode {
  NodeLocation location;
  int64_t heads = 0;
  int64_t kv_heads = 0;
  float scale = 0.0f;
  bool interleaved = false;

  /// Heads that stand side by side in the first input.
  int64_t HeadsOfFirst(const AttentionForm& form) const { return form.packed ? heads + 2 * kv_heads : heads; }

  /// Reads and checks a node; throws Ort::Exception naming it.
  static AttentionNode Read(const AttentionForm& form, Ort::ConstKernelInfo info);
};

/// The shapes of one call.
struct AttentionShapes {
  int64_t batch = 0;
  int64_t rows = 0;  ///< S
  int64_t head_size = 0;
  int64_t past_length = 0;  ///< P
  int64_t total = 0;        ///< T
  int64_t rotary_half = 0;  ///< R
  std::vector<int64_t> y;
  std::vector<int64_t> present;

  /// Checks shapes and lengths of all inputs; throws Ort::Exception naming the node.
  static AttentionShapes Check(const AttentionForm& form, const AttentionNode& node, const Ort::KernelContext& context);
};

void InferAttentionShapes(const AttentionForm& form, InferenceContext& context);

/// One op for one kernel (see OpBase for what the kernel provides).
template <const AttentionForm& kForm, class Kernel>
struct AttentionOp : OpBase<AttentionOp<kForm, Kernel>, Kernel> {
  const char* GetName() const { return kForm.name; }
  size_t GetInputTypeCount() const { return kForm.inputs(); }
  ONNXTensorElementDataType GetInputType(size_t index) const {
    const bool length = index == kForm.seqlens_input() || index == kForm.total_input();
    return length ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
  size_t GetOutputTypeCount() const { return 3; }
  ONNXTensorElementDataType GetOutputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }
  static void InferShapes(InferenceContext& context) { InferAttentionShapes(kForm, context); }
};

}  // namespace fptq

#endif  // FPTQ_COMMON_GROUP_QUERY_ATTENTION_SCHEMA_H_
