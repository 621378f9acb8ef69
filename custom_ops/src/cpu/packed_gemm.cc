#include "cpu/packed_gemm.h"

#include <algorithm>

namespace fptq::cpu {
namespace {

constexpr int64_t kPanelRows = 512;      // rows prepared at a time: bounds the scratch memory
constexpr int64_t kPrepareRows = 8;      // of one task at most
constexpr int64_t kTileRows = 16;        // kernels may read whole tiles: of rows, and of 64 bytes
constexpr int64_t kSmallWork = 1 << 18;  // multiply-adds that are not worth a second thread
constexpr int64_t kActivationBytes = 3 << 19;
constexpr int64_t kWantedTasks = 32;
constexpr int64_t kLeastStrips = 4;  // of a task

// Rows of one task: whole tiles, of equal number, that stay in a second-level cache while the weights pass.
int64_t RowsOfTask(const PackedWeights& w, int64_t rows, const Kernels& kernels) {
  const int64_t cached = std::max<int64_t>(kActivationBytes / w.a_stride() / (2 * kTileRows), 1) * 2 * kTileRows;
  int64_t tasks = CeilDiv(rows, std::min(kernels.rows_per_task, cached));
  if (w.structured && kernels.structured_rows_per_task > 0) {
    const int64_t enough = CeilDiv(kWantedTasks, CeilDiv(w.strips, kLeastStrips));
    tasks = std::max(CeilDiv(rows, kernels.structured_rows_per_task), std::min(tasks, enough));
  }
  return RoundUp(CeilDiv(rows, tasks), kTileRows);
}

// Strips of one task. Its weights should stay in a second-level cache while its rows pass; there should be enough tasks
// that threads which take them one by one end together, each worth many dispatches.
int64_t StripsOfTask(const PackedWeights& w, int64_t rows, int64_t row_tasks) {
  const int64_t bytes = rows <= 16 ? 40 << 10 : 256 << 10;
  const int64_t wanted = rows <= 16 ? w.strips : CeilDiv(w.strips * row_tasks, kWantedTasks);
  const int64_t strips = std::min(bytes / w.strip_bytes(), wanted);
  return std::min<int64_t>(std::max(strips / kLeastStrips * kLeastStrips, kLeastStrips), 16);
}

// Offsets take -8 times the sum of a group's activations out, those of bytes -128 times all of them; modulo 2^32.
void TotalStarts(const PackedWeights& w, int64_t begin, int64_t end, const int32_t* a_start, int32_t* a_total) {
  for (int64_t row = begin; row < end; ++row) {
    uint32_t sum = 0;
    for (int64_t g = 0; g < w.groups; ++g) sum += static_cast<uint32_t>(a_start[row * w.groups + g]);
    a_total[row] = static_cast<int32_t>(16 * sum);
  }
}

}  // namespace

size_t PackedGemm::ScratchBytes(int64_t rows, Activations activations) const {
  const int64_t panel = std::min(rows, kPanelRows);
  const int64_t starts = panel * (weights_.groups + 1) * static_cast<int64_t>(sizeof(int32_t));
  const int64_t prepared = RoundUp(panel, kTileRows) * weights_.a_stride() + starts;
  const int64_t scale_bytes = static_cast<int64_t>(sizeof(float));
  const int64_t quantized = activations == Activations::kFloat ? panel * (weights_.k + scale_bytes) : 0;
  return static_cast<size_t>(prepared + quantized + 2 * kAlignment);
}

void PackedGemm::Run(const Call& call, const Parallel& parallel) const {
  const PackedWeights& w = weights_;
  const auto address = RoundUp(reinterpret_cast<intptr_t>(call.scratch), kAlignment);
  auto* prepared = reinterpret_cast<int8_t*>(address);
  const int64_t element_bytes = type_ == ElementType::kFloat32 ? 4 : 2;
  for (int64_t first = 0; first < call.rows; first += kPanelRows) {
    const int64_t rows = std::min(kPanelRows, call.rows - first);
    auto* a_start = reinterpret_cast<int32_t*>(address + RoundUp(rows, kTileRows) * w.a_stride());
    int32_t* a_total = a_start + rows * w.groups;
    auto* own_scale = reinterpret_cast<float*>(a_total + rows);
    auto* quantized = reinterpret_cast<uint8_t*>(own_scale + rows);
    const bool serial = rows * w.k * w.n <= kSmallWork;
    const Parallel pool = serial ? Parallel{} : parallel;
    const int64_t prepare_rows = call.x == nullptr ? kPrepareRows : std::min(kPrepareRows, RowsPerTask(w.k));
    pool.For(CeilDiv(rows, prepare_rows), [&](int64_t task) {
      const int64_t row = task * prepare_rows;
      const int64_t end = std::min(rows, row + prepare_rows);
      const uint8_t* a = quantized + row * w.k;
      if (call.x != nullptr) {
        const char* x = static_cast<const char*>(call.x) + (first + row) * w.k * element_bytes;
        kernels_.quantize(x, type_, end - row, w.k, quantized + row * w.k, own_scale + row);
      } else {
        a = call.a + (first + row) * w.k;
      }
      kernels_.prepare(w, a, end - row, prepared + row * w.a_stride(), a_start + row * w.groups);
      if (w.structured) TotalStarts(w, row, end, a_start, a_total);
    });
    GemmCall gemm;
    gemm.weights = &w;
    gemm.a = prepared;
    gemm.a_start = a_start;
    gemm.a_total = a_total;
    gemm.a_scale = call.x != nullptr ? own_scale : call.a_scale + (call.per_token ? first : 0);
    gemm.per_token = call.x != nullptr || call.per_token;
    gemm.zero_offset = call.a_zero_point - kActivationOffset;
    gemm.type = type_;
    gemm.y = static_cast<char*>(call.y) + first * w.n * element_bytes;
    const int64_t task_rows = RowsOfTask(w, rows, kernels_);
    const int64_t row_tasks = CeilDiv(rows, task_rows);
    const int64_t task_strips = StripsOfTask(w, rows, row_tasks);
    const int64_t strip_tasks = CeilDiv(w.strips, task_strips);
    pool.For(strip_tasks * row_tasks, [&](int64_t task) {
      const int64_t strip = task % strip_tasks * task_strips;
      const int64_t row = task / strip_tasks * task_rows;
      kernels_.gemm(gemm, row, std::min(rows, row + task_rows), strip, std::min(w.strips, strip + task_strips));
    });
  }
}

}  // namespace fptq::cpu
