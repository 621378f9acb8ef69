// Small M on sm_90 and newer: weights stream once from device memory through shared memory into mma.m16n8k32, weights
// as its 16-row operand and tokens as the 8-column one. See README.md for the pipeline.
//
// The CTAs of a cluster share K: each holds the activations of its share in shared memory for its whole life and
// multiplies that share of every strip of the cluster. Roles: groups of four warps, in teams that share a span of
// strips (tile_plan.h), and a producer warp for each group that keeps its ring of weights full. When a group has
// finished its share of a span, every thread sends its sums to the groups that own them (asynchronous stores into their
// inbox); each adds the shares of its part of the span in the order of contributors: no atomics, the same bytes every
// run.
//
// Activations are uint8 and come by bulk copies (Source: the tensor map) or, up to eight tokens, by copies of all
// threads (ByteActivations). Or they are of type T and each CTA quantizes its share of them (FloatActivations): then
// the CTAs of a cluster exchange the largest magnitudes of the rows.
#ifndef FPTQ_CUDA_STREAM_KERNEL_CUH_
#define FPTQ_CUDA_STREAM_KERNEL_CUH_

#include "cuda/mma_sums.cuh"
#include "cuda/quantizer.cuh"

namespace fptq::cuda {

/// Activations T [m, k] that the kernel quantizes per token, m at most one tile.
struct FloatActivations {
  const void* x;
  int log_slices;  ///< a token is divided among that many warps, as a power of two
};

/// Activations uint8 where MatMulCall says, without a tensor map.
struct ByteActivations {};

template <int kTokens, plan::StreamForm kForm>
struct StreamShape {
  static constexpr int kGroups = plan::StreamGroups(kForm);
  static constexpr int kStrips = plan::StreamStrips(kForm);
  static constexpr int kChunk = plan::StreamChunk(kForm);
  static constexpr int kBlocksAtOnce = plan::StreamBlocksAtOnce(kForm);
  static constexpr int kConsumerThreads = kGroups * kGroupThreads;
  static constexpr int kConsumerWarps = kConsumerThreads / 32;
  static constexpr int kThreads = kConsumerThreads + 32 * kGroups;
  // Two groups of few tokens leave registers for a small kernel beside them, which quantizes: at most 144 a thread.
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
        memory(args.memory),
        rank(static_cast<int>(blockIdx.x) & ((1 << args.log_split) - 1)),
        depth(args.depth),
        work(plan::StreamWork::Of(kForm, Strips(), args.log_parts)),
        first_row(static_cast<int>(blockIdx.y) * kTokens),
        shared(shared_memory),
        full(reinterpret_cast<uint64_t*>(shared + memory.barriers)),
        empty(full + args.stages),
        received(empty + args.stages),
        activations(received + 2 * Shape::kGroups),
        magnitudes(activations + 1) {}

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
  /// [tokens]: scales of the rows.
  __device__ float* Scales() const { return reinterpret_cast<float*>(shared + memory.scales); }
  __device__ int StageBytes() const { return args.stage_bytes; }

  const MatMulArguments& args;
  const plan::StreamMemory& memory;
  int rank;
  int depth;  ///< stages of one group's ring
  plan::StreamWork work;
  int first_row;
  uint8_t* shared;
  uint64_t *full, *empty;  ///< [groups][depth]
  uint64_t* received;      ///< [groups][2]: a round's sums are in the inbox
  uint64_t* activations;
  uint64_t* magnitudes;  ///< all of the rows' largest magnitudes have arrived
};

// Barriers of threads. Of the whole CTA, where one side only arrives: producers have initialised the mbarriers `full`,
// consumers all others. Of the consumers; of each group.
enum class ThreadBarrier : int { kFullReady = 0, kOthersReady = 1, kConsumers = 2, kGroups = 3 };
__device__ __forceinline__ void ArriveAt(ThreadBarrier barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(static_cast<int>(barrier)), "r"(threads) : "memory");
}
__device__ __forceinline__ void WaitAt(ThreadBarrier barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(static_cast<int>(barrier)), "r"(threads) : "memory");
}
__device__ __forceinline__ void WaitForGroup(int group) {
  asm volatile("bar.sync %0, %1;" ::"r"(static_cast<int>(ThreadBarrier::kGroups) + group), "n"(kGroupThreads)
               : "memory");
}

