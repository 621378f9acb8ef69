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

constexpr int kBand = 12;  // tiles along M that share weights in L2

/// A tile of kTokens tokens, and who computes it: every consumer warpgroup has kStrips strips of 64 channels.
template <int kTokens_, int kStrips_, int kConsumers_>
struct WarpgroupShape {
  static constexpr int kTokens = kTokens_, kStrips = kStrips_, kConsumers = kConsumers_;
  static constexpr int kTileStrips = kConsumers * kStrips;
  static constexpr int kConsumerThreads = kConsumers * kGroupThreads;
  static constexpr int kThreads = kGroupThreads + kConsumerThreads;
  // Together at most what the CTA gets at its launch, kThreads times the registers that kThreads allow each; setmaxnreg
  // waits for ever for more. More warps hide latency, fewer hold more sums each.
  static constexpr int kProducerRegisters = kConsumers == 2 ? 24 : 32;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 240 : 160;
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static_assert(kGroupThreads * kProducerRegisters + kConsumerThreads * kConsumerRegisters <=
                kThreads * kLaunchRegisters);
  static constexpr int kTileBytes = kTokens * kBlockK;
  static constexpr int kUnits = kConsumerThreads * kStrips * kTokens / 4;  // pairs of neighbouring channels
  /// Warps that fill the ring; warp s asks for strip s, the last one for the activations. (One thread that asks for
  /// everything cannot keep up: a request takes it about 200 clocks.)
  static constexpr int kProducers = kTileStrips < 4 ? kTileStrips + 1 : 4;

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

template <class Shape>
class WarpgroupCta {
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

/// Fills the ring, tile after tile. One thread of each producer warp.
template <class Shape>
__device__ __forceinline__ void Produce(const WarpgroupCta<Shape>& cta, const CUtensorMap& map, int warp) {
  const WeightView& w = cta.args.weights;
  const int stride = w.layout.block_stride;
  const bool brings_activations = warp == Shape::kProducers - 1;
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
        ptx::BulkCopyTile(cta.shared + at.stage * Shape::kTileBytes, &map, block * kBlockK, tile.m * Shape::kTokens,
                          full, policy);
      }
      from += stride;
      at.Advance(cta.args.stages);
    }
  }
}

/// One consumer warpgroup: its strips of the tile.
///
/// The work is a sequence of items, the products of one block of one strip with all tokens. Two sets of fragments take
/// turns: while the tensor cores multiply one item, the next one's weights are unpacked. Float scales: 64 tokens at a
/// time are multiplied into partial sums; where registers allow, two sets of them take turns, so that one is scaled and
/// added up while products fill the other.
template <class T, Promotion kPromotion, class Shape>
class Consumer {
  static constexpr int kTokens = Shape::kTokens;
  static constexpr int kStrips = Shape::kStrips;
  using Pair = typename Numeric<T>::Pair;
  static constexpr int kSums = kTokens / 2;  // int32 per thread and strip
  static constexpr int kHalfTokens = 64;
  static constexpr int kHalves = kTokens / kHalfTokens;
  static constexpr int kHalfSums = kHalfTokens / 2;
  static constexpr bool kInteger = !HasFloatScales(kPromotion);
  static constexpr bool kTwoSets = !kInteger && Shape::kConsumers == 2;
  static constexpr Encoding kEncoding = EncodingOf(kPromotion);

 public:
  __device__ explicit Consumer(const WarpgroupCta<Shape>& cta)
      : cta_(cta),
        group_(static_cast<int>(threadIdx.x) / kGroupThreads - 1),
        thread_(static_cast<int>(threadIdx.x) % kGroupThreads),
        channel_(packing::ThreadChannel(thread_)) {}

  __device__ void Run() {
    for (int index = cta_.FirstTile(); index < cta_.TileCount(); index += cta_.TileStride()) {
      Clear();
      if constexpr (kPromotion == Promotion::kStep) {
        SumSteps();
      } else {
        SumItems();
      }
      Finish(cta_.TileAt(index));
    }
  }

