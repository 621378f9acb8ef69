// Large M on sm_90a: wgmma with the weights as the 64-row operand from registers and the tokens from shared memory.
// Compiled for sm_90a only. See README.md for the pipeline.
//
// Roles: warpgroup 0 is the producer, one thread of it fills a ring of stages (128 rows of K) with bulk copies;
// warpgroups 1 and 2 are consumers, each with kStrips strips of 64 channels for all kTokens tokens of the tile. While
// one consumer unpacks weights or promotes sums, the tensor cores run the other's products.
// Tiles are walked persistently, or split along K over the CTAs of a cluster that add their sums in rank order.

#include <algorithm>

#include "cuda/common.cuh"
#include "cuda/wgmma.cuh"

namespace fptq::cuda {
namespace {

constexpr int kConsumers = 2;  // warpgroups
constexpr int kConsumerThreads = kConsumers * kGroupThreads;
constexpr int kThreads = kGroupThreads + kConsumerThreads;
constexpr int kProducerRegisters = 40;
constexpr int kConsumerRegisters = 232;
constexpr int kBand = 12;  // tiles along M that share weights in L2

template <int kTokens, int kStrips>
struct WarpgroupShape {
  static constexpr int kTileStrips = kConsumers * kStrips;
  static constexpr int kTileBytes = kTokens * kBlockK;
  static constexpr int kUnits = kConsumerThreads * kStrips * kTokens / 4;  // pairs of neighbouring channels

  __host__ __device__ static plan::RingMemory Memory(const MatMulArguments& args) {
    return plan::RingMemory::Of(kTokens, kTileStrips, args.stages, args.weights.layout.block_stride);
  }
};

/// Position in the ring: stage and the parity of its barriers.
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void Advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

template <int kTokens, int kStrips>
class WarpgroupCta {
  using Shape = WarpgroupShape<kTokens, kStrips>;

 public:
  __device__ WarpgroupCta(const MatMulArguments& args, uint8_t* shared_memory)
      : args(args),
        shared(shared_memory),
        memory(Shape::Memory(args)),
        full(reinterpret_cast<uint64_t*>(shared + memory.barriers)),
        empty(full + args.stages),
        rank(static_cast<int>(blockIdx.x) % args.split) {}

  /// This rank's share of K.
  __device__ plan::Range Blocks() const {
    return plan::Share(static_cast<int>(args.weights.layout.k_blocks), rank, args.split);
  }
  __device__ int BlockCount() const { return Blocks().end - Blocks().begin; }
  __device__ int FirstTile() const { return static_cast<int>(blockIdx.x) / args.split; }
  __device__ int TileStride() const { return static_cast<int>(gridDim.x) / args.split; }
  __device__ int TileCount() const { return args.tiles_m * args.tiles_n; }
  __device__ plan::Tile TileAt(int index) const { return plan::TileAt(index, args.tiles_m, args.tiles_n, kBand); }

