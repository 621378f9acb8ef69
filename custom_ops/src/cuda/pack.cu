// Packing of weights at session creation.

#include <algorithm>
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
    const cudaError_t copied = cudaMemcpyAsync(memory_, source, static_cast<size_t>(bytes), cudaMemcpyDefault, stream);
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

__global__ void PackBlocks(packing::Layout layout, packing::Encoding encoding, const uint8_t* b, uint8_t* blocks) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t block = index / packing::kWordsPerBlock;
  if (block >= layout.strips * layout.k_blocks) return;
  const int word = static_cast<int>(index % packing::kWordsPerBlock);
  reinterpret_cast<uint32_t*>(blocks + block * layout.block_stride)[word] =
      packing::PackWord(layout, encoding, b, block / layout.k_blocks, block % layout.k_blocks, word);
}

int64_t ScaleCount(const packing::Layout& layout) {
  return layout.strips * layout.k_blocks * layout.RowsPerBlock() * kStripN;
}

/// Scales (T, or IntegerScale from multiples) [groups][n] to the ends of the blocks; zero outside.
template <class From, class To, class Convert>
__device__ void PackScale(const packing::Layout& layout, const From* from, uint8_t* blocks, Convert convert) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int per_block = layout.RowsPerBlock() * kStripN;
  const int64_t block = index / per_block;
  if (block >= layout.strips * layout.k_blocks) return;
  const int in_block = static_cast<int>(index % per_block);
  const int64_t n = block / layout.k_blocks * kStripN + in_block % kStripN;
  const int64_t group = layout.GroupOf(block % layout.k_blocks, in_block / kStripN);
  const bool inside = n < layout.n && group < packing::CeilDiv(layout.k, layout.block_size);
  reinterpret_cast<To*>(blocks + block * layout.block_stride + kBlockBytes)[in_block] =
      convert(inside ? from[group * layout.n + n] : From{});
}

template <class T>
__global__ void PackFloatScales(packing::Layout layout, const T* from, uint8_t* blocks) {
  PackScale<T, T>(layout, from, blocks, [](T x) { return x; });
}

