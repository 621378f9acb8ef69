// Small M on sm_90 and newer: weights stream once from device memory through shared memory into mma.m16n8k32, weights as
// its 16-row operand and tokens as the 8-column one. See README.md for the pipeline.
//
// The CTAs of a cluster share K: rank r holds the activations of its share in shared memory for its whole life and
// multiplies that share of every strip of the cluster. Roles: groups of four warps, each with a strip of its own, and one
// producer thread that keeps the ring of weight blocks full, in the order in which the groups want them. When a group
// has finished its share of a strip, every thread sends its sums to the ranks that own them (asynchronous stores into
// their inbox); each rank adds the shares of its part of the strip in rank order: no atomics, the same bytes every run.

#include "cuda/mma_sums.cuh"

namespace fptq::cuda {
namespace {

template <int kTokens>
struct StreamShape {
  static constexpr int kGroups = plan::StreamGroups(kTokens);
  static constexpr int kConsumerThreads = kGroups * kGroupThreads;
  static constexpr int kThreads = kConsumerThreads + 32;
  static constexpr int kPairs = kTokens * kStripN / 2;  // of neighbouring channels in a strip's tile
};

template <int kTokens>
class StreamCta {
  using Shape = StreamShape<kTokens>;

 public:
  __device__ StreamCta(const MatMulArguments& args, uint8_t* shared_memory)
      : args(args), split(args.split), rank(static_cast<int>(blockIdx.x) % split),
        work(plan::StreamWork::Of(static_cast<int>(args.weights.layout.strips), static_cast<int>(blockIdx.x) / split,
                                  static_cast<int>(gridDim.x) / split)),
        blocks(plan::Share(static_cast<int>(args.weights.layout.k_blocks), rank, split)),
        first_row(static_cast<int>(blockIdx.y) * kTokens), shared(shared_memory),
        memory(plan::StreamMemory::Of(
            kTokens, static_cast<int>(packing::CeilDiv(args.weights.layout.k_blocks, split)), args.stages,
            args.weights.BlockScaleBytes())),
        full(reinterpret_cast<uint64_t*>(shared + memory.barriers)), empty(full + args.stages),
        received(empty + args.stages), activations(received + 2 * Shape::kGroups) {}

  const MatMulArguments& args;
  int split, rank;
  plan::StreamWork work;
  plan::Range blocks;
  int first_row;
  uint8_t* shared;
  plan::StreamMemory memory;
  uint64_t *full, *empty;  ///< [stages]
  uint64_t* received;      ///< [groups][2]: a round's sums are in the inbox
  uint64_t* activations;
};

/// Position in the ring: stage and the parity of its barriers.
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void Advance(int by, int stages) {
    stage += by;
    if (stage >= stages) {
      stage -= stages;
      parity ^= 1;
    }
  }
};

/// One thread: weights first, which are constants, then the activations, once the kernels ahead have written them.
template <int kTokens>
__device__ __forceinline__ void Produce(const StreamCta<kTokens>& cta, const CUtensorMap& map) {
  using Shape = StreamShape<kTokens>;
  const WeightView& w = cta.args.weights;
  const packing::Layout& layout = w.layout;
  const int stages = cta.args.stages;
  const int scale_bytes = cta.memory.scale_bytes;
  const int row_bytes = kStripN * w.ScaleBytes();
  const int64_t strip_bytes = layout.k_blocks * kBlockBytes;
  const int64_t strip_scale_bytes = layout.scale_rows * row_bytes;
  const uint64_t policy = ptx::EvictFirstPolicy();
  int ahead = stages;  // blocks to ask for before the activations
  const auto load_activations = [&] {
    ptx::WaitForPredecessors();
    const int count = cta.blocks.end - cta.blocks.begin;
    ptx::BarrierArriveExpect(cta.activations, static_cast<uint32_t>(count * cta.memory.tile_bytes));
    const uint64_t keep = ptx::EvictLastPolicy();
    for (int i = 0; i < count; ++i) {
      ptx::BulkCopyTile(cta.shared + i * cta.memory.tile_bytes, &map, (cta.blocks.begin + i) * kBlockK, cta.first_row,
                        cta.activations, keep);
    }
  };
  RingPosition at;
  for (int round = 0; round < cta.work.Rounds(Shape::kGroups); ++round) {
    const int active = cta.work.Active(round, Shape::kGroups);
    const int strip = cta.work.strips.begin + round * Shape::kGroups;
    const uint8_t* blocks = w.blocks + layout.BlockOffset(strip, 0);
    const uint8_t* scales = static_cast<const uint8_t*>(w.scales) + strip * strip_scale_bytes;
    for (int block = cta.blocks.begin; block < cta.blocks.end; ++block) {
      const uint8_t* from = blocks + int64_t{block} * kBlockBytes;
      const uint8_t* scales_from = scales + layout.FirstScaleRow(block) * row_bytes;
      for (int group = 0; group < active; ++group) {
        if (ahead-- == 0) load_activations();
        uint64_t* full = cta.full + at.stage;
        ptx::BarrierWait(cta.empty + at.stage, at.parity ^ 1);
        ptx::BarrierArriveExpect(full, static_cast<uint32_t>(kBlockBytes + scale_bytes));
        ptx::BulkCopy(cta.shared + cta.memory.weights + at.stage * kBlockBytes, from, kBlockBytes, full, policy);
        ptx::BulkCopy(cta.shared + cta.memory.scales + at.stage * scale_bytes, scales_from,
                      static_cast<uint32_t>(scale_bytes), full, policy);
        from += strip_bytes;
        scales_from += strip_scale_bytes;
        at.Advance(1, stages);
      }
    }
  }
  if (ahead >= 0) load_activations();
}

template <class T, Encoding kEncoding, int kTokens>
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