  const MatMulArguments& args;
  uint8_t* shared;
  plan::RingMemory memory;
  uint64_t *full, *empty;
  int rank;
};

/// Warps that fill the ring; warp s asks for strip s, the last one for the activations. (One thread that asks for
/// everything cannot keep up: a request takes it about 200 clocks.)
template <int kStrips>
constexpr int kProducers = kConsumers * kStrips < 4 ? kConsumers * kStrips + 1 : 4;

/// Fills the ring, tile after tile. One thread of each producer warp.
template <int kTokens, int kStrips>
__device__ __forceinline__ void Produce(const WarpgroupCta<kTokens, kStrips>& cta, const CUtensorMap& map, int warp) {
  using Shape = WarpgroupShape<kTokens, kStrips>;
  const WeightView& w = cta.args.weights;
  const int stride = w.layout.block_stride;
  const bool brings_activations = warp == kProducers<kStrips> - 1;
  const uint64_t policy = ptx::EvictLastPolicy();
  if (brings_activations) ptx::WaitForPredecessors();
  const plan::Range blocks = cta.Blocks();
  RingPosition at;
  for (int index = cta.FirstTile(); index < cta.TileCount(); index += cta.TileStride()) {
    const plan::Tile tile = cta.TileAt(index);
    const int strip = tile.n * Shape::kTileStrips + warp;
    const bool brings_weights = warp < Shape::kTileStrips && strip < w.layout.strips;
    const uint8_t* from = w.blocks + w.layout.BlockOffset(strip, blocks.begin);
    for (int block = blocks.begin; block < blocks.end; ++block) {
      uint64_t* full = cta.full + at.stage;
      ptx::BarrierWait(cta.empty + at.stage, at.parity ^ 1);
      ptx::BarrierArriveExpect(full, (brings_activations ? Shape::kTileBytes : 0) + (brings_weights ? stride : 0));
      if (brings_weights) {
        ptx::BulkCopy(cta.shared + cta.memory.weights + (at.stage * Shape::kTileStrips + warp) * stride, from,
                      static_cast<uint32_t>(stride), full, policy);
      }
      if (brings_activations) {
        ptx::BulkCopyTile(cta.shared + at.stage * Shape::kTileBytes, &map, block * kBlockK, tile.m * kTokens, full,
                          policy);
      }
      from += stride;
      at.Advance(cta.args.stages);
    }
  }
}

/// One consumer warpgroup: its strips of the tile.
template <class T, Promotion kPromotion, int kTokens, int kStrips>
class Consumer {
  using Shape = WarpgroupShape<kTokens, kStrips>;
  using Pair = typename Numeric<T>::Pair;
  static constexpr int kSums = kTokens / 2;  // int32 per thread and strip
  static constexpr bool kInteger = kPromotion == Promotion::kInteger;
  static constexpr Encoding kEncoding = EncodingOf(kPromotion);

 public:
  __device__ explicit Consumer(const WarpgroupCta<kTokens, kStrips>& cta)
      : cta_(cta),
        group_(static_cast<int>(threadIdx.x) / kGroupThreads - 1),
        thread_(static_cast<int>(threadIdx.x) % kGroupThreads),
        channel_(packing::ThreadChannel(thread_)) {}

  __device__ void Run() {
    for (int index = cta_.FirstTile(); index < cta_.TileCount(); index += cta_.TileStride()) {
      if constexpr (kInteger) {
        SumInteger();
      } else {
        SumFloat();
      }
      Finish(cta_.TileAt(index));
    }
  }

 private:
  // Everything of one stage that this thread reads.
  __device__ const uint8_t* Block(int strip) const {
    const int slot = at_.stage * Shape::kTileStrips + group_ * kStrips + strip;
    return cta_.shared + cta_.memory.weights + slot * cta_.memory.block_stride;
  }
  __device__ uint4 Words(int strip, int half) const {
    return *reinterpret_cast<const uint4*>(Block(strip) + half * kHalfBytes + thread_ * 16);
  }
  template <class Value>
  __device__ Value Scales(int strip, int row) const {  // of this thread's two channels
    return *reinterpret_cast<const Value*>(Block(strip) + kBlockBytes +
                                           (row * kStripN + channel_) * (sizeof(Value) / 2));
  }
  __device__ uint64_t TileDescriptor() const {
    return wgmma::TileDescriptor(ptx::SharedAddress(cta_.shared + at_.stage * Shape::kTileBytes));
  }
  __device__ void WaitFull() const { ptx::BarrierWait(cta_.full + at_.stage, at_.parity); }
  __device__ void Release(int stage) const {
    if (thread_ % 32 == 0) ptx::BarrierArrive(cta_.empty + stage);
  }

