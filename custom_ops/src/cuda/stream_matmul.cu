// Small M on sm_90 and newer: weights stream once from device memory through shared memory into mma.m16n8k32, weights
// as its 16-row operand and tokens as the 8-column one. See README.md for the pipeline.
//
// The CTAs of a cluster share K: rank r holds the activations of its share in shared memory for its whole life and
// multiplies that share of every strip of the cluster. Roles: groups of four warps, each with a strip of its own, and
// two producer warps that keep the groups' rings of weight chunks full. When a group has finished its share of a strip,
// every thread sends its sums to the ranks that own them (asynchronous stores into their inbox); each rank adds the
// shares of its part of the strip in rank order: no atomics, the same bytes every run.

#include <climits>

#include "cuda/mma_sums.cuh"

namespace fptq::cuda {
namespace {

template <int kTokens>
struct StreamShape {
  static constexpr int kGroups = plan::StreamGroups(kTokens);
  static constexpr int kConsumerThreads = kGroups * kGroupThreads;
  static constexpr int kThreads = kConsumerThreads + 32 * plan::kStreamProducers;
  static constexpr int kPairs = kTokens * kStripN / 2;  // of neighbouring channels in a strip's tile
};

template <int kTokens>
class StreamCta {
  using Shape = StreamShape<kTokens>;

 public:
  __device__ StreamCta(const MatMulArguments& args, uint8_t* shared_memory)
      : args(args),
        split(args.split),
        rank(static_cast<int>(blockIdx.x) % split),
        depth(args.stages / Shape::kGroups),
        work(plan::StreamWork::Of(static_cast<int>(args.weights.layout.strips), static_cast<int>(blockIdx.x) / split,
                                  static_cast<int>(gridDim.x) / split)),
        blocks(plan::Share(static_cast<int>(args.weights.layout.k_blocks), rank, split)),
        first_row(static_cast<int>(blockIdx.y) * kTokens),
        shared(shared_memory),
        memory(plan::StreamMemory::Of(kTokens, static_cast<int>(packing::CeilDiv(args.weights.layout.k_blocks, split)),
                                      args.stages, args.weights.layout.block_stride)),
        full(reinterpret_cast<uint64_t*>(shared + memory.barriers)),
        empty(full + args.stages),
        received(empty + args.stages),
        activations(received + 2 * Shape::kGroups) {}

  __device__ uint8_t* Chunk(int stage) const { return shared + memory.weights + stage * memory.chunk_bytes; }

  const MatMulArguments& args;
  int split, rank;
  int depth;  ///< stages of one group's ring; stage s of group g is number s * groups + g
  plan::StreamWork work;
  plan::Range blocks;
  int first_row;
  uint8_t* shared;
  plan::StreamMemory memory;
  uint64_t *full, *empty;  ///< [stages]
  uint64_t* received;      ///< [groups][2]: a round's sums are in the inbox
  uint64_t* activations;
};

/// Position in the rings, the same for all groups that are still active: lap parity and stage of the group.
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void Advance(int depth) {
    if (++stage == depth) {
      stage = 0;
      parity ^= 1;
    }
  }
};

/// One thread per producer: weights first, which are constants, then the activations, once the kernels ahead have
/// written them.
template <int kTokens>
__device__ __forceinline__ void Produce(const StreamCta<kTokens>& cta, const CUtensorMap& map, int producer) {
  using Shape = StreamShape<kTokens>;
  const WeightView& w = cta.args.weights;
  const packing::Layout& layout = w.layout;
  const int64_t strip_bytes = layout.StripBytes();
  const uint64_t policy = ptx::EvictFirstPolicy();
  const auto load_activations = [&] {
    ptx::WaitForPredecessors();
    const int count = cta.blocks.end - cta.blocks.begin;
    ptx::BarrierArriveExpect(cta.activations, static_cast<uint32_t>(count * cta.memory.tile_bytes));
    const uint64_t keep = ptx::EvictLastPolicy();
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      ptx::BulkCopyTile(cta.shared + i * cta.memory.tile_bytes, &map, (cta.blocks.begin + i) * kBlockK, cta.first_row,
                        cta.activations, keep);
    }
  };
  int before_activations = producer == 0 ? cta.depth : INT_MAX;  // chunks per group of the first filling
  RingPosition at;
  for (int round = 0; round < cta.work.Rounds(Shape::kGroups); ++round) {
    const int active = cta.work.Active(round, Shape::kGroups);
    const int strip = cta.work.strips.begin + round * Shape::kGroups;
    for (int block = cta.blocks.begin; block < cta.blocks.end; block += plan::kChunkBlocks) {
      const int bytes = min(plan::kChunkBlocks, cta.blocks.end - block) * layout.block_stride;
      const uint8_t* blocks = w.blocks + layout.BlockOffset(strip, block);
      if (before_activations-- == 0) load_activations();
      for (int group = producer; group < active; group += plan::kStreamProducers) {
        const int stage = at.stage * Shape::kGroups + group;
        uint64_t* full = cta.full + stage;
        ptx::BarrierWait(cta.empty + stage, at.parity ^ 1);
        ptx::BarrierArriveExpect(full, static_cast<uint32_t>(bytes));
        ptx::BulkCopy(cta.Chunk(stage), blocks + group * strip_bytes, static_cast<uint32_t>(bytes), full, policy);
      }
      at.Advance(cta.depth);
    }
  }
  if (producer == 0 && before_activations >= 0) load_activations();
}

