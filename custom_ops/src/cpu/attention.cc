#include "cpu/attention.h"

#include <algorithm>
#include <cmath>

#include "cpu/aligned_buffer.h"
#include "cpu/gemm.h"

namespace fptq::cpu {
namespace {

constexpr int64_t kSmallWork = 1 << 18;  // multiply-adds that are not worth a second thread
constexpr int64_t kWantedTasks = 32;
constexpr int64_t kLeastQueries = 24;  // of a task: what its keys cost to prepare is shared by them
constexpr int64_t kLeastKeys = 256;
constexpr int64_t kAppendRows = 64;

// Room of this thread; it stays, and is as large as its largest task so far.
float* ThreadScratch(int64_t floats) {
  static thread_local AlignedVector<float> buffer;
  if (buffer.size() < static_cast<size_t>(floats)) buffer.resize(static_cast<size_t>(floats));
  return buffer.data();
}

// Positions [begin, end) of one key/value head of the present caches.
void Append(const AttentionCall& call, const Kernels& kernels, int64_t sequence, int64_t kv_head, int64_t begin,
            int64_t end) {
  const int64_t size = call.head_size, past = call.PastOf(sequence), all = past + call.rows;
  const int64_t head = sequence * call.kv_heads + kv_head;
  const auto copy_old = [&](const float* from, float* to) {
    if (from == to) return;  // one buffer
    from += head * call.past_length * size;
    to += head * call.present_length * size;
    if (begin < past) std::copy(from + begin * size, from + std::min(end, past) * size, to + begin * size);
    if (end > all) std::fill(to + std::max(begin, all) * size, to + end * size, 0.0f);
  };
  copy_old(call.past_key, call.present_key);
  copy_old(call.past_value, call.present_value);
  for (int64_t position = std::max(begin, past); position < std::min(end, all); ++position) {
    const int64_t from = (sequence * call.rows + position - past) * call.kv_stride + kv_head * size;
    const int64_t to = (head * call.present_length + position) * size;
    kernels.rotate(call, call.k + from, position, 1.0f, call.present_key + to);
    std::copy(call.v + from, call.v + from + size, call.present_value + to);
  }
}

// Y of one head at one row from its `parts`, `stride` floats apart.
void Merge(const float* part, int64_t parts, int64_t stride, int64_t head_size, float* y) {
  float largest = part[0], total = 0.0f;
  for (int64_t i = 1; i < parts; ++i) largest = std::max(largest, part[i * stride]);
  std::fill(y, y + head_size, 0.0f);
  for (int64_t i = 0; i < parts; ++i, part += stride) {
    const float factor = std::exp2(part[0] - largest);
    total += factor * part[1];
    for (int64_t j = 0; j < head_size; ++j) y[j] += factor * part[2 + j];
  }
  for (int64_t j = 0; j < head_size; ++j) y[j] /= total;
}

int64_t LongestLength(const AttentionCall& call) {
  int64_t longest = 0;
  for (int64_t i = 0; i < call.batch; ++i) longest = std::max(longest, call.PastOf(i) + call.rows);
  return longest;
}

}  // namespace

int64_t AttendScratch(const AttentionCall& call, int64_t rows) {
  const int64_t queries = RoundUp(rows * call.group(), 16) + 16, head_size = RoundUp(call.head_size, 16);
  // Queries in strips of 16 of which 12 are used, sums of values, keys, values and a few lanes per query.
  return queries * head_size * 3 + 2 * (kKeyBlock + 16) * head_size + queries * 48 + 16 * kKeyBlock;
}

AttentionPlan::AttentionPlan(const AttentionCall& call) {
  const int64_t heads = std::max<int64_t>(call.batch * call.kv_heads, 1), rows = std::max<int64_t>(call.rows, 1);
  const int64_t cached = call.head_size <= 64 ? 192 : call.head_size <= 128 ? 96 : 48;  // queries in the second level
  const int64_t even = CeilDiv(rows, CeilDiv(kWantedTasks, heads));
  const int64_t group = call.group();
  task_rows = std::max(std::min(CeilDiv(cached, group), even), CeilDiv(kLeastQueries, group));
  row_blocks = CeilDiv(call.rows, task_rows);
  const int64_t keys = std::max<int64_t>(LongestLength(call), 1);
  const int64_t tasks = std::max<int64_t>(heads * row_blocks, 1);
  task_keys = keys;
  if (tasks < kWantedTasks / 2) {
    task_keys = std::max(RoundUp(CeilDiv(keys, CeilDiv(kWantedTasks, tasks)), kKeyBlock), kLeastKeys);
  }
  key_blocks = CeilDiv(keys, task_keys);
}

int64_t AttentionPlan::PartialFloats(const AttentionCall& call) const {
  return key_blocks == 1 ? 0 : key_blocks * call.batch * call.heads * call.rows * (2 + call.head_size);
}

void RunAttention(const AttentionCall& call, const AttentionPlan& plan, const Kernels& kernels,
                  const Parallel& parallel, float* partial) {
  const int64_t heads = call.batch * call.kv_heads, size = call.head_size, group = call.group();
  const bool shared = call.past_key == call.present_key && call.past_value == call.present_value;
  const int64_t work = call.batch * call.rows * call.heads * LongestLength(call) * size;
  const Parallel pool = work <= kSmallWork ? Parallel{} : parallel;

  const int64_t append_blocks = CeilDiv(shared ? call.rows : call.present_length, kAppendRows);
  const Parallel append_pool = shared && call.rows == 1 ? Parallel{} : pool;
  append_pool.For(heads * append_blocks, [&](int64_t task) {
    const int64_t head = task / append_blocks, sequence = head / call.kv_heads;
    const int64_t origin = shared ? call.PastOf(sequence) : 0;
    const int64_t end = shared ? origin + call.rows : call.present_length;
    const int64_t begin = origin + task % append_blocks * kAppendRows;
    Append(call, kernels, sequence, head % call.kv_heads, begin, std::min(end, begin + kAppendRows));
  });

  const int64_t scratch = AttendScratch(call, plan.task_rows);
  const int64_t part_stride = call.batch * call.heads * call.rows * (2 + size);
  // The last rows have most keys: they go first, so that threads end together.
  pool.For(heads * plan.row_blocks * plan.key_blocks, [&](int64_t index) {
    const int64_t head = index % heads, key_block = index / heads % plan.key_blocks;
    const int64_t row_block = plan.row_blocks - 1 - index / heads / plan.key_blocks;
    AttentionTask task;
    task.sequence = head / call.kv_heads;
    task.kv_head = head % call.kv_heads;
    task.row_begin = row_block * plan.task_rows;
    task.row_end = std::min(call.rows, task.row_begin + plan.task_rows);
    task.key_begin = key_block * plan.task_keys;
    task.key_end = task.key_begin + plan.task_keys;
    if (plan.key_blocks > 1) {
      task.partial = partial + key_block * part_stride + (head * call.rows + task.row_begin) * group * (2 + size);
    }
    kernels.attend(call, task, ThreadScratch(scratch));
  });
  if (plan.key_blocks == 1) return;
  pool.For(heads * plan.row_blocks, [&](int64_t index) {
    const int64_t head = index % heads, begin = index / heads * plan.task_rows;
    for (int64_t row = begin; row < std::min(call.rows, begin + plan.task_rows); ++row) {
      for (int64_t i = 0; i < group; ++i) {
        const int64_t y_row = (head / call.kv_heads * call.rows + row) * call.heads + head % call.kv_heads * group + i;
        Merge(partial + ((head * call.rows + row) * group + i) * (2 + size), plan.key_blocks, part_stride, size,
              call.y + y_row * size);
      }
    }
  });
}

}  // namespace fptq::cpu