/// A producer warp, which fills the ring of its group. Weights are constants: they are asked for before the kernels
/// ahead have finished, and the first of them before anything else is done.
template <int kTokens, plan::StreamForm kForm>
__device__ __forceinline__ void Produce(const StreamCta<kTokens, kForm>& cta, int group) {
  using Shape = StreamShape<kTokens, kForm>;
  const bool asks = threadIdx.x % 32 == 0;
  const int stride = cta.args.weights.layout.block_stride;
  const int chunk_bytes = cta.memory.chunk_bytes;
  const int64_t strip_bytes = cta.args.strip_bytes;
  const plan::Range blocks = cta.BlocksOf(group);
  uint64_t* const full = cta.full + cta.StageOf(group, 0);
  uint64_t* const empty = cta.empty + cta.StageOf(group, 0);
  const uint32_t ring = ptx::SharedAddress(cta.shared) + cta.memory.weights + cta.StageOf(group, 0) * cta.StageBytes();
  const uint64_t policy = ptx::EvictFirstPolicy();
  const int window = cta.args.window;
  int round = 0, asked = 0;       // rounds and chunks that have been begun
  int count = 0, left = 0;        // strips of the span, and bytes of each that have not been asked for
  const uint8_t* from = nullptr;  // the first of these
  RingPosition at;
  bool first_lap = true, met = false;
#pragma unroll 1
  while (true) {
    if (left <= 0 && round < cta.work.Rounds()) {
      const plan::Range strips = cta.work.Strips(round++, cta.TeamOf(group));
      count = strips.end - strips.begin;
      from = cta.args.weights.blocks + strips.begin * strip_bytes + blocks.begin * stride;
      left = count > 0 ? (blocks.end - blocks.begin) * stride : 0;
    }
    // The producer initialises its barriers itself, so that it waits for nobody before it asks: those of the first
    // window one by one, the others when it has asked for that window.
    if (!met && (left <= 0 || asked == window)) {
      met = true;
      if (asks) {
#pragma unroll 1
        for (int stage = window; stage < cta.depth; ++stage) ptx::BarrierInit(full + stage, 1);
        ptx::BarrierInitFence();
      }
      __syncwarp();
      ArriveAt(ThreadBarrier::kFullReady, Shape::kThreads);
      WaitAt(ThreadBarrier::kOthersReady, Shape::kThreads);
    }
    if (left <= 0) break;
    const int bytes = min(chunk_bytes, left);
    if (asks) {
      if (!first_lap) {
        ptx::BarrierWait(empty + at.stage, at.parity ^ 1);
      } else if (at.stage >= window) {
        ptx::BarrierWait(full + at.stage - window, 0);
      } else {
        ptx::BarrierInit(full + at.stage, 1);
        ptx::BarrierInitFence();
      }
      ptx::BarrierArriveExpect(full + at.stage, static_cast<uint32_t>(count * bytes));
      const uint32_t to = ring + at.stage * cta.StageBytes();
      ptx::BulkCopy(to, from, static_cast<uint32_t>(bytes), full + at.stage, policy);
      if (Shape::kStrips == 2 && count == 2) {
        ptx::BulkCopy(to + chunk_bytes, from + strip_bytes, static_cast<uint32_t>(bytes), full + at.stage, policy);
      }
    }
    __syncwarp();
    from += bytes;
    left -= chunk_bytes;
    ++asked;
    at.Advance(cta.depth);
    if (first_lap && at.stage == 0) {  // the ring is full: the rest of the span into L2
      first_lap = false;
      const int ahead = min(left, cta.args.prefetch_bytes);
      if (asks && ahead > 0) {
        ptx::BulkPrefetch(from, static_cast<uint32_t>(ahead));
        if (Shape::kStrips == 2 && count == 2) ptx::BulkPrefetch(from + strip_bytes, static_cast<uint32_t>(ahead));
      }
      __syncwarp();
    }
  }
}

