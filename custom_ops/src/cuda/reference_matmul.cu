// Any block size, any device: one thread per result. Runs the block sizes that do not fit the tensor cores' steps, and
// serves as the check of the other kernels on the device.

#include "cuda/common.cuh"

namespace fptq::cuda {
namespace {

constexpr int kThreads = 128;

template <class T>
__global__ void __launch_bounds__(kThreads) ReferenceKernel(const __grid_constant__ MatMulArguments args) {
  ptx::AllowSuccessors();
  ptx::WaitForPredecessors();
  const WeightView& w = args.weights;
  const packing::Layout& layout = w.layout;
  const int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (n >= layout.n) return;
  const int64_t strip = n / kStripN;
  const int channel = static_cast<int>(n % kStripN);
  const bool is_integer = w.encoding == Encoding::kInteger;
  const int zero_point = ZeroPointOf(args.call);
  for (int64_t m = blockIdx.y; m < args.call.m; m += gridDim.y) {
    const uint8_t* a = args.call.a + m * layout.k;
    float sum = 0;
    int integer_sum = 0;
    for (int64_t first = 0; first < layout.k; first += layout.block_size) {
      const int64_t last = min(first + layout.block_size, layout.k);
      const uint8_t* block = w.blocks + layout.BlockOffset(strip, first / kBlockK);
      const int row = layout.promotion_k == 0 ? 0 : static_cast<int>(first % kBlockK) / layout.promotion_k;
      packing::IntegerScale multiple = {1, 0};
      if (is_integer) {
        multiple = reinterpret_cast<const packing::IntegerScale*>(block + kBlockBytes)[row * kStripN + channel];
      }
      int group = 0;
      for (int64_t k = first; k < last; ++k) {
        const packing::NibblePlace place = packing::PlaceOfValue(channel, static_cast<int>(k % kBlockK));
        const uint32_t word =
            reinterpret_cast<const uint32_t*>(w.blocks + layout.BlockOffset(strip, k / kBlockK))[place.word];
        const int digit = static_cast<int>(word >> place.shift & 0xF);
        const int value = is_integer ? digit * multiple.multiplier + multiple.offset - 128 : (digit ^ 8) - 8;
        group += (static_cast<int>(a[k]) - zero_point) * value;
      }
      if (is_integer) {
        integer_sum += group;
      } else {
        const T scale = layout.promotion_k == 0
                            ? static_cast<const T*>(w.scales)[first / layout.block_size * layout.n + n]
                            : reinterpret_cast<const T*>(block + kBlockBytes)[row * kStripN + channel];
        sum = fmaf(Numeric<T>::ToFloat(scale), static_cast<float>(group), sum);
      }
    }
    if (is_integer) sum = w.column_base[n] * static_cast<float>(integer_sum);
    const float a_scale = args.call.a_scale[args.call.per_token ? m : 0];
    static_cast<T*>(args.call.y)[m * layout.n + n] = Numeric<T>::FromFloat(a_scale * sum);
  }
}

}  // namespace

void LaunchReference(const Device& device, const MatMulArguments& args, Stream stream) {
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(packing::CeilDiv(args.weights.layout.n, kThreads)),
                    static_cast<unsigned>(std::min<int64_t>(args.call.m, 65535)));
  shape.threads = kThreads;
  shape.shared_bytes = 0;
  shape.overlap = device.HasBulkCopies();
  ForType(args.weights.type, [&](auto zero) { Launch(ReferenceKernel<decltype(zero)>, shape, stream, args); });
}

}  // namespace fptq::cuda