  /// Float scales: integer sums of one group at a time, each multiplied by its scale and added up in float32.
  __device__ void SumFloat() {
#pragma unroll
    for (int strip = 0; strip < kStrips; ++strip) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums_[strip][i] = 0;
    }
    for (int left = cta_.BlockCount(); left > 0; --left) {
      WaitFull();
      const uint64_t tile = TileDescriptor();
#pragma unroll
      for (int strip = 0; strip < kStrips; ++strip) {
        packing::Fragment fragments[kStepsPerBlock];
        const uint4 first = Words(strip, 0);
        const uint4 second = Words(strip, 1);
        fragments[0] = packing::UnpackFloat(first.x, first.y);
        fragments[1] = packing::UnpackFloat(first.z, first.w);
        fragments[2] = packing::UnpackFloat(second.x, second.y);
        fragments[3] = packing::UnpackFloat(second.z, second.w);
        if constexpr (kPromotion == Promotion::kBlock) {
          wgmma::Fence();
#pragma unroll
          for (int step = 0; step < kStepsPerBlock; ++step) {
            wgmma::Mma<kTokens>::Run(partial_, fragments[step].a, tile + 2 * step, step != 0);
          }
          wgmma::Commit();
          const float2 scale = Numeric<T>::ToFloat2(Scales<Pair>(strip, 0));
          wgmma::Wait<0>();
          if (strip == kStrips - 1) Release(at_.stage);
          Promote(strip, scale);
        } else {
#pragma unroll
          for (int step = 0; step < kStepsPerBlock; ++step) {
            wgmma::Fence();
            wgmma::Mma<kTokens>::Run(partial_, fragments[step].a, tile + 2 * step, 0);
            wgmma::Commit();
            const int row = cta_.args.weights.layout.ScaleRowOfStep(step);
            const float2 scale = Numeric<T>::ToFloat2(Scales<Pair>(strip, row));
            wgmma::Wait<0>();
            if (strip == kStrips - 1 && step == kStepsPerBlock - 1) Release(at_.stage);
            Promote(strip, scale);
          }
        }
      }
      at_.Advance(cta_.args.stages);
    }
  }