 private:
  // Everything of one stage that this thread reads.
  __device__ uint32_t Block(int strip) const {
    const int slot = at_.stage * Shape::kTileStrips + group_ * kStrips + strip;
    return ptx::SharedAddress(cta_.shared + cta_.memory.weights + slot * cta_.memory.block_stride);
  }
  __device__ uint4 Words(int strip, int half) const {
    return ptx::LoadShared<uint4>(Block(strip) + half * kHalfBytes + thread_ * 16);
  }
  template <class Value>
  __device__ Value Scales(int strip, int row) const {  // of this thread's two channels
    return ptx::LoadShared<Value>(Block(strip) + kBlockBytes + (row * kStripN + channel_) * (sizeof(Value) / 2));
  }
  __device__ uint64_t TileDescriptor(int half = 0) const {
    return wgmma::TileDescriptor(
        ptx::SharedAddress(cta_.shared + at_.stage * Shape::kTileBytes + half * kHalfTokens * kBlockK));
  }
  __device__ void WaitFull() const { ptx::BarrierWait(cta_.full + at_.stage, at_.parity); }
  __device__ void Release(int stage) const {
    if (thread_ % 32 == 0) ptx::BarrierArrive(cta_.empty + stage);
  }
  __device__ void Clear() {
    if constexpr (kInteger) {
#pragma unroll
      for (int i = 0; i < kStrips * kSums; ++i) integer_[i / kSums][i % kSums] = 0;
    } else {
#pragma unroll
      for (int i = 0; i < kStrips * kSums; ++i) sums_[i / kSums][i % kSums] = 0;
#pragma unroll
      for (int i = 0; i < kSets * kHalfSums; ++i) partial_[i / kHalfSums][i % kHalfSums] = 0;
      scales_[1] = Numeric<T>::FromFloat2(make_float2(0, 0));
    }
  }

  __device__ void SumItems() {
    int left = cta_.BlockCount();
    released_ = -1;
    WaitFull();
    Unpack<0>(0);
    if constexpr (kStrips == 2) {
      for (; left > 0; --left) {
        Item<0>(0, false);
        Item<1>(1, left == 1);
        Drain();
      }
    } else {
      for (; left >= 2; left -= 2) {
        Item<0>(0, false);
        Item<1>(0, left == 2);
        Drain();
      }
      if (left == 1) Item<0>(0, true);
    }
    wgmma::Wait<0>();
    if constexpr (kTwoSets) {  // the last half of the last item
      if (kStrips == 1 && left == 1) {
        Promote(0, kHalves - 1, kHalves - 1, scales_[0]);
      } else {
        Promote(kStrips - 1, kHalves - 1, 1, scales_[1]);
      }
    }
    if (released_ >= 0) Release(released_);
    at_.Advance(cta_.args.stages);
  }

  /// Sums that are read while products are in flight must not be in flight across the end of a loop: ptxas would
  /// serialize all products. Little is lost, the next item is unpacked already.
  __device__ __forceinline__ void Drain() {
    if constexpr (kTwoSets) wgmma::Wait<0>();
  }

