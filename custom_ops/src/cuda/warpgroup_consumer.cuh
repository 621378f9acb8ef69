// What a consumer warpgroup of the warpgroup kernel does with the stages that the producer fills.
#ifndef FPTQ_CUDA_WARPGROUP_CONSUMER_CUH_
#define FPTQ_CUDA_WARPGROUP_CONSUMER_CUH_

#include "cuda/tile_epilogue.cuh"
#include "cuda/warpgroup_tile.cuh"
#include "cuda/wgmma.cuh"

namespace fptq::cuda {

/// One consumer warpgroup: its strips of the tile.
///
/// The work is a sequence of items, the products of one block of one strip with all tokens. Two sets of fragments take
/// turns: while the tensor cores multiply one item, the next one's weights are unpacked. Float scales: 64 tokens at a
/// time are multiplied into partial sums; where registers allow, two sets of them take turns, so that one is scaled and
/// added up while products fill the other.
template <class T, Promotion kPromotion, class Shape>
class WarpgroupConsumer {
  static constexpr int kTokens = Shape::kTokens;
  static constexpr int kStrips = Shape::kStrips;
  using Pair = typename Numeric<T>::Pair;
  static constexpr int kSums = kTokens / 2;  // int32 per thread and strip
  static constexpr int kHalfTokens = 64;
  static constexpr int kHalves = kTokens / kHalfTokens;
  static constexpr int kHalfSums = kHalfTokens / 2;
  static constexpr bool kInteger = !HasFloatScales(kPromotion);
  static constexpr bool kTwoSets = !kInteger && Shape::kConsumers == 2;
  /// Which item's words are read after an item's products have been started: the next one's, just before they are
  /// unpacked, or those of the one after it. The latency of a read is a quarter of an item with 64 tokens; but whoever
  /// reads farther ahead waits for memory earlier. It pays where unpacking is long, and two warps share a scheduler.
  static constexpr int kAhead = kPromotion == Promotion::kInteger && Shape::kConsumers == 2 ? 2 : 1;
  static constexpr int kRaws = kAhead;
  using Scale = std::conditional_t<kInteger, uint32_t, Pair>;  // of a thread's two channels
  using Epilogue = TileEpilogue<T, EncodingOf(kPromotion)>;

 public:
  __device__ explicit WarpgroupConsumer(const WarpgroupCta<Shape>& cta)
      : cta_(cta),
        group_(static_cast<int>(threadIdx.x) / kGroupThreads - 1),
        thread_(static_cast<int>(threadIdx.x) % kGroupThreads),
        channel_(packing::ThreadChannel(thread_)) {
    at_ = FirstStage();
    if constexpr (Shape::kIsDeep) {
      const uint32_t shared = ptx::SharedAddress(cta.shared);
      to_twin_ = ptx::ClusterAddress(shared, static_cast<uint32_t>(1 - cta.twin)) - shared;
    }
  }

  __device__ void Run() {
    for (int index = cta_.FirstTile(); index < cta_.TileCount(); index += cta_.TileStride()) {
      Prefetch(cta_.TileAt(index));
      Clear();
      if constexpr (kPromotion == Promotion::kStep) {
        SumSteps();
      } else if constexpr (kPromotion != Promotion::kInteger || Shape::kWholeBlocks) {
        SumItems<true>();
      } else if (cta_.args.weights.layout.promotion_k == kBlockK) {
        SumItems<true>();
      } else {
        SumItems<false>();
      }
      ptx::Keep(index);
      Finish(cta_.TileAt(index));  // anew: no register is left for it
    }
  }