/// Brings the activations of the CTA's share of K, and the scales of its rows, once the kernels ahead have written
/// them: one thread of each consumer warp asks for its part, because a request takes a thread about 200 clocks.
template <class T, int kTokens, plan::StreamForm kForm>
class TileLoader {
  using Shape = StreamShape<kTokens, kForm>;

 public:
  __device__ TileLoader(const StreamCta<kTokens, kForm>& cta, const CUtensorMap& map)
      : cta_(cta), map_(map), policy_(ptx::EvictLastPolicy()) {
    const plan::Range blocks = cta.Blocks();
    const plan::Range mine =
        plan::Share(blocks.end - blocks.begin, static_cast<int>(threadIdx.x) / 32, Shape::kConsumerWarps);
    to_ = ptx::SharedAddress(cta.shared) + mine.begin * cta.memory.tile_bytes;
    column_ = (blocks.begin + mine.begin) * kBlockK;
    count_ = mine.end - mine.begin;
    ptx::Keep(to_), ptx::Keep(column_), ptx::Keep(count_);
  }
  __device__ void Run() {
    ptx::WaitForPredecessors();
    const bool asks = threadIdx.x % 32 == 0;
    if (asks) {
#pragma unroll 1
      for (int i = 0; i < count_; ++i) {
        ptx::BulkCopyTile(to_ + i * cta_.memory.tile_bytes, &map_, column_ + i * kBlockK, cta_.first_row,
                          cta_.activations, policy_);
      }
    }
    const int row = static_cast<int>(threadIdx.x);
    const MatMulCall& call = cta_.args.call;
    if (row < kTokens && cta_.first_row + row < call.m) {
      cta_.Scales()[row] = call.a_scale[call.per_token ? cta_.first_row + row : 0];
    }
    __syncwarp();
    if (asks) {
      ptx::BarrierArriveExpect(cta_.activations, static_cast<uint32_t>(count_ * cta_.memory.tile_bytes));
    }
  }

 private:
  const StreamCta<kTokens, kForm>& cta_;
  const CUtensorMap& map_;
  uint64_t policy_;
  uint32_t to_;
  int column_, count_;  // of the warp's first tile; tiles
};

/// The same for up to eight tokens, by all threads instead of the copy engine: it begins later, and its requests wait
/// behind those for weights. Eight lanes bring a row's part of a block, every kBlocksAtOnce-th block.
template <class T, int kTokens, plan::StreamForm kForm>
class VectorLoader {
  static constexpr int kVectors = kBlockK / 16;  // of a row in a block
  static constexpr int kBlocksAtOnce = StreamShape<kTokens, kForm>::kConsumerThreads / kVectors / kTokens;
  static_assert(kBlocksAtOnce >= 1);

