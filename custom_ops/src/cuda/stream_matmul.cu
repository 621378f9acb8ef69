// Small M on sm_90 and newer: weights stream once from device memory through shared memory into mma.m16n8k32, weights
// as its 16-row operand and tokens as the 8-column one. See README.md for the pipeline.
//
// The CTAs of a cluster share K: each holds the activations of its share in shared memory for its whole life and
// multiplies that share of every strip of the cluster. Roles: groups of four warps, in teams that share a span of
// strips (tile_plan.h), and a producer warp for each group that keeps its ring of weights full. When a group has
// finished its share of a span, every thread sends its sums to the groups that own them (asynchronous stores into their
// inbox); each adds the shares of its part of the span in the order of contributors: no atomics, the same bytes every
// run.

#include "cuda/mma_sums.cuh"

namespace fptq::cuda {
namespace {

template <int kTokens, plan::StreamForm kForm>
struct StreamShape {
  static constexpr int kGroups = plan::StreamGroups(kForm);
  static constexpr int kStrips = plan::StreamStrips(kForm);
  static constexpr int kChunk = plan::StreamChunk(kForm);
  static constexpr int kBlocksAtOnce = plan::StreamBlocksAtOnce(kForm);
  static constexpr int kConsumerThreads = kGroups * kGroupThreads;
  static constexpr int kConsumerWarps = kConsumerThreads / 32;
  static constexpr int kThreads = kConsumerThreads + 32 * kGroups;
  // Two groups of few tokens leave registers for a small kernel beside them: at most 144 a thread.
  static constexpr int kLaunchBound = kTokens <= 16 && kGroups == 2 ? 448 : kThreads;
  static constexpr int kStripPairs = kTokens * kStripN / 2;  // of neighbouring channels in a strip's tile
  static constexpr int kPairs = kStrips * kStripPairs;       // in a span's
};

template <int kTokens, plan::StreamForm kForm>
class StreamCta {
  using Shape = StreamShape<kTokens, kForm>;

 public:
  __device__ StreamCta(const MatMulArguments& args, uint8_t* shared_memory)
      : args(args),
        rank(static_cast<int>(blockIdx.x) & (args.split - 1)),
        depth(args.stages / Shape::kGroups),
        work(plan::StreamWork::Of(kForm, Strips(), args.log_parts)),
        first_row(static_cast<int>(blockIdx.y) * kTokens),
        shared(shared_memory),
        memory(plan::StreamMemory::Of(kTokens, kForm, (KBlocks() + args.split - 1) >> args.log_split, args.stages,
                                      args.inboxes, args.weights.layout.block_stride)),
        full(reinterpret_cast<uint64_t*>(shared + memory.barriers)),
        empty(full + args.stages),
        received(empty + args.stages),
        activations(received + 2 * Shape::kGroups) {}

  __device__ int KBlocks() const { return static_cast<int>(args.weights.layout.k_blocks); }
  /// Strips of this cluster.
  __device__ plan::Range Strips() const {
    const int cluster = static_cast<int>(blockIdx.x) >> args.log_split;
    const int begin = cluster * args.cluster_strips + min(cluster, args.longer);
    return {begin, begin + args.cluster_strips + (cluster < args.longer ? 1 : 0)};
  }
  /// This CTA's share of K, and one group's.
  __device__ plan::Range Blocks() const { return plan::ShareOfPower(KBlocks(), rank, args.log_split); }
  __device__ plan::Range BlocksOf(int group) const {
    return plan::StreamBlocks(KBlocks(), rank, args.log_split, group & ((1 << args.log_parts) - 1), args.log_parts);
  }
  __device__ int TeamOf(int group) const { return group >> args.log_parts; }
  /// Stage `stage` of a group's ring, and its place among all stages.
  __device__ int StageOf(int group, int stage) const { return group * depth + stage; }
  __device__ int StageBytes() const { return Shape::kStrips * memory.chunk_bytes; }