  __device__ void Promote(int strip, float2 scale) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const float sum = __uint_as_float(sums_[strip][i]);
      sums_[strip][i] = __float_as_uint(fmaf(i % 4 < 2 ? scale.x : scale.y, static_cast<float>(partial_[i]), sum));
    }
  }

  /// Integer-structured scales: the multiplier goes into the unpacked weight, sums run over all of K. One group of two
  /// products is always in flight while the next weights are unpacked into the other set of registers.
  __device__ void SumInteger() {
    packing::Fragment fragments[2][2];
    int released = -1;  // stage whose last products may still be in flight
#pragma unroll
    for (int strip = 0; strip < kStrips; ++strip) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) integer_[strip][i] = 0;
    }
    for (int left = cta_.BlockCount(); left > 0; --left) {
      WaitFull();
      const uint64_t tile = TileDescriptor();
#pragma unroll
      for (int item = 0; item < 2 * kStrips; ++item) {
        const int strip = item / 2;
        const int half = item % 2;
        const uint4 words = Words(strip, half);
        const packing::Layout& layout = cta_.args.weights.layout;
        const int row = layout.ScaleRowOfStep(2 * half);
        const int next_row = layout.ScaleRowOfStep(2 * half + 1);
        const packing::SpreadScales scales = packing::Spread(Scales<uint32_t>(strip, row));
        const packing::SpreadScales next_scales =
            next_row == row ? scales : packing::Spread(Scales<uint32_t>(strip, next_row));
        fragments[half][0] = packing::UnpackInteger(words.x, words.y, scales);
        fragments[half][1] = packing::UnpackInteger(words.z, words.w, next_scales);
        wgmma::Pin(fragments[half][0].a);
        wgmma::Pin(fragments[half][1].a);
        wgmma::Fence();
        wgmma::Mma<kTokens>::Run(integer_[strip], fragments[half][0].a, tile + 4 * half, 1);
        wgmma::Mma<kTokens>::Run(integer_[strip], fragments[half][1].a, tile + 4 * half + 2, 1);
        wgmma::Commit();
        wgmma::Wait<1>();
        if (item == 0 && released >= 0) Release(released);
      }
      released = at_.stage;
      at_.Advance(cta_.args.stages);
    }
    wgmma::Wait<0>();
    if (released >= 0) Release(released);
  }

  __device__ uint2 SumPair(int strip, int i) const {
    if constexpr (kInteger) {
      return {static_cast<uint32_t>(integer_[strip][i]), static_cast<uint32_t>(integer_[strip][i + 2])};
    } else {
      return {sums_[strip][i], sums_[strip][i + 2]};
    }
  }

  __device__ int64_t Channel(const plan::Tile& tile, int group, int strip, int thread) const {
    return int64_t{tile.n * Shape::kTileStrips + group * kStrips + strip} * kStripN + packing::ThreadChannel(thread);
  }

  __device__ void Finish(const plan::Tile& tile) {
    ptx::WaitForPredecessors();
    if (cta_.args.split > 1) return FinishCluster(tile);
#pragma unroll
    for (int strip = 0; strip < kStrips; ++strip) {
      const int64_t n = Channel(tile, group_, strip, thread_);
      if (n >= cta_.args.weights.layout.n) continue;
      const Epilogue<T, kEncoding> epilogue(cta_.args, n, 0);
#pragma unroll
      for (int q = 0; q < kTokens / 4; ++q) {
        const int64_t m = int64_t{tile.m} * kTokens + q / 2 * 8 + thread_ % 4 * 2 + q % 2;
        epilogue.Store(m, SumPair(strip, q / 2 * 4 + q % 2));
      }
    }
  }

  /// The sums of all ranks are added in rank order, each rank for its share of the tile. The ring is empty by now: the
  /// producer asks for nothing that is not consumed, and a split tile is the CTA's only one.
  __device__ void FinishCluster(const plan::Tile& tile) {
    const int consumer = group_ * kGroupThreads + thread_;
    asm volatile("bar.sync 1, %0;" ::"n"(kConsumerThreads) : "memory");
    uint2* pairs = reinterpret_cast<uint2*>(cta_.shared);
#pragma unroll
    for (int strip = 0; strip < kStrips; ++strip) {
#pragma unroll
      for (int q = 0; q < kTokens / 4; ++q) {
        pairs[(strip * (kTokens / 4) + q) * kConsumerThreads + consumer] = SumPair(strip, q / 2 * 4 + q % 2);
      }
    }
    ptx::ClusterArrive();
    ptx::ClusterWait();
    const plan::Range mine = plan::Share(Shape::kUnits, cta_.rank, cta_.args.split);
    for (int u = mine.begin + consumer; u < mine.end; u += kConsumerThreads) {
      const uint32_t address = ptx::SharedAddress(pairs + u);
      uint2 sum = ptx::LoadCluster(address, 0);
      for (int r = 1; r < cta_.args.split; ++r) {
        sum = AddSums<kEncoding>(sum, ptx::LoadCluster(address, static_cast<uint32_t>(r)));
      }
      const int owner = u % kConsumerThreads;
      const int strip = u / kConsumerThreads / (kTokens / 4);
      const int q = u / kConsumerThreads % (kTokens / 4);
      const int64_t n = Channel(tile, owner / kGroupThreads, strip, owner % kGroupThreads);
      if (n >= cta_.args.weights.layout.n) continue;
      const int64_t m = int64_t{tile.m} * kTokens + q / 2 * 8 + owner % 4 * 2 + q % 2;
      Epilogue<T, kEncoding>(cta_.args, n, 0).Store(m, sum);
    }
    ptx::ClusterArrive();
    ptx::ClusterWait();
  }

  const WarpgroupCta<kTokens, kStrips>& cta_;
  const int group_, thread_, channel_;
  RingPosition at_;
  int partial_[kInteger ? 1 : kSums];                            // of one strip
  uint32_t sums_[kInteger ? 1 : kStrips][kInteger ? 1 : kSums];  // bits of float
  int integer_[kInteger ? kStrips : 1][kInteger ? kSums : 1];
};

