// The tile of a CTA of the warpgroup kernel: its shape, its shared memory, its order.
#ifndef FPTQ_CUDA_WARPGROUP_TILE_CUH_
#define FPTQ_CUDA_WARPGROUP_TILE_CUH_

#include "cuda/common.cuh"

namespace fptq::cuda {

inline constexpr int kBand = 12;  // tiles along M that share weights in L2

/// A tile of kTokens tokens, and who computes it: every consumer warpgroup has kStrips strips of 64 channels.
template <int kTokens_, int kStrips_, int kConsumers_>
struct WarpgroupShape {
  static constexpr int kTokens = kTokens_, kStrips = kStrips_, kConsumers = kConsumers_;
  static constexpr int kTileStrips = kConsumers * kStrips;
  static constexpr int kChannels = kTileStrips * kStripN;
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
  /// No registers are left for scales that change within a block of K.
  static constexpr bool kWholeBlocks = plan::NeedsWholeBlocks(kTokens, kChannels);
  /// Warps that fill the ring; warp s asks for strip s, the last one for the activations. (One thread that asks for
  /// everything cannot keep up: a request takes it about 200 clocks.)
  static constexpr int kProducers = kTileStrips < 4 ? kTileStrips + 1 : 4;

  __host__ __device__ static plan::RingMemory Memory(const MatMulArguments& args) {
    return plan::RingMemory::Of(kTokens, kTileStrips, args.stages, args.weights.layout.block_stride, args.split);
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
  uint64_t* received;  ///< the sums of a split tile are in the inbox
  int rank;
};

}  // namespace fptq::cuda

#endif  // FPTQ_CUDA_WARPGROUP_TILE_CUH_