  /// One item, whose fragments are in set kSet. `last`: of the tile; then nothing new is unpacked.
  template <int kSet>
  __device__ __forceinline__ void Item(int strip, bool last) {
    constexpr int kOther = 1 - kSet;
    const int stage = at_.stage;
    const auto unpack_next = [&] {
      if (strip == kStrips - 1) {
        if (!last) at_.Advance(cta_.args.stages);
        WaitFull();
      }
      Unpack<kOther>(kStrips == 2 ? 1 - strip : 0);
    };
    if constexpr (kInteger) {
      const uint64_t tile = TileDescriptor();
      wgmma::Fence();
#pragma unroll
      for (int step = 0; step < kStepsPerBlock; ++step) {
        wgmma::Mma<kTokens>::Add(integer_[strip], fragments_[kSet][step].a, tile + 2 * step);
      }
      wgmma::Commit();
      wgmma::Wait<1>();  // the item before is complete
      if (strip == 0 && released_ >= 0) Release(released_);
      if (strip == kStrips - 1) released_ = stage;
      unpack_next();
    } else if constexpr (kTwoSets) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        const int set = kHalves == 1 ? kSet : half;
        MultiplyHalf(half, set, fragments_[kSet]);
        wgmma::Wait<1>();
        if (half == 0) {  // the item before is complete
          if (strip == 0 && released_ >= 0) Release(released_);
          Promote(kStrips == 2 ? 1 - strip : 0, kHalves - 1, 1 - set, scales_[kOther]);
        } else {
          Promote(strip, 0, 0, scales_[kSet]);
        }
      }
      if (strip == kStrips - 1) released_ = stage;
      unpack_next();
    } else {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        MultiplyHalf(half, 0, fragments_[kSet]);
        if (half == kHalves - 1) unpack_next();
        wgmma::Wait<0>();
        if (half == kHalves - 1 && strip == kStrips - 1) Release(stage);
        Promote(strip, half, 0, scales_[kSet]);
      }
    }
  }

  /// Starts the products of 64 tokens of the current stage.
  __device__ __forceinline__ void MultiplyHalf(int half, int set,
                                               const packing::Fragment (&fragments)[kStepsPerBlock]) {
    const uint64_t tile = TileDescriptor(half);
    wgmma::Fence();
    wgmma::Mma<kHalfTokens>::Set(partial_[set], fragments[0].a, tile);
#pragma unroll
    for (int step = 1; step < kStepsPerBlock; ++step) {
      wgmma::Mma<kHalfTokens>::Add(partial_[set], fragments[step].a, tile + 2 * step);
    }
    wgmma::Commit();
  }

  /// Unpacks the weights of a strip of the current stage into the fragments of set kSet, and reads its scales.
  template <int kSet>
  __device__ __forceinline__ void Unpack(int strip) {
    packing::Fragment(&fragments)[kStepsPerBlock] = fragments_[kSet];
    if constexpr (kPromotion == Promotion::kInt8) {
#pragma unroll
      for (int step = 0; step < kStepsPerBlock; ++step) {
        fragments[step] = ptx::LoadShared<packing::Fragment>(
            Block(strip) + step * (packing::kInt8BlockBytes / kStepsPerBlock) + thread_ * 16);
      }
    } else if constexpr (kInteger) {
      const packing::Layout& layout = cta_.args.weights.layout;
      packing::SpreadScales scales = packing::Spread(Scales<uint32_t>(strip, 0));
      uint4 words;
#pragma unroll
      for (int step = 0; step < kStepsPerBlock; ++step) {
        if (step > 0 && layout.promotion_k != kBlockK) {
          scales = packing::Spread(Scales<uint32_t>(strip, layout.ScaleRowOfStep(step)));
        }
        if (step % 2 == 0) words = Words(strip, step / 2);
        fragments[step] = step % 2 == 0 ? packing::UnpackInteger(words.x, words.y, scales)
                                        : packing::UnpackInteger(words.z, words.w, scales);
      }
    } else {
      scales_[kSet] = Scales<Pair>(strip, 0);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 words = Words(strip, half);
        fragments[2 * half] = packing::UnpackFloat(words.x, words.y);
        fragments[2 * half + 1] = packing::UnpackFloat(words.z, words.w);
      }
    }
