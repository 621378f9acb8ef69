// Packing of weights at session creation.

#include <vector>

#include "cuda/common.cuh"
#include "fptq/integer_scales.h"

namespace fptq::cuda {
namespace {

constexpr int kThreads = 256;

unsigned Blocks(int64_t count) { return static_cast<unsigned>(packing::CeilDiv(count, kThreads)); }

/// Device memory that is freed on leaving.
class Temporary {
 public:
  Temporary(const void* source, int64_t bytes, Stream stream) {
    Check(cudaMalloc(&memory_, static_cast<size_t>(bytes)), "cudaMalloc while packing weights");
    const cudaError_t copied =
        cudaMemcpyAsync(memory_, source, static_cast<size_t>(bytes), cudaMemcpyDefault, stream);
    if (copied != cudaSuccess) cudaFree(memory_);
    Check(copied, "cudaMemcpyAsync while packing weights");
  }
  ~Temporary() { cudaFree(memory_); }
  Temporary(const Temporary&) = delete;
  Temporary& operator=(const Temporary&) = delete;

  template <class T>
  const T* As() const {
    return static_cast<const T*>(memory_);
  }

 private:
  void* memory_ = nullptr;
};

__global__ void PackBlocks(packing::Layout layout, packing::Encoding encoding, const uint8_t* b,
                           const int8_t* multiples, uint32_t* blocks) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t block = index / packing::kWordsPerBlock;
  if (block >= layout.strips * layout.k_blocks) return;
  blocks[index] = packing::PackWord(layout, encoding, b, block / layout.k_blocks, block % layout.k_blocks,
                                    static_cast<int>(index % packing::kWordsPerBlock),
                                    [&](int64_t row, int64_t n) { return int{multiples[row * layout.n + n]}; });
}

/// Scales (T, or IntegerScale from multiples) to [strips][scale_rows][64]; zero outside.
template <class From, class To, class Convert>
__device__ void PackScale(const packing::Layout& layout, const From* from, To* to, Convert convert) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= layout.ScaleCount()) return;
  const int64_t n = index / (layout.scale_rows * kStripN) * kStripN + index % kStripN;
  const int64_t row = index / kStripN % layout.scale_rows;
  const bool inside = n < layout.n && row < packing::CeilDiv(layout.k, layout.block_size);
  to[index] = convert(inside ? from[row * layout.n + n] : From{});
}

template <class T>
__global__ void PackFloatScales(packing::Layout layout, const T* from, T* to) {
  PackScale(layout, from, to, [](T x) { return x; });
}

__global__ void PackIntegerScales(packing::Layout layout, const int8_t* from, packing::IntegerScale* to) {
  PackScale(layout, from, to, [](int8_t i) { return packing::IntegerScale::Of(i); });
}

/// Per channel sum_k scale * q; one thread per channel, in float64: it is computed once.
template <class T>
__global__ void SumFloatColumns(packing::Layout layout, const uint8_t* b, const T* scales, float* column_base) {
  const int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (n >= layout.strips * kStripN) return;
  double sum = 0;
  for (int64_t first = 0; n < layout.n && first < layout.k; first += layout.block_size) {
    const int64_t last = min(first + layout.block_size, layout.k);
    int group = 0;
    for (int64_t k = first; k < last; ++k) group += packing::ReadInt4(b, k * layout.n + n);
    sum += static_cast<double>(group) *
           static_cast<double>(Numeric<T>::ToFloat(scales[first / layout.block_size * layout.n + n]));
  }
  column_base[n] = static_cast<float>(sum);
}

__global__ void SumIntegerColumns(packing::Layout layout, const uint8_t* b, const int8_t* multiples,
                                  int32_t* column_sum) {
  const int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (n >= layout.strips * kStripN) return;
  int sum = 0;
  for (int64_t k = 0; n < layout.n && k < layout.k; ++k) {
    sum += packing::ReadInt4(b, k * layout.n + n) * multiples[k / layout.block_size * layout.n + n];
  }
  column_sum[n] = sum;
}

template <class T>
float HostFloat(T x) {
  return static_cast<float>(x);
}

std::vector<float> HostScales(const void* scales, DataType type, int64_t count, Stream stream) {
  std::vector<float> values(static_cast<size_t>(count));
  ForType(type, [&](auto zero) {
    using T = decltype(zero);
    std::vector<T> raw(static_cast<size_t>(count));
    Check(cudaMemcpyAsync(raw.data(), scales, raw.size() * sizeof(T), cudaMemcpyDefault, stream), "cudaMemcpyAsync");
    Check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
    for (size_t i = 0; i < raw.size(); ++i) values[i] = HostFloat(raw[i]);
  });
  return values;
}