 public:
  __device__ VectorLoader(const StreamCta<kTokens, kForm>& cta, const ByteActivations&) : cta_(cta) {
    const int thread = static_cast<int>(threadIdx.x);
    const int vector = thread % kVectors;
    const int row = thread / kVectors % kTokens;
    const int block = thread / kVectors / kTokens;
    const plan::Range blocks = cta.Blocks();
    const int k = static_cast<int>(cta.args.weights.layout.k);
    const int column = (blocks.begin + block) * kBlockK + vector * 16;
    count_ = cta.first_row + row < cta.args.call.m ? blocks.end - blocks.begin - block : 0;
    inside_ = k - column;
    from_ = cta.args.call.a + int64_t{cta.first_row + row} * k + column;
    to_ = ptx::SharedAddress(cta.shared) + block * cta.memory.tile_bytes + packing::SwizzledOffset(row, vector);
    ptx::Keep(to_), ptx::Keep(count_), ptx::Keep(inside_);
  }
  __device__ void Run() {
    ptx::WaitForPredecessors();
    const MatMulCall& call = cta_.args.call;
    const int row = static_cast<int>(threadIdx.x);
    float scale = 0.0f;
    if (row < kTokens && cta_.first_row + row < call.m) scale = call.a_scale[call.per_token ? cta_.first_row + row : 0];
#pragma unroll 4
    for (int i = 0; i < count_; i += kBlocksAtOnce) {
      const bool inside = i * kBlockK < inside_;
      ptx::CopyAsync16(to_ + i * cta_.memory.tile_bytes, inside ? from_ + i * kBlockK : call.a, inside ? 16 : 0);
    }
    ptx::CopyAsyncCommit();
    if (row < kTokens) cta_.Scales()[row] = scale;
    ptx::CopyAsyncWait<0>();
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::BarrierArrive(cta_.activations);
  }

 private:
  const StreamCta<kTokens, kForm>& cta_;
  const uint8_t* from_;
  uint32_t to_;
  int count_, inside_;  // blocks, and bytes of the row, from the thread's first vector on
};

/// The same for activations of type T, of at most plan::kMaxQuantizedBytes in a CTA: a warp quantizes one token, or a
/// slice of one. Columns of the tile that have no token keep what they hold: no result depends on them.
template <class T, int kTokens, plan::StreamForm kForm>
class ActivationQuantizer {
  using Shape = StreamShape<kTokens, kForm>;
  static constexpr int kBlockVectors = kBlockK / kVector;
  static constexpr int kHeld = plan::StreamHeldVectors(kForm, sizeof(T));

 public:
  __device__ ActivationQuantizer(const StreamCta<kTokens, kForm>& cta, const FloatActivations& source)
      : cta_(cta),
        slice_(plan::StreamSlice::Of(static_cast<int>(threadIdx.x), source.log_slices)),
        log_parts_(source.log_slices + cta.args.log_split) {
    const int k = static_cast<int>(cta.args.weights.layout.k);
    const int first = cta.Blocks().begin * kBlockVectors;
    end_ = cta.Blocks().end * kBlockVectors - first;
    stop_ = min(end_, k / kVector - first);
    x_ = static_cast<const T*>(source.x) + int64_t{slice_.token} * k + (first + slice_.begin) * kVector;
  }

  __device__ void Run() {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const uint32_t exchange = ptx::SharedAddress(cta_.shared) + cta_.memory.exchange;
    const bool has_token = slice_.token < cta_.args.call.m;  // all or none of a warp's lanes
    ptx::WaitForPredecessors();
    if (has_token) {
      RawVector<T> held[kHeld];
#pragma unroll
      for (int j = 0; j < kHeld; ++j) {
        if (slice_.begin + j * slice_.stride < stop_) held[j] = RawVector<T>::Load(x_ + j * slice_.stride * kVector);
      }
      uint32_t magnitude = 0;
#pragma unroll
      for (int j = 0; j < kHeld; ++j) {
        if (slice_.begin + j * slice_.stride >= stop_) break;
        held[j].Raise(magnitude);
      }
      // The largest magnitudes of the token's parts go to all CTAs of the cluster.
      __syncwarp();
      magnitude = __reduce_max_sync(0xFFFFFFFFu, RawVector<T>::Largest(magnitude));
      const int log_split = cta_.args.log_split;
      if (lane < 1 << log_split) {
        ptx::StoreClusterAsync(exchange + slice_.Place(cta_.rank, log_split) * 4, magnitude, cta_.magnitudes,
                               static_cast<uint32_t>(lane));
      }
      ptx::BarrierWait(cta_.magnitudes, 0);
      magnitude = 0;
      for (int part = lane; part < 1 << log_parts_; part += 32) {
        magnitude = max(magnitude, ptx::LoadShared<uint32_t>(exchange + ((slice_.token << log_parts_) + part) * 4));
      }
      magnitude = __reduce_max_sync(0xFFFFFFFFu, magnitude);
      const float scale = RowScale(magnitude);
      if (lane == 0) cta_.Scales()[slice_.token] = scale;  // the slices of a token write the same
      const bool finite = scale == scale;
      const Quantizer<T> quantize(magnitude, scale);
#pragma unroll
      for (int j = 0; j < kHeld; ++j) {
        const int at = slice_.begin + j * slice_.stride;
        if (at >= end_) break;
        float values[kVector];
        held[j].ToFloat(values);
        uint32_t words[2];
        quantize(values, words);
        if (!finite) words[0] = words[1] = kZeroPoints;
        if (at >= stop_) words[0] = words[1] = 0;  // beyond K
        const int in_block = at % kBlockVectors;
        uint8_t* tile = cta_.shared + at / kBlockVectors * cta_.memory.tile_bytes;  // as bulk copies write it
        *reinterpret_cast<uint2*>(tile + packing::SwizzledOffset(slice_.token, in_block / 2) + in_block % 2 * 8) =
            make_uint2(words[0], words[1]);
      }
    }
    __syncwarp();
    if (lane == 0) ptx::BarrierArrive(cta_.activations);
  }

