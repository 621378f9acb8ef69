// Causal attention over a cache of keys and values, in float32 (group_query_attention_schema.h says what it computes).
#ifndef FPTQ_CPU_ATTENTION_H_
#define FPTQ_CPU_ATTENTION_H_

#include <cstddef>
#include <cstdint>

#include "cpu/element.h"
#include "cpu/parallel.h"

namespace fptq::cpu {

struct Kernels;

/// Keys that meet a block of queries at a time: with their values they stay in the first-level cache (head size 64).
inline constexpr int64_t kKeyBlock = 64;

struct AttentionCall {
  int64_t batch = 0;
  int64_t rows = 0;  ///< new positions of each sequence
  int64_t heads = 0;
  int64_t kv_heads = 0;
  int64_t head_size = 0;
  float scale = 1.0f;

  const float* q = nullptr;  ///< [batch][rows][q_stride], of which heads * head_size are used; likewise k and v
  const float* k = nullptr;
  const float* v = nullptr;
  int64_t q_stride = 0;
  int64_t kv_stride = 0;

  int64_t rotary_half = 0;  ///< half of the rotated values of a head; 0: none are
  bool interleaved = false;
  const float* cos = nullptr;  ///< [position][rotary_half]
  const float* sin = nullptr;

  const int32_t* seqlens_k = nullptr;  ///< [batch]: length of a sequence, the new rows included, minus one
  bool first = false;                  ///< the caches hold nothing yet
  const float* past_key = nullptr;     ///< [batch][kv_heads][past_length][head_size]
  const float* past_value = nullptr;
  int64_t past_length = 0;
  float* present_key = nullptr;  ///< the same with present_length; may be the same memory
  float* present_value = nullptr;
  int64_t present_length = 0;

  float* y = nullptr;  ///< [batch][rows][heads * head_size]

  int64_t group() const { return heads / kv_heads; }
  int64_t PastOf(int64_t sequence) const {
    return first ? 0 : int64_t{LoadUnaligned<int32_t>(seqlens_k, sequence)} + 1 - rows;
  }
};

/// The query heads of one key/value head at rows [row_begin, row_end) against keys [key_begin, key_end).
struct AttentionTask {
  int64_t sequence = 0;
  int64_t kv_head = 0;
  int64_t row_begin = 0;
  int64_t row_end = 0;
  int64_t key_begin = 0;
  int64_t key_end = 0;
  float* partial =
      nullptr;  ///< where other keys are another task's: [row][head of the group][2 + head_size], of a
                ///< softmax the maximum times log2(e), the sum of exponentials and the weighted sum of values
};

/// One head at `position`, rotated and multiplied by `factor`, to `y`.
using RotateFunction = void (*)(const AttentionCall& call, const float* x, int64_t position, float factor, float* y);

/// One task; `scratch` is 64-byte aligned room for AttendScratch(...) floats.
using AttendFunction = void (*)(const AttentionCall& call, const AttentionTask& task, float* scratch);
int64_t AttendScratch(const AttentionCall& call, int64_t rows);

/// How a call is cut into tasks, by shapes and lengths only, so that results do not depend on the number of threads.
struct AttentionPlan {
  int64_t task_rows = 0;
  int64_t row_blocks = 0;
  int64_t task_keys = 0;
  int64_t key_blocks = 0;

  explicit AttentionPlan(const AttentionCall& call);
  /// Floats that RunAttention needs.
  int64_t PartialFloats(const AttentionCall& call) const;
};

/// Appends to the caches and attends. `partial`: room for plan.PartialFloats(call) floats.
void RunAttention(const AttentionCall& call, const AttentionPlan& plan, const Kernels& kernels,
                  const Parallel& parallel, float* partial);

namespace portable {
void RotateHead(const AttentionCall& call, const float* x, int64_t position, float factor, float* y);
void Attend(const AttentionCall& call, const AttentionTask& task, float* scratch);
}  // namespace portable

}  // namespace fptq::cpu

#endif  // FPTQ_CPU_ATTENTION_H_