  MmaSums<T, kEncoding, kTokens> sums;
  RingPosition at;
  at.Advance(group, cta.args.stages);
  for (int round = 0; round < cta.work.Rounds(Shape::kGroups); ++round) {
    const int active = cta.work.Active(round, Shape::kGroups);
    if (group >= active) break;
    // This round's inbox: the sums of all ranks for this rank's pairs of the strip.
    uint2* slots = inbox + round % 2 * Shape::kPairs;
    if (thread == 0) ptx::BarrierArriveExpect(received + round % 2, static_cast<uint32_t>(Shape::kPairs * 8));
    sums.Clear();
    if (round == 0) ptx::BarrierWait(cta.activations, 0);
    for (int i = 0; i < cta.blocks.end - cta.blocks.begin; ++i) {
      ptx::BarrierWait(cta.full + at.stage, at.parity);
      sums.Add(cta.shared + memory.weights + at.stage * kBlockBytes,
               cta.shared + memory.scales + at.stage * memory.scale_bytes, cta.shared + i * memory.tile_bytes, layout);
      __syncwarp();
      if (thread % 32 == 0) ptx::BarrierArrive(cta.empty + at.stage);
      at.Advance(active, cta.args.stages);
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
    const Epilogue<T, kEncoding> epilogue(cta.args, n, kMmaCentre);
    ptx::BarrierWait(received + round % 2, round / 2 & 1);
    for (int i = thread; i < share; i += kGroupThreads) {
      uint2 sum = slots[i];
      for (int r = 1; r < cta.split; ++r) sum = AddSums<kEncoding>(sum, slots[r * share + i]);
      const int q = (mine + i) / kGroupThreads;
      epilogue.Store(cta.first_row + q / 2 * 8 + (mine + i) % 4 * 2 + q % 2, sum);
    }
  }
}

template <class T, Encoding kEncoding, int kTokens>
__global__ void __launch_bounds__(StreamShape<kTokens>::kThreads, kTokens <= 32 ? 2 : 1)
    StreamKernel(const __grid_constant__ MatMulArguments args, const __grid_constant__ CUtensorMap map) {
#if __CUDA_ARCH__ >= 900
  using Shape = StreamShape<kTokens>;
  extern __shared__ __align__(1024) uint8_t shared[];
  const StreamCta<kTokens> cta(args, shared);
  const bool producer = threadIdx.x == Shape::kConsumerThreads;
  if (producer) {
    ptx::PrefetchTensorMap(&map);
    for (int stage = 0; stage < args.stages; ++stage) {
      ptx::BarrierInit(cta.full + stage, 1);
      ptx::BarrierInit(cta.empty + stage, kGroupThreads / 32);
    }
    for (int i = 0; i < 2 * Shape::kGroups; ++i) ptx::BarrierInit(cta.received + i, 1);
    ptx::BarrierInit(cta.activations, 1);
    ptx::BarrierInitFence();
  }
  __syncthreads();
  ptx::AllowSuccessors();
  ptx::ClusterArriveRelaxed();
  if (producer) Produce(cta, map);
  __syncwarp();
  ptx::ClusterWait();  // the other ranks' barriers are ready
  if (threadIdx.x < Shape::kConsumerThreads) Consume<T, kEncoding, kTokens>(cta);
#endif
}

template <class T, Encoding kEncoding, int kTokens>
void LaunchStreamKernel(const Device& device, const MatMulArguments& args, const Plan& plan, Stream stream) {
  const packing::Layout& layout = args.weights.layout;
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(plan.config.clusters * args.split),
                    static_cast<unsigned>(packing::CeilDiv(args.call.m, kTokens)));
  shape.threads = StreamShape<kTokens>::kThreads;
  shape.shared_bytes = plan::StreamMemory::Of(kTokens, static_cast<int>(packing::CeilDiv(layout.k_blocks, args.split)),
                                              args.stages, args.weights.BlockScaleBytes())
                           .total;
  shape.cluster = args.split;
  shape.overlap = plan.overlap;
  const CUtensorMap map = ActivationMap(device, args.call, layout.k, kTokens);
  Launch(StreamKernel<T, kEncoding, kTokens>, shape, stream, args, map);
}

template <class T, Encoding kEncoding>
void LaunchStreamOf(const Device& device, const MatMulArguments& args, const Plan& plan, Stream stream) {
  switch (plan.config.tile_m) {
    case 8:
      return LaunchStreamKernel<T, kEncoding, 8>(device, args, plan, stream);
    case 16:
      return LaunchStreamKernel<T, kEncoding, 16>(device, args, plan, stream);
    case 32:
      return LaunchStreamKernel<T, kEncoding, 32>(device, args, plan, stream);
    case 64:
      return LaunchStreamKernel<T, kEncoding, 64>(device, args, plan, stream);
    default:
      throw CudaError("the streaming kernel has no tile of " + std::to_string(plan.config.tile_m) + " tokens");
  }
}

}  // namespace

void LaunchStream(const Device& device, const MatMulArguments& args, const Plan& plan, Stream stream) {
  ForType(args.weights.type, [&](auto zero) {
    using T = decltype(zero);
    if (args.weights.encoding == Encoding::kInteger) {
      LaunchStreamOf<T, Encoding::kInteger>(device, args, plan, stream);
    } else {
      LaunchStreamOf<T, Encoding::kFloat>(device, args, plan, stream);
    }
  });
}

}  // namespace fptq::cuda
