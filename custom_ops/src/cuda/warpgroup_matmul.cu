// Large M on sm_90a: wgmma with the weights as the 64-row operand from registers and the tokens from shared memory.
// Compiled for sm_90a only. See README.md for the pipeline.
//
// Roles: warpgroup 0 is the producer, one thread of each of its warps asks for a part of every stage (128 rows of K,
// or 256) of a ring; the other warpgroups are consumers, each with strips of 64 channels for all tokens of the tile
// (warpgroup_consumer.cuh). Tiles are walked persistently, or split along K over the CTAs of a cluster that add their
// sums in rank order, or over the consumers of a CTA (deep tiles).

#include <algorithm>

#include "cuda/warpgroup_consumer.cuh"

namespace fptq::cuda {
namespace {

/// Rows of tiles up to which weights leave L2 first (measured): so few read them at about the same time.
constexpr int kFewTiles = 8;

/// Fills the ring, tile after tile. One thread of each producer warp.
template <class Shape>
__device__ __forceinline__ void Produce(const WarpgroupCta<Shape>& cta, const CUtensorMap& map, int warp) {
  const WeightView& w = cta.args.weights;
  const int stride = w.layout.block_stride;
  const bool brings_activations = warp == Shape::kProducers - 1;
  const uint64_t policy = ptx::EvictLastPolicy();
  const uint64_t weights_policy = cta.args.tiles_m <= kFewTiles ? ptx::EvictFirstPolicy() : policy;
  if (brings_activations) ptx::WaitForPredecessors();
  const plan::Range blocks = cta.Blocks();
  const int copy_bytes = cta.args.copy_rows * kBlockK;
  RingPosition at;
  for (int index = cta.FirstTile(); index < cta.TileCount(); index += cta.TileStride()) {
    const plan::Tile tile = cta.TileAt(index);
    const int strip = tile.n * Shape::kTileStrips + warp;
    const bool brings_weights = warp < Shape::kTileStrips && strip < w.layout.strips;
    const uint8_t* from = w.blocks + w.layout.BlockOffset(strip, blocks.begin);
    const int first_row = tile.m * Shape::kTokens;
    const int copies = cta.args.call.m - first_row <= cta.args.copy_rows ? 1 : Shape::kTokens / cta.args.copy_rows;
#pragma unroll 1  // for registers
    for (int block = blocks.begin; block < blocks.end; block += Shape::kDepth) {
      uint64_t* full = cta.full + at.stage;
      ptx::BarrierWait(cta.empty + at.stage, at.parity ^ 1);
      ptx::BarrierArriveExpect(
          full, Shape::kDepth * ((brings_activations ? copies * copy_bytes : 0) + (brings_weights ? stride : 0)));
      if (brings_weights) {
        ptx::BulkCopy(
            ptx::SharedAddress(cta.shared + cta.memory.weights + (at.stage * Shape::kStageBlocks + warp) * stride),
            from, static_cast<uint32_t>(Shape::kDepth * stride), full, weights_policy);
      }
      for (int copy = 0; brings_activations && copy < copies; ++copy) {
        const uint32_t to = ptx::SharedAddress(cta.shared + (at.stage * Shape::kDepth + cta.twin) * Shape::kTileBytes +
                                               copy * copy_bytes);
        const int column = (block + cta.twin) * kBlockK, row = first_row + copy * cta.args.copy_rows;
        if constexpr (Shape::kIsDeep) {  // the twin brings the other block's
          ptx::BulkCopyTileToCluster(to, &map, column, row, full, 3, policy);
        } else {
          ptx::BulkCopyTile(to, &map, column, row, full, policy);
        }
      }
      from += Shape::kDepth * stride;
      at.Advance(cta.args.stages);
    }
  }
  if constexpr (Shape::kIsDeep) {  // the twin still needs this CTA's memory and barriers, until it has read all stages
    if (!brings_activations) return;
    for (int i = 0; i < cta.args.stages; ++i) {
      ptx::BarrierWait(cta.empty + at.stage, at.parity ^ 1);
      at.Advance(cta.args.stages);
    }
  }
}

template <class T, Promotion kPromotion, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    WarpgroupKernel(const __grid_constant__ MatMulArguments args, const __grid_constant__ CUtensorMap map) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const WarpgroupCta<Shape> cta(args, shared);
  if (threadIdx.x == 0) {
    ptx::PrefetchTensorMap(&map);
    for (int stage = 0; stage < args.stages; ++stage) {
      ptx::BarrierInit(cta.full + stage, Shape::kProducers);
      ptx::BarrierInit(cta.empty + stage, Shape::kTwins * Shape::kConsumerThreads / 32);
    }
    ptx::BarrierInit(cta.received, 1);
    ptx::BarrierInitFence();
  }
  __syncthreads();
  ptx::AllowSuccessors();
  const bool is_cluster = Shape::kIsDeep || args.split > 1;
  if (is_cluster) ptx::ClusterArriveRelaxed();
  if (threadIdx.x < kGroupThreads) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Shape::kProducerRegisters));
    const int warp = static_cast<int>(threadIdx.x) / 32;
    if (Shape::kIsDeep && warp == Shape::kProducers - 1) ptx::ClusterWait();  // the twin's barriers are ready
    if (threadIdx.x % 32 == 0 && warp < Shape::kProducers) Produce(cta, map, warp);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Shape::kConsumerRegisters));
    if (is_cluster) ptx::ClusterWait();  // the other ranks' barriers are ready
    WarpgroupConsumer<T, kPromotion, Shape>(cta).Run();
  }
}

template <class T, Promotion kPromotion, class Shape>
void LaunchTileShape(const Device& device, MatMulArguments args, const Plan& plan, Stream stream) {
  args.tiles_m = static_cast<int>(packing::CeilDiv(args.call.m, Shape::kTokens));
  args.tiles_n = static_cast<int>(packing::CeilDiv(args.weights.layout.strips, Shape::kTwins * Shape::kTileStrips));
  const int64_t tiles = int64_t{args.tiles_m} * args.tiles_n;
  LaunchShape shape;
  const int cluster = args.split * Shape::kTwins;
  shape.grid =
      dim3(static_cast<unsigned>(cluster > 1 ? tiles * cluster : std::min<int64_t>(tiles, device.multiprocessors)));
  shape.threads = Shape::kThreads;
  shape.shared_bytes = Shape::Memory(args).total;
  shape.cluster = cluster;
  shape.overlap = plan.overlap;
  args.copy_rows = plan::CopyRows(Shape::kTokens, args.call.m);
  const CUtensorMap map = ActivationMap(device, args.call, args.weights.layout.k, args.copy_rows);
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
    if (is(64, 64)) return launch(WarpgroupShape<64, 1, 2, true>{});
    if (is(64, 192)) return launch(WarpgroupShape<64, 1, 3>{});
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