#pragma unroll
    for (int step = 0; step < kStepsPerBlock; ++step) wgmma::Pin(fragments[step].a);
  }

  /// Float scales of groups of 32 or 64: one group at a time.
  __device__ void SumSteps() {
    for (int left = cta_.BlockCount(); left > 0; --left) {
      WaitFull();
#pragma unroll
      for (int strip = 0; strip < kStrips; ++strip) {
        Unpack<0>(strip);
#pragma unroll
        for (int step = 0; step < kStepsPerBlock; ++step) {
          const Pair scale = Scales<Pair>(strip, cta_.args.weights.layout.ScaleRowOfStep(step));
#pragma unroll
          for (int half = 0; half < kHalves; ++half) {
            wgmma::Fence();
            wgmma::Mma<kHalfTokens>::Set(partial_[0], fragments_[0][step].a, TileDescriptor(half) + 2 * step);
            wgmma::Commit();
            wgmma::Wait<0>();
            if (strip == kStrips - 1 && step == kStepsPerBlock - 1 && half == kHalves - 1) Release(at_.stage);
            Promote(strip, half, 0, scale);
          }
        }
      }
      at_.Advance(cta_.args.stages);
    }
  }

  /// Adds partial sums of set `set`, which are of tokens 64 * half and up, times their scales.
  __device__ __forceinline__ void Promote(int strip, int half, int set, Pair scales) {
    wgmma::Pin(partial_[set]);
    const float2 scale = Numeric<T>::ToFloat2(scales);
#pragma unroll
    for (int i = 0; i < kHalfSums; ++i) {
      uint32_t& sum = sums_[strip][half * kHalfSums + i];
      sum = __float_as_uint(
          fmaf(i % 4 < 2 ? scale.x : scale.y, static_cast<float>(partial_[set][i]), __uint_as_float(sum)));
    }
  }

  __device__ uint2 SumPair(int strip, int q) const {
    const int i = q / 2 * 4 + q % 2;
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
    if constexpr (kStrips == 1) {  // larger tiles are never split
      if (cta_.args.split > 1) return FinishCluster(tile);
    }
    constexpr int kBatch =
        kTokens == 128 ? 8 : 16;  // rows whose scales are read at once: stores would hold back each next read
#pragma unroll
    for (int strip = 0; strip < kStrips; ++strip) {
      const int64_t n = Channel(tile, group_, strip, thread_);
      if (n >= cta_.args.weights.layout.n) continue;
      const Epilogue<T, kEncoding> epilogue(cta_.args, n);
      const auto row = [&](int q) { return int64_t{tile.m} * kTokens + q / 2 * 8 + thread_ % 4 * 2 + q % 2; };
#pragma unroll
      for (int first = 0; first < kTokens / 4; first += kBatch) {
        float scales[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) scales[i] = epilogue.Scale(row(first + i));
#pragma unroll
        for (int i = 0; i < kBatch; ++i) epilogue.Store(row(first + i), SumPair(strip, first + i), scales[i]);
      }
    }
  }

  /// The sums of all ranks are added in rank order, each rank for its share of the tile. The ring is empty by now: the
  /// producer asks for nothing that is not consumed, and a split tile is the CTA's only one.
  __device__ void FinishCluster(const plan::Tile& tile) {
    const int owner_thread = group_ * kGroupThreads + thread_;
    asm volatile("bar.sync 1, %0;" ::"n"(Shape::kConsumerThreads) : "memory");
    uint2* pairs = reinterpret_cast<uint2*>(cta_.shared);
#pragma unroll
    for (int strip = 0; strip < kStrips; ++strip) {
#pragma unroll
      for (int q = 0; q < kTokens / 4; ++q) {
        pairs[(strip * (kTokens / 4) + q) * Shape::kConsumerThreads + owner_thread] = SumPair(strip, q);
      }
    }
    ptx::ClusterArrive();
    ptx::ClusterWait();
    const plan::Range mine = plan::Share(Shape::kUnits, cta_.rank, cta_.args.split);
    for (int u = mine.begin + owner_thread; u < mine.end; u += Shape::kConsumerThreads) {
      const uint32_t address = ptx::SharedAddress(pairs + u);
      const int owner = u % Shape::kConsumerThreads;
      const int strip = u / Shape::kConsumerThreads / (kTokens / 4);
      const int q = u / Shape::kConsumerThreads % (kTokens / 4);
      const int64_t n = Channel(tile, owner / kGroupThreads, strip, owner % kGroupThreads);
      if (n >= cta_.args.weights.layout.n) continue;
      const int64_t m = int64_t{tile.m} * kTokens + q / 2 * 8 + owner % 4 * 2 + q % 2;
      const Epilogue<T, kEncoding> epilogue(cta_.args, n);
      const float scale = epilogue.Scale(m);
      uint2 sum = ptx::LoadCluster(address, 0);
      for (int r = 1; r < cta_.args.split; ++r) {
        sum = AddSums<kEncoding>(sum, ptx::LoadCluster(address, static_cast<uint32_t>(r)));
      }
      epilogue.Store(m, sum, scale);
    }
    ptx::ClusterArrive();
    ptx::ClusterWait();
  }

  static constexpr int kSets = kTwoSets ? 2 : 1;

  const WarpgroupCta<Shape>& cta_;
  const int group_, thread_, channel_;
  RingPosition at_;
  int released_;  // stage whose last products may still be in flight
  packing::Fragment fragments_[2][kStepsPerBlock];
  Pair scales_[2];  // of the items in the two sets of fragments
  int partial_[kSets][kInteger ? 1 : kHalfSums];
  uint32_t sums_[kInteger ? 1 : kStrips][kInteger ? 1 : kSums];  // bits of float
  int integer_[kInteger ? kStrips : 1][kInteger ? kSums : 1];
};