__global__ void PackIntegerScales(packing::Layout layout, const int8_t* from, uint8_t* blocks) {
  PackScale<int8_t, packing::IntegerScale>(layout, from, blocks, [](int8_t i) { return packing::IntegerScale::Of(i); });
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

__global__ void PackInt8Blocks(packing::Layout layout, const int8_t* b, uint8_t* blocks) {
  constexpr int kWords = packing::kInt8BlockBytes / 4;
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t block = index / kWords;
  if (block >= layout.strips * layout.k_blocks) return;
  const int word = static_cast<int>(index % kWords);
  reinterpret_cast<uint32_t*>(blocks + block * layout.block_stride)[word] =
      packing::PackInt8Word(layout, b, block / layout.k_blocks, block % layout.k_blocks, word);
}

/// Per channel sum_k b and its scale as float32; zero beyond the last channel.
template <class T>
__global__ void PackInt8Columns(packing::Layout layout, const int8_t* b, const T* scales, float* column_base,
                                int32_t* column_sum) {
  const int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (n >= layout.strips * kStripN) return;
  int sum = 0;
  for (int64_t k = 0; n < layout.n && k < layout.k; ++k) sum += b[k * layout.n + n];
  column_sum[n] = sum;
  column_base[n] = n < layout.n ? Numeric<T>::ToFloat(scales[n]) : 0.0f;
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
  view.type = type;
  const int64_t groups = packing::CeilDiv(k, block_size);
  const int element = type == DataType::kFloat32 ? 4 : 2;

  packing::IntegerScales integer;
  if (scale_max_multiple > 0 && packing::PromotionK(k, block_size) != 0 && k <= packing::kMaxIntegerK &&
      packing::FindIntegerScales(HostScales(b_scale, type, groups * n, stream), groups, n,
                                 std::min(scale_max_multiple, packing::kMaxScaleMultiple), &integer)) {
    view.encoding = Encoding::kInteger;
  }
  const bool is_integer = view.encoding == Encoding::kInteger;
  view.layout =
      packing::Layout::Of(k, n, block_size, is_integer ? static_cast<int>(sizeof(packing::IntegerScale)) : element);
  const packing::Layout& layout = view.layout;
  const bool scales_apart = layout.promotion_k == 0;

  const int64_t channels = layout.strips * kStripN;
  const int64_t scales_at = Align(layout.WeightBytes());
  const int64_t base_at = scales_at + (scales_apart ? Align(groups * n * element) : 0);
  const int64_t sum_at = base_at + Align(channels * 4);
  packed->bytes_ = sum_at + (is_integer ? Align(channels * 4) : 0);
  Check(cudaMalloc(&packed->memory_, static_cast<size_t>(packed->bytes_)), "cudaMalloc for packed weights");
  uint8_t* memory = static_cast<uint8_t*>(packed->memory_);
  uint8_t* scales = memory + scales_at;
  float* column_base = reinterpret_cast<float*>(memory + base_at);
  int32_t* column_sum = reinterpret_cast<int32_t*>(memory + sum_at);
  view.blocks = memory;
  view.scales = scales_apart ? scales : nullptr;
  view.column_base = column_base;
  view.column_sum = is_integer ? column_sum : nullptr;

  const Temporary source(b, packing::CeilDiv(k * n, 2), stream);
  const uint8_t* values = source.As<uint8_t>();
  const unsigned word_blocks = Blocks(layout.strips * layout.k_blocks * packing::kWordsPerBlock);
  const unsigned scale_blocks = Blocks(ScaleCount(layout));
  if (is_integer) {
    const Temporary multiples(integer.multiple.data(), groups * n, stream);
    const int8_t* i = multiples.As<int8_t>();
    PackBlocks<<<word_blocks, kThreads, 0, stream>>>(layout, view.encoding, values, memory);
    PackIntegerScales<<<scale_blocks, kThreads, 0, stream>>>(layout, i, memory);
    SumIntegerColumns<<<Blocks(channels), kThreads, 0, stream>>>(layout, values, i, column_sum);
    integer.base.resize(static_cast<size_t>(channels), 0.0f);
    Check(
        cudaMemcpyAsync(column_base, integer.base.data(), static_cast<size_t>(channels) * 4, cudaMemcpyDefault, stream),
        "cudaMemcpyAsync");
    Check(cudaStreamSynchronize(stream), "packing weights");
  } else {
    const Temporary raw_scales(b_scale, groups * n * element, stream);
    PackBlocks<<<word_blocks, kThreads, 0, stream>>>(layout, view.encoding, values, memory);
    ForType(type, [&](auto zero) {
      using T = decltype(zero);
      const T* raw = raw_scales.As<T>();
      if (!scales_apart) PackFloatScales<<<scale_blocks, kThreads, 0, stream>>>(layout, raw, memory);
      SumFloatColumns<<<Blocks(channels), kThreads, 0, stream>>>(layout, values, raw, column_base);
    });
    if (scales_apart) {
      Check(cudaMemcpyAsync(scales, b_scale, static_cast<size_t>(groups * n * element), cudaMemcpyDefault, stream),
            "cudaMemcpyAsync");
    }
    Check(cudaStreamSynchronize(stream), "packing weights");
  }
  Check(cudaGetLastError(), "packing weights");
  return packed;
}

std::unique_ptr<PackedWeights> PackedWeights::PackInt8(const int8_t* b, const void* b_scale, DataType type, int64_t k,
                                                       int64_t n, Stream stream) {
  std::unique_ptr<PackedWeights> packed(new PackedWeights(Device::Current()));
  WeightView& view = packed->view_;
  view.type = type;
  view.encoding = Encoding::kInt8;
  view.layout = packing::Layout::OfInt8(k, n);
  const packing::Layout& layout = view.layout;
  const int64_t channels = layout.strips * kStripN;
  const int64_t base_at = Align(layout.WeightBytes());
  const int64_t sum_at = base_at + Align(channels * 4);
  packed->bytes_ = sum_at + Align(channels * 4);
  Check(cudaMalloc(&packed->memory_, static_cast<size_t>(packed->bytes_)), "cudaMalloc for packed weights");
  uint8_t* memory = static_cast<uint8_t*>(packed->memory_);
  float* column_base = reinterpret_cast<float*>(memory + base_at);
  int32_t* column_sum = reinterpret_cast<int32_t*>(memory + sum_at);
  view.blocks = memory;
  view.column_base = column_base;
  view.column_sum = column_sum;
  const Temporary source(b, k * n, stream);
  const Temporary scales(b_scale, n * (type == DataType::kFloat32 ? 4 : 2), stream);
  PackInt8Blocks<<<Blocks(layout.strips * layout.k_blocks * (packing::kInt8BlockBytes / 4)), kThreads, 0, stream>>>(
      layout, source.As<int8_t>(), memory);
  ForType(type, [&](auto zero) {
    using T = decltype(zero);
    PackInt8Columns<T><<<Blocks(channels), kThreads, 0, stream>>>(layout, source.As<int8_t>(), scales.As<T>(),
                                                                  column_base, column_sum);
  });
  Check(cudaStreamSynchronize(stream), "packing weights");
  Check(cudaGetLastError(), "packing weights");
  return packed;
}

PackedWeights::~PackedWeights() {
  if (memory_ == nullptr) return;
  const DeviceGuard guard(device_.index);
  cudaFree(memory_);
}

}  // namespace fptq::cuda
