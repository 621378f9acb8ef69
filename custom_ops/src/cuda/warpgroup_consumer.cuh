// What a consumer warpgroup of the warpgroup kernel does with the stages that the producer fills.
#ifndef FPTQ_CUDA_WARPGROUP_CONSUMER_CUH_
#define FPTQ_CUDA_WARPGROUP_CONSUMER_CUH_

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
  static constexpr Encoding kEncoding = EncodingOf(kPromotion);

 public:
  __device__ explicit WarpgroupConsumer(const WarpgroupCta<Shape>& cta)
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

}  // namespace fptq::cuda

#endif  // FPTQ_CUDA_WARPGROUP_CONSUMER_CUH_