template <class T, Promotion kPromotion, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    WarpgroupKernel(const __grid_constant__ MatMulArguments args, const __grid_constant__ CUtensorMap map) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const WarpgroupCta<Shape> cta(args, shared);
  if (threadIdx.x == 0) {
    ptx::PrefetchTensorMap(&map);
    for (int stage = 0; stage < args.stages; ++stage) {
      ptx::BarrierInit(cta.full + stage, Shape::kProducers);
      ptx::BarrierInit(cta.empty + stage, Shape::kConsumerThreads / 32);
    }
    ptx::BarrierInitFence();
  }
  __syncthreads();
  ptx::AllowSuccessors();
  if (threadIdx.x < kGroupThreads) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Shape::kProducerRegisters));
    const int warp = static_cast<int>(threadIdx.x) / 32;
    if (threadIdx.x % 32 == 0 && warp < Shape::kProducers) Produce(cta, map, warp);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Shape::kConsumerRegisters));
    Consumer<T, kPromotion, Shape>(cta).Run();
  }
}

template <class T, Promotion kPromotion, class Shape>
void LaunchTileShape(const Device& device, MatMulArguments args, const Plan& plan, Stream stream) {
  args.tiles_m = static_cast<int>(packing::CeilDiv(args.call.m, Shape::kTokens));
  args.tiles_n = static_cast<int>(packing::CeilDiv(args.weights.layout.strips, Shape::kTileStrips));
  const int64_t tiles = int64_t{args.tiles_m} * args.tiles_n;
  LaunchShape shape;
  shape.grid = dim3(
      static_cast<unsigned>(args.split > 1 ? tiles * args.split : std::min<int64_t>(tiles, device.multiprocessors)));
  shape.threads = Shape::kThreads;
  shape.shared_bytes = Shape::Memory(args).total;
  shape.cluster = args.split;
  shape.overlap = plan.overlap;
  const CUtensorMap map = ActivationMap(device, args.call, args.weights.layout.k, Shape::kTokens);
  Launch(WarpgroupKernel<T, kPromotion, Shape>, shape, stream, args, map);
}

template <class T, Promotion kPromotion>
void LaunchTile(const Device& device, const MatMulArguments& args, const Plan& plan, Stream stream) {
  const auto is = [&](int tile_m, int tile_n) { return plan.config.tile_m == tile_m && plan.config.tile_n == tile_n; };
  const auto launch = [&](auto shape) { LaunchTileShape<T, kPromotion, decltype(shape)>(device, args, plan, stream); };
  if (is(64, 128)) return launch(WarpgroupShape<64, 1, 2>{});
  if (is(128, 128)) return launch(WarpgroupShape<128, 1, 2>{});
  if constexpr (kPromotion == Promotion::kInteger) {
    if (is(128, 192)) return launch(WarpgroupShape<128, 1, 3>{});
  }
  if constexpr (kPromotion == Promotion::kBlock || kPromotion == Promotion::kInteger) {
    if (is(128, 256)) return launch(WarpgroupShape<128, 2, 2>{});
  }
  throw CudaError("the warpgroup kernel has no tile of " + std::to_string(plan.config.tile_m) + " tokens x " +
                  std::to_string(plan.config.tile_n) + " channels");
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
