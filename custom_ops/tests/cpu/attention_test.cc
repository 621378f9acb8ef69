#include "attention_test.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "cpu/aligned_buffer.h"
#include "cpu/attention.h"

namespace fptq::cpu {
namespace {

constexpr float kPoison = 1e30f;  // finite: what is multiplied by 0 must be 0

struct Problem {
  AttentionCall call;  // without the memory of a run
  bool packed = false;
  bool shared = false;
  std::vector<float> q, k, v, cos, sin, past_key, past_value;
  std::vector<int32_t> seqlens_k;

  std::string text() const {
    char buffer[240];
    std::snprintf(buffer, sizeof(buffer),
                  "batch=%d rows=%d heads=%d/%d size=%d half=%d interleaved=%d past=%d present=%d first=%d packed=%d "
                  "shared=%d",
                  static_cast<int>(call.batch), static_cast<int>(call.rows), static_cast<int>(call.heads),
                  static_cast<int>(call.kv_heads), static_cast<int>(call.head_size), static_cast<int>(call.rotary_half),
                  call.interleaved, static_cast<int>(call.past_length), static_cast<int>(call.present_length),
                  call.first, packed, shared);
    return buffer;
  }
  int64_t cache_size() const { return call.batch * call.kv_heads * call.present_length * call.head_size; }
};

std::vector<float> RandomFloats(Random& random, int64_t count) {
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = static_cast<float>(Uniform(random, -1000, 1000)) / 400.0f;
  return values;
}

Problem RandomProblem(Random& random, int index) {
  Problem p;
  AttentionCall& call = p.call;
  const bool large = index % 8 == 0;
  call.batch = Uniform(random, 1, large ? 1 : 3);
  call.rows = index % 3 == 0 ? 1 : Uniform(random, 1, large ? 300 : 40);
  call.kv_heads = Uniform(random, 1, 3);
  call.heads = call.kv_heads * Uniform(random, 1, large ? 3 : 9);
  call.head_size = index % 2 == 0 ? 16 * Uniform(random, 1, 6) : Uniform(random, 1, 40);
  call.rotary_half = index % 5 == 0 ? 0 : Uniform(random, 1, std::max<int64_t>(call.head_size / 2, 1));
  if (2 * call.rotary_half > call.head_size) call.rotary_half = 0;
  call.interleaved = Uniform(random, 0, 1) == 1;
  call.scale = static_cast<float>(Uniform(random, 1, 40)) / 64.0f;
  call.first = Uniform(random, 0, 2) == 0;
  p.shared = Uniform(random, 0, 1) == 1;
  p.packed = Uniform(random, 0, 1) == 1;

  const int64_t most_past = call.first ? 0 : Uniform(random, 0, large ? 1200 : 150);
  for (int64_t i = 0; i < call.batch; ++i) {
    const int64_t past = i == 0 ? most_past : Uniform(random, 0, most_past);
    // A shorter sequence of a first call is padded at its end.
    p.seqlens_k.push_back(static_cast<int32_t>(call.first ? Uniform(random, 0, call.rows - 1) : past + call.rows - 1));
  }
  call.past_length = most_past + (p.shared ? call.rows + Uniform(random, 0, 30) : Uniform(random, 0, 5));
  call.present_length = std::max(call.past_length, most_past + call.rows);
  const int64_t q_size = call.heads * call.head_size, kv_size = call.kv_heads * call.head_size;
  call.q_stride = p.packed ? q_size + 2 * kv_size : q_size;
  call.kv_stride = p.packed ? call.q_stride : kv_size;
  p.q = RandomFloats(random, call.batch * call.rows * call.q_stride);
  if (!p.packed) {
    p.k = RandomFloats(random, call.batch * call.rows * kv_size);
    p.v = RandomFloats(random, call.batch * call.rows * kv_size);
  }
  for (int64_t i = 0; i < call.present_length * call.rotary_half; ++i) {
    const double angle = static_cast<double>(Uniform(random, 0, 6283)) / 1000.0;
    p.cos.push_back(static_cast<float>(std::cos(angle)));
    p.sin.push_back(static_cast<float>(std::sin(angle)));
  }
  const int64_t past_size = call.batch * call.kv_heads * call.past_length * call.head_size;
  p.past_key = RandomFloats(random, past_size);
  p.past_value = RandomFloats(random, past_size);
  for (int64_t head = 0; head < call.batch * call.kv_heads; ++head) {  // what no row may see
    call.seqlens_k = p.seqlens_k.data();
    const int64_t past = call.PastOf(head / call.kv_heads);
    for (int64_t i = past * call.head_size; i < call.past_length * call.head_size; ++i) {
      const auto at = static_cast<size_t>(head * call.past_length * call.head_size + i);
      p.past_key[at] = p.past_value[at] = kPoison;
    }
  }
  return p;
}

struct Output {
  std::vector<float> y, key, value;
  bool operator==(const Output& other) const {
    const auto same = [](const std::vector<float>& a, const std::vector<float>& b) {
      return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
    };
    return same(y, other.y) && same(key, other.key) && same(value, other.value);
  }
};

Output Run(const Problem& p, const Kernels& kernels, const Parallel& pool) {
  AttentionCall call = p.call;
  Output output;
  output.y.assign(static_cast<size_t>(call.batch * call.rows * call.heads * call.head_size), kPoison);
  output.key.assign(static_cast<size_t>(p.cache_size()), kPoison);
  output.value.assign(static_cast<size_t>(p.cache_size()), kPoison);
  call.q = p.q.data();
  call.k = p.packed ? call.q + call.heads * call.head_size : p.k.data();
  call.v = p.packed ? call.k + call.kv_heads * call.head_size : p.v.data();
  call.cos = p.cos.data();
  call.sin = p.sin.data();
  call.seqlens_k = p.seqlens_k.data();
  call.past_key = p.past_key.data();
  call.past_value = p.past_value.data();
  if (p.shared) {
    output.key = p.past_key;
    output.value = p.past_value;
    call.past_key = output.key.data();
    call.past_value = output.value.data();
  }
  call.present_key = output.key.data();
  call.present_value = output.value.data();
  call.y = output.y.data();
  const AttentionPlan plan(call);
  std::vector<float> partial(static_cast<size_t>(plan.PartialFloats(call)));
  RunAttention(call, plan, kernels, pool, partial.data());
  return output;
}

// A head at a position, in float64.
std::vector<double> Rotated(const Problem& p, const float* x, int64_t position) {
  std::vector<double> y(x, x + p.call.head_size);
  const int64_t half = p.call.rotary_half;
  for (int64_t i = 0; i < half; ++i) {
    const int64_t one = p.call.interleaved ? 2 * i : i, other = p.call.interleaved ? 2 * i + 1 : i + half;
    const double cos = p.cos[static_cast<size_t>(position * half + i)];
    const double sin = p.sin[static_cast<size_t>(position * half + i)];
    y[static_cast<size_t>(one)] = double{x[one]} * cos - double{x[other]} * sin;
    y[static_cast<size_t>(other)] = double{x[other]} * cos + double{x[one]} * sin;
  }
  return y;
}

void CheckCaches(const Problem& p, const Output& output, const Kernels& kernels) {
  const AttentionCall& call = p.call;
  const int64_t size = call.head_size;
  for (int64_t head = 0; head < call.batch * call.kv_heads; ++head) {
    const int64_t sequence = head / call.kv_heads, past = call.PastOf(sequence);
    for (int64_t position = 0; position < call.present_length; ++position) {
      const int64_t at = (head * call.present_length + position) * size;
      const int64_t row = position - past;
      if (row >= 0 && row < call.rows) {
        const int64_t from = (sequence * call.rows + row) * call.kv_stride + head % call.kv_heads * size;
        const int64_t k_at = p.packed ? from + call.heads * size : from;
        const float* k = p.packed ? p.q.data() : p.k.data();
        const float* v = p.packed ? p.q.data() + call.kv_heads * size : p.v.data();
        const std::vector<double> expected = Rotated(p, k + k_at, position);
        for (int64_t i = 0; i < size; ++i) {
          const double key = output.key[static_cast<size_t>(at + i)];
          CHECK(std::fabs(key - expected[static_cast<size_t>(i)]) <= 2e-6, "%s: key %d: %s", kernels.name,
                static_cast<int>(position), p.text().c_str());
          CHECK(output.value[static_cast<size_t>(at + i)] == v[k_at + i], "%s: value %d: %s", kernels.name,
                static_cast<int>(position), p.text().c_str());
        }
        continue;
      }
      for (int64_t i = 0; i < size; ++i) {
        const auto old = static_cast<size_t>((head * call.past_length + position) * size + i);
        const bool kept = p.shared || row < 0;
        const float key = output.key[static_cast<size_t>(at + i)], value = output.value[static_cast<size_t>(at + i)];
        CHECK(key == (kept ? p.past_key[old] : 0.0f) && value == (kept ? p.past_value[old] : 0.0f),
              "%s: position %d of the cache: %s", kernels.name, static_cast<int>(position), p.text().c_str());
      }
    }
  }
}

void CheckResult(const Problem& p, const Output& output, const Kernels& kernels) {
  const AttentionCall& call = p.call;
  const int64_t size = call.head_size;
  for (int64_t sequence = 0; sequence < call.batch; ++sequence) {
    for (int64_t row = 0; row < call.rows; ++row) {
      for (int64_t head = 0; head < call.heads; ++head) {
        const int64_t position = call.PastOf(sequence) + row;
        const std::vector<double> q =
            Rotated(p, p.q.data() + (sequence * call.rows + row) * call.q_stride + head * size, position);
        const int64_t cache =
            (sequence * call.kv_heads + head / (call.heads / call.kv_heads)) * call.present_length * size;
        std::vector<double> weight, expected(static_cast<size_t>(size));
        double largest = -1e300, total = 0.0, largest_value = 0.0, largest_sum = 0.0;
        for (int64_t key = 0; key <= position; ++key) {
          double score = 0.0, magnitude = 0.0;
          for (int64_t i = 0; i < size; ++i) {
            const double product =
                q[static_cast<size_t>(i)] * double{output.key[static_cast<size_t>(cache + key * size + i)]};
            score += product;
            magnitude += std::fabs(product);
          }
          weight.push_back(score * call.scale);
          largest = std::max(largest, weight.back());
          largest_sum = std::max(largest_sum, magnitude * call.scale);
        }
        for (double& w : weight) total += w = std::exp(w - largest);
        for (int64_t key = 0; key <= position; ++key) {
          for (int64_t i = 0; i < size; ++i) {
            const double value = output.value[static_cast<size_t>(cache + key * size + i)];
            expected[static_cast<size_t>(i)] += weight[static_cast<size_t>(key)] / total * value;
            largest_value = std::max(largest_value, std::fabs(value));
          }
        }
        // A score is off by at most as many roundings of float32 as it has terms, a weight by as much relatively.
        const double tolerance = (largest_sum * static_cast<double>(size + 4) + 40.0) * 0x1p-24 * largest_value;
        for (int64_t i = 0; i < size; ++i) {
          const double y = output.y[static_cast<size_t>(((sequence * call.rows + row) * call.heads + head) * size + i)];
          CHECK(std::fabs(y - expected[static_cast<size_t>(i)]) <= tolerance,
                "%s: sequence %d row %d head %d element %d: %.9g instead of %.9g: %s", kernels.name,
                static_cast<int>(sequence), static_cast<int>(row), static_cast<int>(head), static_cast<int>(i), y,
                expected[static_cast<size_t>(i)], p.text().c_str());
        }
      }
    }
  }
}

// A NaN in a key reaches the rows that see it and no others. (One in a value also reaches earlier rows that share a
// panel with those, as 0 * NaN; onnxruntime gives it to all rows.)
void CheckNaN(const Kernels& kernels) {
  Random random(11);
  Problem p = RandomProblem(random, 1);
  while (p.packed || p.call.rows < 20 || p.call.batch > 1) p = RandomProblem(random, 1);
  const int64_t size = p.call.head_size, bad = 7;
  for (int64_t i = 0; i < p.call.kv_heads * size; ++i) {
    p.k[static_cast<size_t>(bad * p.call.kv_heads * size + i)] = std::numeric_limits<float>::quiet_NaN();
  }
  const Output output = Run(p, kernels, {});
  for (int64_t row = 0; row < p.call.rows; ++row) {
    for (int64_t i = 0; i < p.call.heads * size; ++i) {
      const bool nan = std::isnan(output.y[static_cast<size_t>(row * p.call.heads * size + i)]);
      CHECK(nan == (row >= bad), "%s: NaN at row %d: %s", kernels.name, static_cast<int>(row), p.text().c_str());
    }
  }
}

}  // namespace

void TestAttention(Random& random, const Kernels& kernels, int problems, const Parallel& pool) {
  for (int i = 0; i < problems; ++i) {
    const Problem p = RandomProblem(random, i);
    const Output output = Run(p, kernels, {});
    CHECK(output == Run(p, kernels, pool), "%s: threads change the result: %s", kernels.name, p.text().c_str());
    CheckCaches(p, output, kernels);
    CheckResult(p, output, kernels);
  }
  CheckNaN(kernels);
}

}  // namespace fptq::cpu