template <class T, Promotion kPromotion, int kTokens>
__device__ __forceinline__ void Consume(const StreamCta<kTokens>& cta) {
  using Shape = StreamShape<kTokens>;
  const packing::Layout& layout = cta.args.weights.layout;
  const plan::StreamMemory& memory = cta.memory;
  const int group = static_cast<int>(threadIdx.x) / kGroupThreads;
  const int thread = static_cast<int>(threadIdx.x) % kGroupThreads;
  const int share = Shape::kPairs / cta.split;  // pairs of a strip that each rank owns
  const int mine = cta.rank * share;
  uint64_t* received = cta.received + 2 * group;
  uint2* inbox = reinterpret_cast<uint2*>(cta.shared + cta.memory.inbox + 2 * group * memory.inbox_bytes);
  ptx::WaitForPredecessors();
  if (cta.args.call.per_token && thread < kTokens && cta.first_row + thread < cta.args.call.m) {
    ptx::PrefetchLine(cta.args.call.a_scale + cta.first_row + thread);
  }

  MmaSums<T, kPromotion, kTokens> sums;
  RingPosition at;
  for (int round = 0; round < cta.work.Rounds(Shape::kGroups); ++round) {
    if (group >= cta.work.Active(round, Shape::kGroups)) break;
    // This round's inbox: the sums of all ranks for this rank's pairs of the strip.
    uint2* slots = inbox + round % 2 * Shape::kPairs;
    if (thread == 0) ptx::BarrierArriveExpect(received + round % 2, static_cast<uint32_t>(Shape::kPairs * 8));
    sums.Clear();
    if (round == 0) ptx::BarrierWait(cta.activations, 0);
    for (int block = cta.blocks.begin; block < cta.blocks.end; block += plan::kChunkBlocks) {
      const int count = min(plan::kChunkBlocks, cta.blocks.end - block);
      const int stage = at.stage * Shape::kGroups + group;
      const uint8_t* weights = cta.Chunk(stage);
      const uint8_t* tile = cta.shared + (block - cta.blocks.begin) * memory.tile_bytes;
      ptx::BarrierWait(cta.full + stage, at.parity);
#pragma unroll kTokens <= 16 ? plan::kChunkBlocks : 1
      for (int i = 0; i < count; ++i) {
        sums.Add(weights + i * layout.block_stride, tile + i * memory.tile_bytes, layout);
      }
      __syncwarp();
      if (thread % 32 == 0) ptx::BarrierArrive(cta.empty + stage);
      at.Advance(cta.depth);
    }

#pragma unroll
    for (int q = 0; q < kTokens / 4; ++q) {
      const int pair = q * kGroupThreads + thread;
      const int owner = pair / share;
      ptx::StoreClusterAsync(ptx::SharedAddress(slots + cta.rank * share + pair % share), sums.Pair(q / 2, q % 2),
                             received + round % 2, static_cast<uint32_t>(owner));
    }
    const int strip = cta.work.strips.begin + round * Shape::kGroups + group;
    const int64_t n = int64_t{strip} * kStripN + packing::ThreadChannel((mine + thread) % kGroupThreads);
    const Epilogue<T, EncodingOf(kPromotion)> epilogue(cta.args, n, kMmaCentre);
    ptx::BarrierWait(received + round % 2, round / 2 & 1);
    for (int i = thread; i < share; i += kGroupThreads) {
      uint2 sum = slots[i];
      for (int r = 1; r < cta.split; ++r) sum = AddSums<EncodingOf(kPromotion)>(sum, slots[r * share + i]);
      const int q = (mine + i) / kGroupThreads;
      epilogue.Store(cta.first_row + q / 2 * 8 + (mine + i) % 4 * 2 + q % 2, sum);
    }
  }
}