int64_t Align(int64_t bytes) { return packing::CeilDiv(bytes, 256) * 256; }

}  // namespace

std::unique_ptr<PackedWeights> PackedWeights::Pack(const void* b, const void* b_scale, DataType type, int64_t k,
                                                   int64_t n, int64_t block_size, int scale_max_multiple,
                                                   Stream stream) {
  std::unique_ptr<PackedWeights> packed(new PackedWeights(Device::Current()));
  WeightView& view = packed->view_;
  view.layout = packing::Layout::Of(k, n, block_size);
  view.type = type;
  const packing::Layout& layout = view.layout;
  const int64_t groups = packing::CeilDiv(k, block_size);
  const int64_t element = type == DataType::kFloat32 ? 4 : 2;

  packing::IntegerScales integer;
  if (scale_max_multiple > 0 && layout.promotion_k != 0 && k <= packing::kMaxIntegerK &&
      packing::FindIntegerScales(HostScales(b_scale, type, groups * n, stream), groups, n,
                                 std::min(scale_max_multiple, packing::kMaxScaleMultiple), &integer)) {
    view.encoding = Encoding::kInteger;
  }
  const bool is_integer = view.encoding == Encoding::kInteger;

  const int64_t channels = layout.strips * kStripN;
  const int64_t scales_at = Align(layout.WeightBytes());
  const int64_t base_at = scales_at + Align(layout.ScaleCount() * view.ScaleBytes());
  const int64_t sum_at = base_at + Align(channels * 4);
  packed->bytes_ = sum_at + (is_integer ? Align(channels * 4) : 0);
  Check(cudaMalloc(&packed->memory_, static_cast<size_t>(packed->bytes_)), "cudaMalloc for packed weights");
  uint8_t* memory = static_cast<uint8_t*>(packed->memory_);
  uint8_t* scales = memory + scales_at;
  float* column_base = reinterpret_cast<float*>(memory + base_at);
  int32_t* column_sum = reinterpret_cast<int32_t*>(memory + sum_at);
  view.blocks = memory;
  view.scales = scales;
  view.column_base = column_base;
  view.column_sum = is_integer ? column_sum : nullptr;

  const Temporary source(b, packing::CeilDiv(k * n, 2), stream);
  const uint8_t* values = source.As<uint8_t>();
  const unsigned word_blocks = Blocks(layout.WeightBytes() / 4);
  uint32_t* words = reinterpret_cast<uint32_t*>(memory);
  if (is_integer) {
    const Temporary multiples(integer.multiple.data(), groups * n, stream);
    const int8_t* i = multiples.As<int8_t>();
    PackBlocks<<<word_blocks, kThreads, 0, stream>>>(layout, view.encoding, values, i, words);
    PackIntegerScales<<<Blocks(layout.ScaleCount()), kThreads, 0, stream>>>(
        layout, i, reinterpret_cast<packing::IntegerScale*>(scales));
    SumIntegerColumns<<<Blocks(channels), kThreads, 0, stream>>>(layout, values, i, column_sum);
    integer.base.resize(static_cast<size_t>(channels), 0.0f);
    Check(cudaMemcpyAsync(column_base, integer.base.data(), static_cast<size_t>(channels) * 4, cudaMemcpyDefault,
                          stream),
          "cudaMemcpyAsync");
    Check(cudaStreamSynchronize(stream), "packing weights");
  } else {
    const Temporary raw_scales(b_scale, groups * n * element, stream);
    PackBlocks<<<word_blocks, kThreads, 0, stream>>>(layout, view.encoding, values, nullptr, words);
    ForType(type, [&](auto zero) {
      using T = decltype(zero);
      const T* raw = raw_scales.As<T>();
      PackFloatScales<<<Blocks(layout.ScaleCount()), kThreads, 0, stream>>>(layout, raw, reinterpret_cast<T*>(scales));
      SumFloatColumns<<<Blocks(channels), kThreads, 0, stream>>>(layout, values, raw, column_base);
    });
    Check(cudaStreamSynchronize(stream), "packing weights");
  }
  Check(cudaGetLastError(), "packing weights");
  return packed;
}

PackedWeights::~PackedWeights() {
  if (memory_ == nullptr) return;
  const DeviceGuard guard(device_.index);
  cudaFree(memory_);
}

}  // namespace fptq::cuda