template <class T, Promotion kPromotion, int kTokens, int kStrips>
__global__ void __launch_bounds__(kThreads, 1)
    WarpgroupKernel(const __grid_constant__ MatMulArguments args, const __grid_constant__ CUtensorMap map) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const WarpgroupCta<kTokens, kStrips> cta(args, shared);
  if (threadIdx.x == 0) {
    ptx::PrefetchTensorMap(&map);
    for (int stage = 0; stage < args.stages; ++stage) {
      ptx::BarrierInit(cta.full + stage, kProducers<kStrips>);
      ptx::BarrierInit(cta.empty + stage, kConsumerThreads / 32);
    }
    ptx::BarrierInitFence();
  }
  __syncthreads();
  ptx::AllowSuccessors();
  if (threadIdx.x < kGroupThreads) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kProducerRegisters));
    const int warp = static_cast<int>(threadIdx.x) / 32;
    if (threadIdx.x % 32 == 0 && warp < kProducers<kStrips>) Produce(cta, map, warp);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kConsumerRegisters));
    Consumer<T, kPromotion, kTokens, kStrips>(cta).Run();
  }
}

template <class T, Promotion kPromotion, int kTokens, int kStrips>
void LaunchWarpgroupKernel(const Device& device, MatMulArguments args, const Plan& plan, Stream stream) {
  using Shape = WarpgroupShape<kTokens, kStrips>;
  args.tiles_m = static_cast<int>(packing::CeilDiv(args.call.m, kTokens));
  args.tiles_n = static_cast<int>(packing::CeilDiv(args.weights.layout.strips, Shape::kTileStrips));
  const int64_t tiles = int64_t{args.tiles_m} * args.tiles_n;
  LaunchShape shape;
  shape.grid = dim3(
      static_cast<unsigned>(args.split > 1 ? tiles * args.split : std::min<int64_t>(tiles, device.multiprocessors)));
  shape.threads = kThreads;
  shape.shared_bytes = Shape::Memory(args).total;
  shape.cluster = args.split;
  shape.overlap = plan.overlap;
  const CUtensorMap map = ActivationMap(device, args.call, args.weights.layout.k, kTokens);
  Launch(WarpgroupKernel<T, kPromotion, kTokens, kStrips>, shape, stream, args, map);
}

template <class T, Promotion kPromotion>
void LaunchTile(const Device& device, const MatMulArguments& args, const Plan& plan, Stream stream) {
  const int tile_m = plan.config.tile_m;
  const int tile_n = plan.config.tile_n;
  if (tile_m == 64 && tile_n == 128) return LaunchWarpgroupKernel<T, kPromotion, 64, 1>(device, args, plan, stream);
  if (tile_m == 128 && tile_n == 128) return LaunchWarpgroupKernel<T, kPromotion, 128, 1>(device, args, plan, stream);
  if constexpr (kPromotion != Promotion::kStep) {
    if (tile_m == 128 && tile_n == 256) return LaunchWarpgroupKernel<T, kPromotion, 128, 2>(device, args, plan, stream);
  }
  throw CudaError("the warpgroup kernel has no tile of " + std::to_string(tile_m) + " tokens x " +
                  std::to_string(tile_n) + " channels");
}

}  // namespace

void LaunchWarpgroup(const Device& device, const MatMulArguments& args, const Plan& plan, Stream stream) {
  ForType(args.weights.type, [&](auto zero) {
    ForPromotion(args.weights, [&](auto promotion) {
      LaunchTile<decltype(zero), decltype(promotion)::value>(device, args, plan, stream);
    });
  });
}

}  // namespace fptq::cuda
