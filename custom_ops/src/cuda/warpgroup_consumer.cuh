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
  using Epilogue = TileEpilogue<T, EncodingOf(kPromotion)>;

 public:
  __device__ explicit WarpgroupConsumer(const WarpgroupCta<Shape>& cta)
      : cta_(cta),
        group_(static_cast<int>(threadIdx.x) / kGroupThreads - 1),
        thread_(static_cast<int>(threadIdx.x) % kGroupThreads),
        channel_(packing::ThreadChannel(thread_)) {}

  __device__ void Run() {
    for (int index = cta_.FirstTile(); index < cta_.TileCount(); index += cta_.TileStride()) {
      Prefetch(cta_.TileAt(index));
      Clear();
      if constexpr (kPromotion == Promotion::kStep) {
        SumSteps();
      } else {
        SumItems();
      }
      ptx::Keep(index);
      Finish(cta_.TileAt(index));  // anew: no register is left for it
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
  /// After a wgmma::Wait for products of what the warp has read: it synchronises the warp, so all lanes have read.
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
      // One multiplier per channel and block: a straight piece of code, whose steps run side by side. (With two strips,
      // the longer loop costs more than that brings.)
      if (kStrips == 1 && layout.promotion_k == kBlockK) {
        UnpackMultiples<true>(fragments, strip);
      } else {
        UnpackMultiples<false>(fragments, strip);
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

  /// Integer-structured scales; `kWhole`: one multiplier per channel and block, everything is read first.
  template <bool kWhole>
  __device__ __forceinline__ void UnpackMultiples(packing::Fragment (&fragments)[kStepsPerBlock], int strip) {
    const packing::Layout& layout = cta_.args.weights.layout;
    packing::SpreadScales scales = packing::Spread(Scales<uint32_t>(strip, 0));
    uint4 words[2];
    if constexpr (kWhole) words[0] = Words(strip, 0), words[1] = Words(strip, 1);
#pragma unroll
    for (int step = 0; step < kStepsPerBlock; ++step) {
      if constexpr (!kWhole) {
        if (step > 0 && layout.promotion_k != kBlockK) {
          scales = packing::Spread(Scales<uint32_t>(strip, layout.ScaleRowOfStep(step)));
        }
        if (step % 2 == 0) words[step / 2] = Words(strip, step / 2);
      }
      const uint4& four = words[step / 2];
      fragments[step] = step % 2 == 0 ? packing::UnpackInteger(four.x, four.y, scales)
                                      : packing::UnpackInteger(four.z, four.w, scales);
    }
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
    return int64_t{tile.n * Shape::kTileStrips + group_ * kStrips + strip} * kStripN + channel_;
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

}  // namespace fptq::cuda

#endif  // FPTQ_CUDA_WARPGROUP_CONSUMER_CUH_
