// The tile of a CTA of the warpgroup kernel: its shape, its shared memory, its order.
#ifndef FPTQ_CUDA_WARPGROUP_TILE_CUH_
#define FPTQ_CUDA_WARPGROUP_TILE_CUH_

#include "cuda/common.cuh"

namespace fptq::cuda {

inline constexpr int kBand = 12;  // tiles along M that share weights in L2

/// A tile of kTokens tokens, and who computes it: every consumer warpgroup has kStrips strips of 64 channels. Or, in a
/// deep tile, all consumers have the same strip and take turns along K; two CTAs, twins, have neighbouring strips and
/// bring activations for each other.
template <int kTokens_, int kStrips_, int kConsumers_, bool kIsDeep_ = false>
struct WarpgroupShape {
  static constexpr int kTokens = kTokens_, kStrips = kStrips_, kConsumers = kConsumers_;
  static constexpr bool kIsDeep = kIsDeep_;
  static constexpr int kDepth = kIsDeep ? kConsumers : 1;  // blocks of K in a stage
  static constexpr int kTwins = kIsDeep ? 2 : 1;
  static_assert(kDepth <= kTwins, "each twin brings one tile of a stage's activations");
  static constexpr int kTileStrips = kConsumers * kStrips / kDepth;
  static constexpr int kStageBlocks = kTileStrips * kDepth;  // of weights
  static constexpr int kChannels = kTileStrips * kStripN;
  static_assert(kDepth == plan::TileDepth(kChannels));
  static constexpr int kConsumerThreads = kConsumers * kGroupThreads;
  static constexpr int kThreads = kGroupThreads + kConsumerThreads;
  // Together at most what the CTA gets at its launch, kThreads times the registers that kThreads allow each; setmaxnreg
  // waits for ever for more. More warps hide latency, fewer hold more sums each.
  static constexpr int kProducerRegisters = kIsDeep ? 40 : kConsumers == 2 ? 24 : 32;
  static constexpr int kConsumerRegisters = kIsDeep ? 232 : kConsumers == 2 ? 240 : 160;
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static_assert(kGroupThreads * kProducerRegisters + kConsumerThreads * kConsumerRegisters <=
                kThreads * kLaunchRegisters);
  static constexpr int kTileBytes = kTokens * kBlockK;  // of activations of one block of K
  /// No registers are left for scales that change within a block of K.
  static constexpr bool kWholeBlocks = plan::NeedsWholeBlocks(kTokens, kChannels);
  /// Warps that fill the ring; warp s asks for strip s, the last one for the activations. (One thread that asks for
  /// everything cannot keep up: a request takes it about 200 clocks.)
  static constexpr int kProducers = kTileStrips < 4 ? kTileStrips + 1 : 4;

  __host__ __device__ static plan::RingMemory Memory(const MatMulArguments& args) {
    return plan::RingMemory::Of(kTokens, kTileStrips, args.stages, args.weights.layout.block_stride, args.split,
                                kDepth);
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
        received(empty + args.stages),
        rank(static_cast<int>(blockIdx.x) % args.split),
        twin(static_cast<int>(blockIdx.x) % Shape::kTwins) {}

  /// This rank's share of K.
  __device__ plan::Range Blocks() const {
    return plan::Share(static_cast<int>(args.weights.layout.k_blocks), rank, args.split);
  }
  /// Stages of a tile.
  __device__ int StageCount() const { return (Blocks().end - Blocks().begin) / Shape::kDepth; }
  __device__ int FirstTile() const { return static_cast<int>(blockIdx.x) / (args.split * Shape::kTwins); }
  __device__ int TileStride() const { return static_cast<int>(gridDim.x) / (args.split * Shape::kTwins); }
  __device__ int TileCount() const { return args.tiles_m * args.tiles_n; }
  /// args.tiles_n counts pairs of twins' tiles.
  __device__ plan::Tile TileAt(int index) const {
    plan::Tile tile = plan::TileAt(index, args.tiles_m, args.tiles_n, kBand);
    tile.n = tile.n * Shape::kTwins + twin;
    return tile;
  }

  const MatMulArguments& args;
  uint8_t* shared;
  plan::RingMemory memory;
  uint64_t *full, *empty;
  uint64_t* received;  ///< the sums of a split tile are in the inbox
  int rank;
  int twin;  ///< 0 or 1
};

}  // namespace fptq::cuda

#endif  // FPTQ_CUDA_WARPGROUP_TILE_CUH_