template <class T, Promotion kPromotion, int kTokens>
__global__ void __launch_bounds__(StreamShape<kTokens>::kThreads, 1)
    StreamKernel(const __grid_constant__ MatMulArguments args, const __grid_constant__ CUtensorMap map) {
#if __CUDA_ARCH__ >= 900
  using Shape = StreamShape<kTokens>;
  extern __shared__ __align__(1024) uint8_t shared[];
  const StreamCta<kTokens> cta(args, shared);
  const int producer = (static_cast<int>(threadIdx.x) - Shape::kConsumerThreads) / 32;  // below 0 for consumers
  if (threadIdx.x < 32) {
    ptx::PrefetchTensorMap(&map);
    for (int i = static_cast<int>(threadIdx.x); i < cta.memory.barrier_count; i += 32) {
      const bool is_empty = i >= args.stages && i < 2 * args.stages;
      ptx::BarrierInit(cta.full + i, is_empty ? kGroupThreads / 32 : 1);
    }
    ptx::BarrierInitFence();
  }
  __syncthreads();
  ptx::AllowSuccessors();
  ptx::ClusterArriveRelaxed();
  if (threadIdx.x >= Shape::kConsumerThreads && threadIdx.x % 32 == 0) Produce(cta, map, producer);
  __syncwarp();
  ptx::ClusterWait();  // the other ranks' barriers are ready
  if (threadIdx.x < Shape::kConsumerThreads) Consume<T, kPromotion, kTokens>(cta);
#endif
}

template <class T, Promotion kPromotion, int kTokens>
void LaunchStreamKernel(const Device& device, const MatMulArguments& args, const Plan& plan, Stream stream) {
  const packing::Layout& layout = args.weights.layout;
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(plan.config.clusters * args.split),
                    static_cast<unsigned>(packing::CeilDiv(args.call.m, kTokens)));
  shape.threads = StreamShape<kTokens>::kThreads;
  shape.shared_bytes = plan::StreamMemory::Of(kTokens, static_cast<int>(packing::CeilDiv(layout.k_blocks, args.split)),
                                              args.stages, layout.block_stride)
                           .total;
  shape.cluster = args.split;
  shape.overlap = plan.overlap;
  const CUtensorMap map = ActivationMap(device, args.call, layout.k, kTokens);
  Launch(StreamKernel<T, kPromotion, kTokens>, shape, stream, args, map);
}

template <class T, Promotion kPromotion>
void LaunchStreamOf(const Device& device, const MatMulArguments& args, const Plan& plan, Stream stream) {
  switch (plan.config.tile_m) {
    case 8:
      return LaunchStreamKernel<T, kPromotion, 8>(device, args, plan, stream);
    case 16:
      return LaunchStreamKernel<T, kPromotion, 16>(device, args, plan, stream);
    case 32:
      return LaunchStreamKernel<T, kPromotion, 32>(device, args, plan, stream);
    case 64:
      return LaunchStreamKernel<T, kPromotion, 64>(device, args, plan, stream);
    default:
      throw CudaError("the streaming kernel has no tile of " + std::to_string(plan.config.tile_m) + " tokens");
  }
}

}  // namespace

void LaunchStream(const Device& device, const MatMulArguments& args, const Plan& plan, Stream stream) {
  ForType(args.weights.type, [&](auto zero) {
    ForPromotion(args.weights, [&](auto promotion) {
      LaunchStreamOf<decltype(zero), decltype(promotion)::value>(device, args, plan, stream);
    });
  });
}

int MaxActiveClusters(const Device& device, int size) {
  const auto kernel = StreamKernel<__half, Promotion::kBlock, 8>;
  Check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.max_shared_bytes),
        "cudaFuncSetAttribute");
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(size), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(device.multiprocessors / size * size));
  config.blockDim = dim3(StreamShape<8>::kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(device.max_shared_bytes);
  config.attrs = &cluster;
  config.numAttrs = 1;
  int count = 0;
  Check(cudaOccupancyMaxActiveClusters(&count, kernel, &config), "cudaOccupancyMaxActiveClusters");
  return count;
}

}  // namespace fptq::cuda
