#include "common/group_query_attention_schema.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

namespace fptq {
namespace {

using Shape = std::vector<int64_t>;

constexpr int64_t kMostHeads = 1 << 16;
constexpr int64_t kMostPositions = std::numeric_limits<int32_t>::max();

int64_t Heads(const NodeLocation& location, Ort::ConstKernelInfo info, const char* name) {
  int64_t heads = 0;
  try {
    heads = info.GetAttribute<int64_t>(name);
  } catch (const Ort::Exception&) {
    location.Fail(Concat("attribute '", name, "' is missing or is not an integer"), "Set it to the number of heads");
  }
  if (heads < 1 || heads > kMostHeads) {
    location.Fail(Concat(name, " is ", heads), Concat("Use a number from 1 to ", kMostHeads));
  }
  return heads;
}

template <class T>
T Optional(const NodeLocation& location, Ort::ConstKernelInfo info, const char* name, const char* kind) {
  try {
    return info.GetAttribute<T>(name);
  } catch (const Ort::Exception&) {
    location.Fail(Concat("attribute '", name, "' is missing or is not ", kind), "Set it as the header of the op says");
  }
}

void CheckWidth(const AttentionForm& form, const AttentionNode& node, const Shape& shape) {
  const int64_t heads = node.HeadsOfFirst(form);
  if (shape.back() < heads || shape.back() % heads != 0) {
    node.location.Fail(
        Concat(form.packed ? "qkv" : "query", " has shape ", ShapeText(shape)),
        Concat("Its last dimension must be ", heads, " (the number of heads in it) times the head size"));
  }
}

int32_t Int32(const Ort::ConstValue& value, int64_t index) {
  int32_t result;  // a constant of a mapped file may start anywhere
  std::memcpy(&result, static_cast<const char*>(value.GetTensorRawData()) + index * 4, sizeof(result));
  return result;
}

bool IsScalar(const Shape& shape) { return shape.empty() || (shape.size() == 1 && shape[0] == 1); }

}  // namespace

AttentionNode AttentionNode::Read(const AttentionForm& form, Ort::ConstKernelInfo info) {
  AttentionNode node;
  node.location = NodeLocation::Of(form.name, info);
  const NodeLocation& at = node.location;
  node.heads = Heads(at, info, "num_heads");
  node.kv_heads = Heads(at, info, "kv_num_heads");
  if (node.heads % node.kv_heads != 0) {
    at.Fail(Concat("num_heads is ", node.heads, " and kv_num_heads ", node.kv_heads),
            "num_heads must be a multiple of kv_num_heads");
  }
  node.scale = Optional<float>(at, info, "scale", "a float");
  if (!(node.scale >= 0.0f && std::isfinite(node.scale))) {
    at.Fail(Concat("scale is ", node.scale), "Use a finite number that is not negative; 0 is 1 / sqrt(head size)");
  }
  if (form.rotary) {
    const auto interleaved = Optional<int64_t>(at, info, "rotary_interleaved", "an integer");
    if (interleaved != 0 && interleaved != 1) at.Fail(Concat("rotary_interleaved is ", interleaved), "Use 0 or 1");
    node.interleaved = interleaved == 1;
  }
  const Shape first = info.GetInputTypeInfo(0).GetTensorTypeAndShapeInfo().GetShape();
  if (!first.empty() && first.back() >= 0) CheckWidth(form, node, first);
  return node;
}

AttentionShapes AttentionShapes::Check(const AttentionForm& form, const AttentionNode& node,
                                       const Ort::KernelContext& context) {
  const NodeLocation& at = node.location;
  const auto shape_of = [&](size_t input) { return context.GetInput(input).GetTensorTypeAndShapeInfo().GetShape(); };
  const auto require = [&](size_t input, const char* name, const Shape& expected) {
    const Shape shape = shape_of(input);
    if (shape == expected) return;
    at.Fail(Concat(name, " has shape ", ShapeText(shape)), Concat("It must be ", ShapeText(expected)));
  };
  AttentionShapes s;
  const Shape first = shape_of(0);
  if (first.size() != 3 || first[1] < 1 || first[1] > kMostPositions) {
    at.Fail(Concat(form.packed ? "qkv" : "query", " has shape ", ShapeText(first)),
            "It must be [batch, new positions, heads * head size] with at least one new position");
  }
  CheckWidth(form, node, first);
  s.batch = first[0];
  s.rows = first[1];
  s.head_size = first[2] / node.HeadsOfFirst(form);
  if (!form.packed) {
    require(1, "key", {s.batch, s.rows, node.kv_heads * s.head_size});
    require(2, "value", {s.batch, s.rows, node.kv_heads * s.head_size});
  }
  const Shape past = shape_of(form.past_key_input());
  s.past_length = past.size() == 4 ? std::min(past[2], kMostPositions) : 0;
  require(form.past_key_input(), "past_key", {s.batch, node.kv_heads, s.past_length, s.head_size});
  require(form.past_value_input(), "past_value", past);

  const Ort::ConstValue total = context.GetInput(form.total_input());
  if (!IsScalar(shape_of(form.total_input()))) {
    at.Fail(Concat("total_sequence_length has shape ", ShapeText(shape_of(form.total_input()))),
            "Give one value, shape [] or [1]");
  }
  s.total = Int32(total, 0);
  if (s.total < s.rows || s.total > s.past_length + s.rows) {
    at.Fail(Concat("total_sequence_length is ", s.total),
            Concat("With ", s.rows, " new positions and room for ", s.past_length,
                   " old ones in past_key it must be from ", s.rows, " to ", s.past_length + s.rows));
  }
  const Shape lengths = shape_of(form.seqlens_input());
  if (lengths != Shape{s.batch} && lengths != Shape{s.batch, 1}) {
    at.Fail(Concat("seqlens_k has shape ", ShapeText(lengths)), Concat("It must be ", ShapeText({s.batch})));
  }
  const Ort::ConstValue seqlens = context.GetInput(form.seqlens_input());
  for (int64_t i = 0; i < s.batch; ++i) {
    const int64_t length = int64_t{Int32(seqlens, i)} + 1, least = s.rows == s.total ? 1 : s.rows;
    if (length < least || length > s.total || (s.rows != s.total && length - s.rows > s.past_length)) {
      at.Fail(Concat("seqlens_k[", i, "] is ", length - 1),
              Concat("A sequence of ", s.rows, " new positions among ", s.total, " must have from ", least, " to ",
                     std::min(s.total, s.past_length + s.rows), ", and seqlens_k is one less"));
    }
  }
  if (form.rotary) {
    const Shape cos = shape_of(form.cos_input());
    if (cos.size() != 2 || cos[0] < s.total || cos[1] < 1 || cos[1] > s.head_size / 2) {
      at.Fail(Concat("cos_cache has shape ", ShapeText(cos)),
              Concat("It must be [positions, rotated pairs] with at least ", s.total, " positions and from 1 to ",
                     s.head_size / 2, " pairs"));
    }
    require(form.sin_input(), "sin_cache", cos);
    s.rotary_half = cos[1];
  }
  s.y = {s.batch, s.rows, node.heads * s.head_size};
  s.present = {s.batch, node.kv_heads, std::max(s.total, s.past_length), s.head_size};
  return s;
}

void InferAttentionShapes(const AttentionForm& form, InferenceContext& context) {
  const SymbolicShape first = context.InputShape(0), past = context.InputShape(form.past_key_input());
  if (!form.packed && first.size() == 3) context.SetOutputShape(0, first, context.InputType(0));
  if (past.size() != 4) return;  // unknown rank
  SymbolicShape present = past;
  present[2] = {};
  context.SetOutputShape(1, present, context.InputType(0));
  context.SetOutputShape(2, present, context.InputType(0));
}

}  // namespace fptq