  const MatMulArguments& args;
  int rank;
  int depth;  ///< stages of one group's ring
  plan::StreamWork work;
  int first_row;
  uint8_t* shared;
  plan::StreamMemory memory;
  uint64_t *full, *empty;  ///< [groups][depth]
  uint64_t* received;      ///< [groups][2]: a round's sums are in the inbox
  uint64_t* activations;
};

/// One thread per group. Weights are constants: they are asked for before the kernels ahead have finished.
template <int kTokens, plan::StreamForm kForm>
__device__ __forceinline__ void Produce(const StreamCta<kTokens, kForm>& cta, int group) {
  using Shape = StreamShape<kTokens, kForm>;
  const WeightView& w = cta.args.weights;
  const packing::Layout& layout = w.layout;
  const plan::Range blocks = cta.BlocksOf(group);
  const uint64_t policy = ptx::EvictFirstPolicy();
  int until_prefetch = cta.depth;  // chunks of the first filling
  RingPosition at;
  for (int round = 0; round < cta.work.Rounds(); ++round) {
    const plan::Range strips = cta.work.Strips(round, cta.TeamOf(group));
    for (int block = blocks.begin; strips.begin < strips.end && block < blocks.end; block += Shape::kChunk) {
      const int stage = cta.StageOf(group, at.stage);
      const int bytes = min(Shape::kChunk, blocks.end - block) * layout.block_stride;
      if (until_prefetch-- == 0) {  // the ring is full: the rest of the span into L2
        const int ahead = min((blocks.end - block) * layout.block_stride,
                              cta.args.prefetch_bytes / (Shape::kGroups * Shape::kStrips));
        for (int strip = strips.begin; strip < strips.end && ahead > 0; ++strip) {
          ptx::BulkPrefetch(w.blocks + layout.BlockOffset(strip, block), static_cast<uint32_t>(ahead));
        }
      }
      ptx::BarrierWait(cta.empty + stage, at.parity ^ 1);
      ptx::BarrierArriveExpect(cta.full + stage, static_cast<uint32_t>((strips.end - strips.begin) * bytes));
      uint8_t* to = cta.shared + cta.memory.weights + stage * cta.StageBytes();
      for (int strip = strips.begin; strip < strips.end; ++strip, to += cta.memory.chunk_bytes) {
        ptx::BulkCopy(to, w.blocks + layout.BlockOffset(strip, block), static_cast<uint32_t>(bytes), cta.full + stage,
                      policy);
      }
      at.Advance(cta.depth);
    }
  }
}

/// The activations of the CTA's share of K, once the kernels ahead have written them: one thread of each consumer warp
/// asks for its part, because a request takes a thread about 200 clocks.
template <int kTokens, plan::StreamForm kForm>
__device__ __forceinline__ void LoadActivations(const StreamCta<kTokens, kForm>& cta, const CUtensorMap& map) {
  using Shape = StreamShape<kTokens, kForm>;
  ptx::WaitForPredecessors();
  if (threadIdx.x % 32 != 0) return;
  const plan::Range blocks = cta.Blocks();
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const plan::Range mine = plan::Share(blocks.end - blocks.begin, warp, Shape::kConsumerWarps);
  ptx::BarrierArriveExpect(cta.activations, static_cast<uint32_t>((mine.end - mine.begin) * cta.memory.tile_bytes));
  const uint64_t keep = ptx::EvictLastPolicy();
#pragma unroll 1
  for (int i = mine.begin; i < mine.end; ++i) {
    ptx::BulkCopyTile(cta.shared + i * cta.memory.tile_bytes, &map, (blocks.begin + i) * kBlockK, cta.first_row,
                      cta.activations, keep);
  }
}

template <class T, Promotion kPromotion, int kTokens, plan::StreamForm kForm>
__device__ __forceinline__ void Consume(const StreamCta<kTokens, kForm>& cta) {
  using Shape = StreamShape<kTokens, kForm>;
  constexpr Encoding kEncoding = EncodingOf(kPromotion);
  constexpr int kLogPairs = plan::LogOfPower(Shape::kPairs);
  const packing::Layout& layout = cta.args.weights.layout;
  const plan::StreamMemory& memory = cta.memory;
  const int group = static_cast<int>(threadIdx.x) / kGroupThreads;
  const int thread = static_cast<int>(threadIdx.x) % kGroupThreads;
  const int log_contributors = cta.args.log_split + cta.args.log_parts;
  const int part = group & ((1 << cta.args.log_parts) - 1);
  const int contributor = (cta.rank << cta.args.log_parts) + part;
  const int log_share = kLogPairs - log_contributors;  // pairs of a span that each contributor owns
  const int share = 1 << log_share;
  const int mine = contributor << log_share;  // all of one strip: there are at least as many owners as strips
  const int team_group = group - part;        // first group of the team
  const int inbox_bytes = cta.args.inboxes * memory.inbox_bytes;
  const uint32_t base = ptx::SharedAddress(cta.shared);
  const plan::Range blocks = cta.BlocksOf(group);
  uint64_t* received = cta.received + 2 * group;
  if (cta.args.call.per_token && thread < kTokens && cta.first_row + thread < cta.args.call.m) {
    ptx::PrefetchLine(cta.args.call.a_scale + cta.first_row + thread);
  }

  MmaSums<T, kPromotion, kTokens, Shape::kStrips, Shape::kBlocksAtOnce> sums;
  int end = blocks.end, chunk_bytes = memory.chunk_bytes;
  uint32_t ring = base + memory.weights + cta.StageOf(group, 0) * cta.StageBytes();
  ptx::Keep(end), ptx::Keep(chunk_bytes), ptx::Keep(ring);
  RingPosition at;
  for (int round = 0; round < cta.work.Rounds(); ++round) {
    const plan::Range strips = cta.work.Strips(round, cta.TeamOf(group));
    if (strips.begin >= strips.end) break;
    // This round's inbox: the sums of all contributors for this group's pairs of the span.
    const int buffer = round % 2;
    const int inbox = memory.inbox + (round & (cta.args.inboxes - 1)) * memory.inbox_bytes;
    if (thread == 0) ptx::BarrierArriveExpect(received + buffer, static_cast<uint32_t>(Shape::kPairs * 8));
    // What the results need besides the sums comes from device memory, and is asked for while the sums are made.
    const int strip = strips.begin + mine / Shape::kStripPairs;
    const int64_t n = int64_t{strip} * kStripN + packing::ThreadChannel((mine + thread) % kGroupThreads);
    const bool is_mine = thread < share && strip < strips.end;
    const Epilogue<T, kEncoding> epilogue(cta.args, is_mine ? n : 0);
    const auto row_of = [&](int i) {  // row of A of the i-th pair of this contributor
      const int q = (mine + i) % Shape::kStripPairs / kGroupThreads;
      return cta.first_row + q / 2 * 8 + (mine + i) % 4 * 2 + q % 2;
    };
    // Where registers allow it, as early as possible: it would be the last thing to wait for.
    constexpr bool kEarlyScale = kTokens <= 8 || Shape::kGroups == 2;
    const float first_scale = kEarlyScale && is_mine ? epilogue.Scale(row_of(thread)) : 0.0f;
    sums.Clear();
    if (round == 0) ptx::BarrierWait(cta.activations, 0);
    uint32_t tile = base + (blocks.begin - cta.Blocks().begin) * memory.tile_bytes;
    for (int block = blocks.begin; block < end; block += Shape::kChunk) {
      const int stage = cta.StageOf(group, at.stage);
      const uint32_t weights = ring + at.stage * (Shape::kStrips * chunk_bytes);
      ptx::BarrierWait(cta.full + stage, at.parity);
      const int count = Shape::kChunk == 1 ? 1 : min(Shape::kChunk, end - block);
      int i = 0;
      if constexpr (Shape::kBlocksAtOnce > 1) {
        static_assert(Shape::kChunk == Shape::kBlocksAtOnce);
        if (count == Shape::kChunk) {
          sums.template Add<Shape::kBlocksAtOnce>(weights, chunk_bytes, tile, layout);
          i = count, tile += count * memory.tile_bytes;
        }
      }
#pragma unroll 1
      for (; i < count; ++i, tile += memory.tile_bytes) {
        sums.Add(weights + i * layout.block_stride, chunk_bytes, tile, layout);
      }
      __syncwarp();
      if (thread % 32 == 0) ptx::BarrierArrive(cta.empty + stage);
      at.Advance(cta.depth);
    }

#pragma unroll
    for (int s = 0; s < Shape::kStrips; ++s) {
#pragma unroll
      for (int q = 0; q < kTokens / 4; ++q) {
        const int pair = s * Shape::kStripPairs + q * kGroupThreads + thread;
        const int owner = pair >> log_share;
        const int owner_group = team_group + (owner & ((1 << cta.args.log_parts) - 1));
        const int slot = (contributor << log_share) + (pair & (share - 1));
        ptx::StoreClusterAsync(base + inbox + owner_group * inbox_bytes + slot * static_cast<int>(sizeof(uint2)),
                               sums.Pair(s, q / 2, q % 2), cta.received + 2 * owner_group + buffer,
                               static_cast<uint32_t>(owner >> cta.args.log_parts));
      }
    }
    const uint2* slots = reinterpret_cast<const uint2*>(cta.shared + inbox + group * inbox_bytes);
    ptx::BarrierWait(received + buffer, round / 2 & 1);
    for (int i = thread; is_mine && i < share; i += kGroupThreads) {
      uint2 sum = slots[i];
      for (int r = 1; r < 1 << log_contributors; ++r) sum = AddSums<kEncoding>(sum, slots[(r << log_share) + i]);
      const int m = row_of(i);
      epilogue.Store(m, sum, kEarlyScale && i == thread ? first_scale : epilogue.Scale(m));
    }
  }
}

template <class T, Promotion kPromotion, int kTokens, plan::StreamForm kForm>
__global__ void __launch_bounds__(StreamShape<kTokens, kForm>::kLaunchBound, 1)
    StreamKernel(const __grid_constant__ MatMulArguments args, const __grid_constant__ CUtensorMap map) {
#if __CUDA_ARCH__ >= 900
  using Shape = StreamShape<kTokens, kForm>;
  extern __shared__ __align__(1024) uint8_t shared[];
  const StreamCta<kTokens, kForm> cta(args, shared);
  const int producer = (static_cast<int>(threadIdx.x) - Shape::kConsumerThreads) / 32;  // below 0 for consumers
  if (threadIdx.x % 32 == 0) {  // initialisations of one warp follow each other, whatever its lanes
    if (threadIdx.x == 0) ptx::PrefetchTensorMap(&map);
    for (int i = static_cast<int>(threadIdx.x) / 32; i < cta.memory.barrier_count; i += Shape::kThreads / 32) {
      const bool is_empty = i >= args.stages && i < 2 * args.stages;
      const bool is_activations = i == cta.memory.barrier_count - 1;
      ptx::BarrierInit(cta.full + i, is_empty ? kGroupThreads / 32 : is_activations ? Shape::kConsumerWarps : 1);
    }
    ptx::BarrierInitFence();
  }
  __syncthreads();
  ptx::AllowSuccessors();
  ptx::ClusterArriveRelaxed();
  if (threadIdx.x >= Shape::kConsumerThreads) {
    if (threadIdx.x % 32 == 0) Produce(cta, producer);
  } else {
    LoadActivations(cta, map);
  }
  __syncwarp();
  ptx::ClusterWait();  // the other ranks' barriers are ready
  if (threadIdx.x < Shape::kConsumerThreads) Consume<T, kPromotion>(cta);
#endif
}

template <class T, Promotion kPromotion, int kTokens, plan::StreamForm kForm>
void LaunchStreamKernel(const Device& device, MatMulArguments args, const Plan& plan, Stream stream) {
  const packing::Layout& layout = args.weights.layout;
  args.log_split = plan::LogOfPower(args.split);
  args.log_parts = plan::LogOfPower(plan.config.parts);
  args.inboxes = plan.config.inboxes;
  args.cluster_strips = static_cast<int>(layout.strips / plan.config.clusters);
  args.longer = static_cast<int>(layout.strips % plan.config.clusters);
  args.prefetch_bytes = plan::StreamPrefetch(kTokens, layout.WeightBytes());
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(plan.config.clusters * args.split),
                    static_cast<unsigned>(packing::CeilDiv(args.call.m, kTokens)));
  shape.threads = StreamShape<kTokens, kForm>::kThreads;
  shape.shared_bytes =
      plan::StreamMemory::Of(kTokens, kForm, static_cast<int>(packing::CeilDiv(layout.k_blocks, args.split)),
                             args.stages, args.inboxes, layout.block_stride)
          .total;
  shape.cluster = args.split;
  shape.overlap = plan.overlap;
  const CUtensorMap map = ActivationMap(device, args.call, layout.k, kTokens);
  Launch(StreamKernel<T, kPromotion, kTokens, kForm>, shape, stream, args, map);
}

template <Promotion kPromotion>
inline constexpr plan::StreamScales kScalesOf = {kPromotion == Promotion::kBlock || kPromotion == Promotion::kInteger,
                                                 kPromotion == Promotion::kBlock};

template <class T, Promotion kPromotion, int kTokens>
void LaunchStreamForm(const Device& device, const MatMulArguments& args, const Plan& plan, Stream stream) {
  using Form = plan::StreamForm;
  const auto launch = [&](auto form) {
    constexpr Form kForm = decltype(form)::value;
    if constexpr (plan::HasStreamForm(kForm, kTokens, kScalesOf<kPromotion>)) {
      LaunchStreamKernel<T, kPromotion, kTokens, kForm>(device, args, plan, stream);
    } else {
      throw CudaError("the streaming kernel has no such form for these weights");
    }
  };
  switch (plan.config.form) {
    case Form::kMany:
      return launch(std::integral_constant<Form, Form::kMany>{});
    case Form::kWide:
      return launch(std::integral_constant<Form, Form::kWide>{});
    case Form::kPaired:
      return launch(std::integral_constant<Form, Form::kPaired>{});
    case Form::kTall:
      return launch(std::integral_constant<Form, Form::kTall>{});
  }
}

template <class T, Promotion kPromotion>
void LaunchStreamOf(const Device& device, const MatMulArguments& args, const Plan& plan, Stream stream) {
  switch (plan.config.tile_m) {
    case 8:
      return LaunchStreamForm<T, kPromotion, 8>(device, args, plan, stream);
    case 16:
      return LaunchStreamForm<T, kPromotion, 16>(device, args, plan, stream);
    case 32:
      return LaunchStreamForm<T, kPromotion, 32>(device, args, plan, stream);
    case 64:
      return LaunchStreamForm<T, kPromotion, 64>(device, args, plan, stream);
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
  const auto kernel = StreamKernel<__half, Promotion::kBlock, 8, plan::StreamForm::kWide>;
  Check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.max_shared_bytes),
        "cudaFuncSetAttribute");
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(size), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(device.multiprocessors / size * size));
  config.blockDim = dim3(StreamShape<8, plan::StreamForm::kWide>::kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(device.max_shared_bytes);
  config.attrs = &cluster;
  config.numAttrs = 1;
  int count = 0;
  Check(cudaOccupancyMaxActiveClusters(&count, kernel, &config), "cudaOccupancyMaxActiveClusters");
  return count;
}

}  // namespace fptq::cuda