 private:
  const StreamCta<kTokens, kForm>& cta_;
  plan::StreamSlice slice_;
  int log_parts_;   // slices of a token in all CTAs of the cluster, as a power of two
  int end_, stop_;  // vectors of the CTA's share of K; those of them before K ends
  const T* x_;
};

/// The class that brings activations of a kind.
template <class T, int kTokens, plan::StreamForm kForm, class Source>
struct LoaderOf;
template <class T, int kTokens, plan::StreamForm kForm>
struct LoaderOf<T, kTokens, kForm, CUtensorMap> {
  using Type = TileLoader<T, kTokens, kForm>;
};
template <class T, int kTokens, plan::StreamForm kForm>
struct LoaderOf<T, kTokens, kForm, ByteActivations> {
  using Type = VectorLoader<T, kTokens, kForm>;
};
template <class T, int kTokens, plan::StreamForm kForm>
struct LoaderOf<T, kTokens, kForm, FloatActivations> {
  using Type = ActivationQuantizer<T, kTokens, kForm>;
};

/// Which sums a thread sends and adds up. A span's pairs of sums are dealt to its contributors: 2^log_share each.
struct StreamOwnership {
  int group, thread;  ///< the thread's group, and its place there
  int team_group;     ///< first group of the team
  int log_share;
  int mine;  ///< first pair of the group's share, all of one strip: there are at least as many owners as strips

  template <int kPairs>
  __device__ static StreamOwnership Of(const MatMulArguments& args, int rank, int thread_of_cta) {
    StreamOwnership own;
    own.group = thread_of_cta / kGroupThreads;
    own.thread = thread_of_cta % kGroupThreads;
    const int part = own.group & ((1 << args.log_parts) - 1);
    own.team_group = own.group - part;
    own.log_share = plan::LogOfPower(kPairs) - args.log_split - args.log_parts;
    own.mine = ((rank << args.log_parts) + part) << own.log_share;  // contributors count ranks, then parts
    return own;
  }
};