 private:
  // What this thread reads of one block of a strip.
  struct Raw {
    uint4 words[kPromotion == Promotion::kInt8 ? kStepsPerBlock : kStepsPerBlock / 2];
    Scale scales[kInteger ? kStepsPerBlock : 1];
  };
  // A stage of the ring: the descriptor of its activations, and shared addresses of its first block of this group and
  // of the barrier that says it is full. Stepped, not computed from an index: products wait for descriptors.
  struct Stage {
    uint32_t tile, block, full;
  };
  __device__ uint32_t EmptyOf(const Stage& stage) const { return stage.full + cta_.args.stages * 8; }
  __device__ uint32_t Block(int strip) const { return at_.block + strip * cta_.memory.block_stride; }
  template <class Value>
  __device__ Value Scales(uint32_t block, int row) const {  // of this thread's two channels
    return ptx::LoadShared<Value>(block + kBlockBytes + (row * kStripN + channel_) * (sizeof(Value) / 2));
  }
  __device__ Stage FirstStage() const {
    const uint32_t shared = ptx::SharedAddress(cta_.shared);
    return {wgmma::TileDescriptor(shared + (Shape::kIsDeep ? group_ * Shape::kTileBytes : 0)),
            shared + cta_.memory.weights + group_ * kStrips * cta_.memory.block_stride, ptx::SharedAddress(cta_.full)};
  }
  __device__ __forceinline__ void Advance() {
    const Stage first = FirstStage();
    at_.tile += Shape::kDepth * Shape::kTileBytes / 16;
    at_.block += Shape::kStageBlocks * cta_.memory.block_stride;
    at_.full += 8;
    if (at_.full == EmptyOf(first)) {  // behind the last one
      at_ = first;
      parity_ ^= 1;
    }
  }
  __device__ void WaitFull() const { ptx::BarrierWait(at_.full, parity_); }
  /// After a wgmma::Wait for products of what the warp has read: it synchronises the warp, so all lanes have read.
  __device__ void Release(uint32_t empty) const {
    if (thread_ % 32 != 0) return;
    ptx::BarrierArrive(empty);
    if constexpr (Shape::kIsDeep) ptx::ClusterBarrierArrive(empty + to_twin_);
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

  /// `kWhole`: integer-structured scales have one multiplier per channel and block.
  template <bool kWhole>
  __device__ __forceinline__ void SumItems() {
    int left = cta_.StageCount() * kStrips;
    before_ = 0;
    WaitFull();
    Read<kWhole>(0, 0);
    Unpack<kWhole>(0, 0);
    if constexpr (kAhead == 2) {
      if constexpr (kStrips == 1) AdvanceIf(left > 1);
      WaitFull();
      Read<kWhole>(1, kStrips - 1);
      AdvanceIf(left > 2);
    }
    for (; left >= 2; left -= 2) {
      Item<0, kWhole>(left > (kStrips == 2 ? 2 : kAhead == 2 ? 3 : 1));
      Item<1, kWhole>(left > (kAhead == 2 ? 4 : 2));
      // Sums that are read while products are in flight must not be in flight across the end of a loop: ptxas would
      // serialize all products. Little is lost, the next item is unpacked already.
      if constexpr (kTwoSets) wgmma::Wait<0>();
    }
    if constexpr (kStrips == 1) {
      if (left == 1) Item<0, kWhole>(false);
    }
    wgmma::Wait<0>();
    if constexpr (kTwoSets) {  // the last half of the last item
      if (kStrips == 1 && left == 1) {
        Promote(0, kHalves - 1, kHalves - 1, scales_[0]);
      } else {
        Promote(kStrips - 1, kHalves - 1, 1, scales_[1]);
      }
    }
    if (before_ != 0) Release(before_);
    Advance();
  }

  /// To the next stage, unless there is none in this tile: then the last one is read again, and nobody needs it.
  __device__ __forceinline__ void AdvanceIf(bool more) {
    if (more) Advance();
  }

  /// One item, whose fragments are in set kSet. `more`: the tile has another stage than those waited for so far.
  template <int kSet, bool kWhole>
  __device__ __forceinline__ void Item(bool more) {
    constexpr int kOther = 1 - kSet;
    constexpr bool kBeginsStage = kStrips == 1 || kSet == 2 - kAhead;  // what is read now
    constexpr bool kTests = kBeginsStage && (kAhead == 2 || kStrips == 2);
    const int strip = kStrips == 2 ? kSet : 0;
    const Stage stage = stage_[kSet % kRaws];
    const bool is_full = kTests && ptx::BarrierTest(at_.full, parity_);  // long before it is used
    const auto read = [&] {
      if (kBeginsStage && !is_full) WaitFull();
      Read<kWhole>(kAhead == 2 ? kSet : kOther, kStrips == 1 ? 0 : kAhead == 2 ? kSet : kOther);
    };
    const auto unpack_next = [&] {
      if constexpr (kAhead == 1) {
        if constexpr (kStrips == 1) AdvanceIf(more);
        read();
      }
      Unpack<kWhole>(kOther, kStrips == 2 ? kOther : 0);
      if constexpr (kStrips == 2 ? !kBeginsStage : kAhead == 2) AdvanceIf(more);
    };
    const auto release_before = [&] {  // its last products are complete
      if (strip == 0 && before_ != 0) Release(before_);
      if (strip == kStrips - 1) before_ = EmptyOf(stage);
    };
    if constexpr (kInteger) {
      wgmma::Fence();
#pragma unroll
      for (int step = 0; step < kStepsPerBlock; ++step) {
        wgmma::Mma<kTokens>::Add(integer_[strip], fragments_[kSet][step].a, wgmma::Descriptor(stage.tile + 2 * step));
      }
      wgmma::Commit();
      wgmma::Wait<1>();  // the item before is complete
      release_before();
      if constexpr (kAhead == 2) read();
      unpack_next();
    } else if constexpr (kTwoSets) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        const int set = kHalves == 1 ? kSet : half;
        MultiplyHalf(stage, half, set, fragments_[kSet]);
        wgmma::Wait<1>();
        if (half == 0) {  // the item before is complete
          release_before();
          Promote(kStrips == 2 ? 1 - strip : 0, kHalves - 1, 1 - set, scales_[kOther]);
        } else {
          Promote(strip, 0, 0, scales_[kSet]);
        }
      }
      unpack_next();
    } else {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        MultiplyHalf(stage, half, 0, fragments_[kSet]);
        if (half == kHalves - 1) unpack_next();
        wgmma::Wait<0>();
        if (half == kHalves - 1 && strip == kStrips - 1) Release(EmptyOf(stage));
        Promote(strip, half, 0, scales_[kSet]);
      }
    }
  }

  /// Starts the products of 64 tokens of a stage.
  __device__ __forceinline__ void MultiplyHalf(const Stage& stage, int half, int set,
                                               const packing::Fragment (&fragments)[kStepsPerBlock]) {
    const uint32_t tile = stage.tile + half * (kHalfTokens * kBlockK / 16);
    wgmma::Fence();
    wgmma::Mma<kHalfTokens>::Set(partial_[set], fragments[0].a, wgmma::Descriptor(tile));
#pragma unroll
    for (int step = 1; step < kStepsPerBlock; ++step) {
      wgmma::Mma<kHalfTokens>::Add(partial_[set], fragments[step].a, wgmma::Descriptor(tile + 2 * step));
    }
    wgmma::Commit();
  }

  /// Reads a strip of the stage at_, for the set `set` of fragments.
  template <bool kWhole>
  __device__ __forceinline__ void Read(int set, int strip) {
    Raw& raw = raw_[set % kRaws];
    const uint32_t block = Block(strip);
    constexpr int kWords = sizeof(raw.words) / sizeof(uint4);
#pragma unroll
    for (int i = 0; i < kWords; ++i) raw.words[i] = ptx::LoadShared<uint4>(block + (i * kGroupThreads + thread_) * 16);
    if constexpr (kPromotion == Promotion::kInteger) {
      const packing::Layout& layout = cta_.args.weights.layout;
#pragma unroll
      for (int step = 0; step < (kWhole || kAhead == 1 ? 1 : kStepsPerBlock); ++step) {
        raw.scales[step] = Scales<Scale>(block, kWhole ? 0 : layout.ScaleRowOfStep(step));
      }
    } else if constexpr (!kInteger) {
      raw.scales[0] = Scales<Scale>(block, 0);
    }
    stage_[set % kRaws] = at_;
  }

  /// Unpacks what was read of a strip for a set of fragments.
  template <bool kWhole>
  __device__ __forceinline__ void Unpack(int set, int strip) {
    packing::Fragment(&fragments)[kStepsPerBlock] = fragments_[set];
    const Raw& raw = raw_[set % kRaws];
    if constexpr (!kInteger) scales_[set] = raw.scales[0];
    packing::SpreadScales scales;
#pragma unroll
    for (int step = 0; step < kStepsPerBlock; ++step) {
      if constexpr (kPromotion == Promotion::kInt8) {
        const uint4& words = raw.words[step];
        fragments[step] = {{words.x, words.y, words.z, words.w}};
        continue;
      }
      const uint4& four = raw.words[step / 2];
      const uint32_t even = step % 2 == 0 ? four.x : four.z, odd = step % 2 == 0 ? four.y : four.w;
      if constexpr (kPromotion == Promotion::kInteger) {
        if (step == 0 || (!kWhole && kAhead == 2)) {
          scales = packing::Spread(raw.scales[step]);
        } else if (!kWhole) {  // no registers to read all of them before
          scales = packing::Spread(Scales<Scale>(Block(strip), cta_.args.weights.layout.ScaleRowOfStep(step)));
        }
        fragments[step] = packing::UnpackInteger(even, odd, scales);
      } else {
        fragments[step] = packing::UnpackFloat(even, odd);
      }
    }
#pragma unroll
    for (int step = 0; step < kStepsPerBlock; ++step) wgmma::Pin(fragments[step].a);
  }

  /// Float scales of groups of 32 or 64: one group at a time.
  __device__ void SumSteps() {
    static_assert(kStrips == 1 || kPromotion != Promotion::kStep);
    for (int left = cta_.StageCount(); left > 0; --left) {
      WaitFull();
      Read<true>(0, 0);
      Unpack<true>(0, 0);
#pragma unroll
      for (int step = 0; step < kStepsPerBlock; ++step) {
        const Pair scale = Scales<Pair>(Block(0), cta_.args.weights.layout.ScaleRowOfStep(step));
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          const uint32_t tile = at_.tile + half * (kHalfTokens * kBlockK / 16) + 2 * step;
          wgmma::Fence();
          wgmma::Mma<kHalfTokens>::Set(partial_[0], fragments_[0][step].a, wgmma::Descriptor(tile));
          wgmma::Commit();
          wgmma::Wait<0>();
          if (step == kStepsPerBlock - 1 && half == kHalves - 1) Release(EmptyOf(at_));
          Promote(0, half, 0, scale);
        }
      }
      Advance();
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

  /// Sums of rows 8 i and 8 i + 1 of this thread's tile: both rows' even channel, then both rows' odd channel.
  __device__ uint4 Quad(int strip, int i) const {
    if constexpr (kInteger) {
      const int* sums = integer_[strip] + 4 * i;
      return {static_cast<uint32_t>(sums[0]), static_cast<uint32_t>(sums[1]), static_cast<uint32_t>(sums[2]),
              static_cast<uint32_t>(sums[3])};
    } else {
      const uint32_t* sums = sums_[strip] + 4 * i;
      return {sums[0], sums[1], sums[2], sums[3]};
    }
  }

  /// The even one of this thread's two channels of a strip.
  __device__ int64_t FirstChannel(const plan::Tile& tile, int strip) const {
    const int first = Shape::kIsDeep ? 0 : group_ * kStrips;
    return int64_t{tile.n * Shape::kTileStrips + first + strip} * kStripN + channel_;
  }

  __device__ void Prefetch(const plan::Tile& tile) const {
#pragma unroll
    for (int strip = 0; strip < kStrips; ++strip) Epilogue::Prefetch(cta_.args, FirstChannel(tile, strip));
  }

  /// Where this thread's results go: of `rows` rows of the tile from row `first` on.
  __device__ Epilogue EpilogueOf(const plan::Tile& tile, int strip, int first, int rows) const {
    return Epilogue(cta_.args, int64_t{tile.m} * kTokens + first, thread_ % 4 * 2, rows, FirstChannel(tile, strip));
  }

  __device__ void Finish(const plan::Tile& tile) {
    ptx::WaitForPredecessors();
    if constexpr (Shape::kIsDeep) return FinishDeep(tile);
    if constexpr (kStrips == 1) {  // larger tiles are never split
      if (cta_.args.split > 1) return FinishCluster(tile);
    }
    // All scales are read before anything is written: a store would hold back each next read.
    const Epilogue first = EpilogueOf(tile, 0, 0, kTokens);
    float2 scales[kTokens / 8];
    first.Scales(scales);
#pragma unroll
    for (int strip = 0; strip < kStrips; ++strip) {
      const Epilogue epilogue = strip == 0 ? first : EpilogueOf(tile, strip, 0, kTokens);
      uint4 sums[kTokens / 8];
#pragma unroll
      for (int i = 0; i < kTokens / 8; ++i) sums[i] = Quad(strip, i);
      epilogue.Store(sums, scales);
    }
  }

  /// The sums of all ranks are added in rank order, each rank for its share of the tile, which is a split CTA's only
  /// one. Sums are sent to their owner as soon as a warp has them; a CTA leaves when it has received all of its own.
  __device__ void FinishCluster(const plan::Tile& tile) {
    constexpr int kMost = kTokens / 16;  // of two ranks
    constexpr int kThreads = Shape::kConsumerThreads;
    const plan::SplitExchange exchange = plan::SplitExchange::Of(kTokens, cta_.args.split);
    const plan::Range mine = exchange.Mine(cta_.rank);
    const int count = mine.end - mine.begin;
    const int thread = group_ * kGroupThreads + thread_;
    const uint32_t inbox = ptx::SharedAddress(cta_.shared + cta_.memory.inbox) + thread * 16;
    const auto slot = [&](int rank, int i) { return inbox + exchange.Slot(rank, i) * (kThreads * 16); };
    if (thread == 0) {
      ptx::BarrierArriveExpect(cta_.received, static_cast<uint32_t>((exchange.split - 1) * count * kThreads * 16));
    }
    int owner = 0;
    plan::Range theirs = exchange.Mine(0);
#pragma unroll
    for (int q = 0; q < kTokens / 8; ++q) {
      if (q == theirs.end) theirs = exchange.Mine(++owner);
      const uint32_t to = slot(cta_.rank, q - theirs.begin);
      if (owner == cta_.rank) {
        ptx::StoreShared(to, Quad(0, q));  // only this thread reads it
      } else {
        ptx::StoreClusterAsync(to, Quad(0, q), cta_.received, static_cast<uint32_t>(owner));
      }
    }
    const Epilogue epilogue = EpilogueOf(tile, 0, 8 * mine.begin, 8 * count);
    float2 scales[kMost];
    epilogue.Scales(scales);
    ptx::BarrierWait(cta_.received, 0);
    uint4 sums[kMost];
#pragma unroll
    for (int i = 0; i < kMost; ++i) sums[i] = ptx::LoadShared<uint4>(slot(0, i < count ? i : 0));
#pragma unroll 1
    for (int rank = 1; rank < exchange.split; ++rank) {
#pragma unroll
      for (int i = 0; i < kMost; ++i) {
        sums[i] = epilogue.Add(sums[i], ptx::LoadShared<uint4>(slot(rank, i < count ? i : 0)));
      }
    }
    epilogue.Store(sums, scales);
  }

  /// Both groups have sums of the whole tile. Each gets the other's for half of the tokens, through the ring, which
  /// nobody fills or reads any more: a deep CTA has one tile.
  __device__ void FinishDeep(const plan::Tile& tile) {
    constexpr int kMine = kTokens / 16;
    static_assert(Shape::kConsumers == 2);
    const auto meet = [] { asm volatile("bar.sync 1, %0;" ::"n"(Shape::kConsumerThreads) : "memory"); };
    const uint32_t shared = ptx::SharedAddress(cta_.shared) + thread_ * 16;
    const auto slot = [&](int owner, int i) { return shared + (owner * kMine + i) * (kGroupThreads * 16); };
    meet();
#pragma unroll
    for (int q = 0; q < 2 * kMine; ++q) {
      if (q / kMine != group_) ptx::StoreShared(slot(q / kMine, q % kMine), Quad(0, q));
    }
    const Epilogue epilogue = EpilogueOf(tile, 0, 8 * kMine * group_, 8 * kMine);
    float2 scales[kMine];
    epilogue.Scales(scales);
    meet();
    uint4 sums[kMine];
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const uint4 own = group_ == 0 ? Quad(0, i) : Quad(0, kMine + i);
      sums[i] = epilogue.Add(own, ptx::LoadShared<uint4>(slot(group_, i)));
    }
    epilogue.Store(sums, scales);
  }

  static constexpr int kSets = kTwoSets ? 2 : 1;

  const WarpgroupCta<Shape>& cta_;
  const int group_, thread_, channel_;
  Stage at_;             // that is read
  uint32_t to_twin_;     // from an address in shared memory to the same in the twin's
  uint32_t parity_ = 0;  // of its lap
  uint32_t before_;      // barrier of the stage whose last products may still be in flight, or 0
  Raw raw_[kRaws];
  Stage stage_[kRaws];  // where raw_ comes from
  packing::Fragment fragments_[2][kStepsPerBlock];
  Pair scales_[2];  // of the items in the two sets of fragments
  int partial_[kSets][kInteger ? 1 : kHalfSums];
  uint32_t sums_[kInteger ? 1 : kStrips][kInteger ? 1 : kSums];  // bits of float
  int integer_[kInteger ? kStrips : 1][kInteger ? kSums : 1];
};

}  // namespace fptq::cuda

#endif  // FPTQ_CUDA_WARPGROUP_CONSUMER_CUH_