/// A thread of a group. `activations` are brought when all that does not wait for the kernels ahead has been done.
template <class T, Promotion kPromotion, class Activations, int kTokens, plan::StreamForm kForm, class Source>
__device__ __forceinline__ void Consume(const StreamCta<kTokens, kForm>& cta, const Source& source) {
  using Shape = StreamShape<kTokens, kForm>;
  constexpr Encoding kEncoding = EncodingOf(kPromotion);
  const packing::Layout& layout = cta.args.weights.layout;
  const plan::StreamMemory& memory = cta.memory;
  const auto ownership = [&](int thread) { return StreamOwnership::Of<Shape::kPairs>(cta.args, cta.rank, thread); };
  const int group = static_cast<int>(threadIdx.x) / kGroupThreads;
  const uint32_t base = ptx::SharedAddress(cta.shared);
  const plan::Range blocks = cta.BlocksOf(group);

  MmaSums<T, kPromotion, kTokens, Shape::kStrips, Shape::kBlocksAtOnce> sums;
  const int chunk_bytes = memory.chunk_bytes;
  uint32_t ring = base + memory.weights + cta.StageOf(group, 0) * cta.StageBytes();
  ptx::Keep(ring);
  RingPosition at;
  for (int round = 0; round < cta.work.Rounds(); ++round) {
    const plan::Range strips = cta.work.Strips(round, cta.TeamOf(group));
    const bool has_strips = strips.begin < strips.end;
    // This round's inbox: the sums of all contributors for this group's pairs of the span.
    const int buffer = round % 2;
    const int inbox = memory.inbox + (round & (cta.args.inboxes - 1)) * memory.inbox_bytes;
    int this_thread = static_cast<int>(threadIdx.x);
    if constexpr (kTokens == 16 && Shape::kGroups == 4) ptx::Keep(this_thread);  // short of registers, see below
    const StreamOwnership early = ownership(this_thread);
    if (has_strips && early.thread == 0) {
      ptx::BarrierArriveExpect(cta.received + 2 * group + buffer, static_cast<uint32_t>(Shape::kPairs * 8));
    }
    // What the results need besides the sums comes from device memory, and is asked for while the sums are made.
    const int strip = strips.begin + early.mine / Shape::kStripPairs;
    const int n = strip * kStripN + packing::ThreadChannel((early.mine + early.thread) % kGroupThreads);
    const bool is_mine = early.thread < 1 << early.log_share && strip < strips.end;
    Epilogue<T, kEncoding> epilogue(cta.args, is_mine ? n : 0);
    if (round == 0) {
      Activations(cta, source).Run();
      ptx::BarrierWait(cta.activations, 0);
      WaitAt(ThreadBarrier::kFullReady, Shape::kThreads);
    }
    if (!has_strips) break;
    epilogue.ReadZeroPoint();
    sums.Clear();
    uint32_t tile = base + (blocks.begin - cta.Blocks().begin) * memory.tile_bytes;
    for (int block = blocks.begin; block < blocks.end; block += Shape::kChunk) {
      const uint32_t weights = ring + at.stage * cta.StageBytes();
      ptx::BarrierWait(cta.full + cta.StageOf(group, at.stage), at.parity);
      const int count = Shape::kChunk == 1 ? 1 : min(Shape::kChunk, blocks.end - block);
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
      if (threadIdx.x % 32 == 0) ptx::BarrierArrive(cta.empty + cta.StageOf(group, at.stage));
      at.Advance(cta.depth);
    }

    // A contributor that has this round's sums of the group may send the next but one's into the inbox of the round
    // before: all threads of the group must have read it.
    if (round > 0) WaitForGroup(group);
    int late = static_cast<int>(threadIdx.x);  // opaque: what follows is not worth registers in the loop above
    ptx::Keep(late);
    const StreamOwnership own = ownership(late);
    const int share = 1 << own.log_share;
    const int inbox_bytes = cta.args.inboxes * memory.inbox_bytes;
#pragma unroll
    for (int s = 0; s < Shape::kStrips; ++s) {
#pragma unroll
      for (int q = 0; q < kTokens / 4; ++q) {
        const int pair = s * Shape::kStripPairs + q * kGroupThreads + own.thread;
        const int owner = pair >> own.log_share;
        const int owner_group = own.team_group + (owner & ((1 << cta.args.log_parts) - 1));
        const int slot = own.mine + (pair & (share - 1));
        ptx::StoreClusterAsync(base + inbox + owner_group * inbox_bytes + slot * static_cast<int>(sizeof(uint2)),
                               sums.Pair(s, q / 2, q % 2), cta.received + 2 * owner_group + buffer,
                               static_cast<uint32_t>(owner >> cta.args.log_parts));
      }
    }
    const uint2* slots = reinterpret_cast<const uint2*>(cta.shared + inbox + own.group * inbox_bytes);
    ptx::BarrierWait(cta.received + 2 * own.group + buffer, round / 2 & 1);
    if (!is_mine) continue;
    // A thread's pairs side by side: one after the other, they are a round's last thousand clocks. Integers of 16
    // tokens have no registers for it.
    constexpr int kMost = Shape::kPairs / 2 > kGroupThreads ? Shape::kPairs / 2 / kGroupThreads : 1;
    constexpr int kAtOnce = kTokens == 16 && kEncoding == Encoding::kInteger ? 1 : kMost;
    constexpr int kUnroll = kAtOnce == 1 ? 4 : 1;
#pragma unroll 1
    for (int first = 0; first == 0 || first < share; first += kAtOnce * kGroupThreads) {
      const auto has = [&](int p) { return p == 0 || first + p * kGroupThreads < share; };
      const uint2* from = slots + first + own.thread;
      uint2 total[kAtOnce];
#pragma unroll
      for (int p = 0; p < kAtOnce && has(p); ++p) total[p] = from[p * kGroupThreads];
#pragma unroll kUnroll
      for (int at = share; at < Shape::kPairs; at += share) {
        from += share;
#pragma unroll
        for (int p = 0; p < kAtOnce && has(p); ++p) total[p] = AddSums<kEncoding>(total[p], from[p * kGroupThreads]);
      }
      const int first_pair = own.mine + first + own.thread;
      const int first_q = first_pair % Shape::kStripPairs / kGroupThreads;
#pragma unroll
      for (int p = 0; p < kAtOnce && has(p); ++p) {
        const int q = first_q + p;
        const int row = q / 2 * 8 + first_pair % 4 * 2 + q % 2;
        epilogue.Store(cta.first_row + row, total[p], cta.Scales()[row]);
      }
    }
  }
}

template <class T, Promotion kPromotion, int kTokens, plan::StreamForm kForm, class Source>
__global__ void __launch_bounds__(std::is_same_v<Source, FloatActivations> ? StreamShape<kTokens, kForm>::kThreads
                                                                           : StreamShape<kTokens, kForm>::kLaunchBound,
                                  1)
    StreamKernel(const __grid_constant__ MatMulArguments args, const __grid_constant__ Source source) {
#if __CUDA_ARCH__ >= 900
  using Shape = StreamShape<kTokens, kForm>;
  constexpr bool kQuantizes = std::is_same_v<Source, FloatActivations>;
  constexpr bool kTiles = std::is_same_v<Source, CUtensorMap>;
  extern __shared__ __align__(1024) uint8_t shared[];
  const StreamCta<kTokens, kForm> cta(args, shared);
  if (threadIdx.x >= Shape::kConsumerThreads) {
    ptx::ClusterArriveRelaxed();
    Produce(cta, (static_cast<int>(threadIdx.x) - Shape::kConsumerThreads) / 32);
    return ptx::ClusterWait();
  }
  if (threadIdx.x % 32 == 0) {  // initialisations of one warp follow each other, whatever its lanes
    if constexpr (kTiles) {
      if (threadIdx.x == 0) ptx::PrefetchTensorMap(&source);
    }
#pragma unroll 1
    for (int i = args.stages + static_cast<int>(threadIdx.x) / 32; i < cta.memory.barrier_count;
         i += Shape::kConsumerWarps) {
      const bool is_empty = i < 2 * args.stages;
      const bool is_activations = cta.full + i == cta.activations;
      ptx::BarrierInit(cta.full + i, is_empty ? kGroupThreads / 32 : is_activations ? Shape::kConsumerWarps : 1);
      if constexpr (kQuantizes) {
        if (cta.full + i == cta.magnitudes) {
          const int log_parts = source.log_slices + args.log_split;
          ptx::BarrierArriveExpect(cta.magnitudes, static_cast<uint32_t>(args.call.m << log_parts) * 4);
        }
      }
    }
    ptx::BarrierInitFence();
  }
  __syncwarp();
  ArriveAt(ThreadBarrier::kOthersReady, Shape::kThreads);
  WaitAt(ThreadBarrier::kConsumers, Shape::kConsumerThreads);
  ptx::AllowSuccessors();
  ptx::ClusterArriveRelaxed();
  ptx::ClusterWait();  // the other ranks' barriers are ready
  Consume<T, kPromotion, typename LoaderOf<T, kTokens, kForm, Source>::Type>(cta, source);
#endif
}

/// The launch of a kernel with `Source`; fills what `args` leaves open.
template <class T, Promotion kPromotion, int kTokens, plan::StreamForm kForm, class Source>
void LaunchStreamKernel(const Device& device, MatMulArguments args, const Source& source, const Plan& plan,
                        Stream stream) {
  const packing::Layout& layout = args.weights.layout;
  args.log_split = plan::LogOfPower(args.split);
  args.log_parts = plan::LogOfPower(plan.config.parts);
  args.inboxes = plan.config.inboxes;
  args.cluster_strips = static_cast<int>(layout.strips / plan.config.clusters);
  args.longer = static_cast<int>(layout.strips % plan.config.clusters);
  using Shape = StreamShape<kTokens, kForm>;
  args.prefetch_bytes = plan::StreamPrefetch(kTokens, layout.WeightBytes()) / (Shape::kGroups * Shape::kStrips);
  args.depth = args.stages / Shape::kGroups;
  args.window = std::min(args.depth, plan::StreamWindow(kForm));
  args.strip_bytes = layout.StripBytes();
  args.memory = plan::StreamMemory::Of(kTokens, kForm, static_cast<int>(packing::CeilDiv(layout.k_blocks, args.split)),
                                       args.stages, args.inboxes, layout.block_stride);
  args.stage_bytes = Shape::kStrips * args.memory.chunk_bytes;
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(plan.config.clusters * args.split),
                    static_cast<unsigned>(packing::CeilDiv(args.call.m, kTokens)));
  shape.threads = Shape::kThreads;
  // One CTA on a multiprocessor: of two, where the memory would allow it, one works for twice as long.
  shape.shared_bytes = std::max(args.memory.total, device.shared_per_multiprocessor / 2);
  shape.cluster = args.split;
  shape.overlap = plan.overlap;
  Launch(StreamKernel<T, kPromotion, kTokens, kForm, Source>, shape, stream, args, source);
}

template <Promotion kPromotion>
inline constexpr plan::StreamScales kScalesOf = {kPromotion == Promotion::kBlock || kPromotion == Promotion::kInteger,
                                                 kPromotion == Promotion::kBlock};

/// Calls `body` with std::integral_constants of the tile's tokens and of the form, where the kernel has them.
template <Promotion kPromotion, int kTokens, class Body>
void ForStreamForm(plan::StreamForm form, Body&& body) {
  using Form = plan::StreamForm;
  const auto call = [&](auto constant) {
    if constexpr (plan::HasStreamForm(decltype(constant)::value, kTokens, kScalesOf<kPromotion>)) {
      body(std::integral_constant<int, kTokens>{}, constant);
    } else {
      throw CudaError("the streaming kernel has no such form for these weights");
    }
  };
  switch (form) {
    case Form::kMany:
      return call(std::integral_constant<Form, Form::kMany>{});
    case Form::kWide:
      return call(std::integral_constant<Form, Form::kWide>{});
    case Form::kPaired:
      return call(std::integral_constant<Form, Form::kPaired>{});
    case Form::kTall:
      return call(std::integral_constant<Form, Form::kTall>{});
    case Form::kBroad:
      return call(std::integral_constant<Form, Form::kBroad>{});
  }
}

}  // namespace fptq::cuda

#endif  // FPTQ_CUDA_STREAM_KERNEL_CUH_
