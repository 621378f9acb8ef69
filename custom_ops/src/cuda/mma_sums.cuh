// Sums of strips of 64 channels x kTokens tokens in the registers of four warps, by mma.m16n8k32.
#ifndef FPTQ_CUDA_MMA_SUMS_CUH_
#define FPTQ_CUDA_MMA_SUMS_CUH_

#include "cuda/common.cuh"

namespace fptq::cuda {

/// The sums that one thread holds: for each strip kTokens / 8 fragments of 16 channels x 8 tokens. Up to kBlocks blocks
/// of each strip are multiplied at once. Their products do not wait for each other, nor do those of several strips,
/// which share the activations that a thread loads.
template <class T, Promotion kPromotion, int kTokens, int kStrips, int kBlocks = 1>
class MmaSums {
  static constexpr int kFragments = kTokens / 8;
  static constexpr bool kFloat = HasFloatScales(kPromotion);
  static constexpr bool kInt8 = kPromotion == Promotion::kInt8;  // nothing to scale until the end
  using Sum = std::conditional_t<kFloat, float, int>;
  // Of a thread's two channels: scales, or two IntegerScale.
  using ScalePair = std::conditional_t<kFloat, typename Numeric<T>::Pair, uint32_t>;

 public:
  __device__ MmaSums() {
    const int thread = threadIdx.x % kGroupThreads;
    const int lane = threadIdx.x % 32;
    word_offset_ = thread * 16;
    scale_offset_ = kBlockBytes + packing::ThreadChannel(thread) * kScaleBytes;
    tile_offset_[0] = packing::SwizzledOffset(lane % 8, lane / 8);
    tile_offset_[1] = packing::SwizzledOffset(lane % 8, 4 + lane / 8);
    // Few tokens: kept, since computing them anew for every block takes issue slots, which are what a block's time is
    // made of. Many tokens have no registers left for it, nor have 16 with integer scales and two strips.
    if constexpr (kTokens < 16 || (kTokens == 16 && (kFloat || kStrips == 1))) {
      ptx::Keep(word_offset_), ptx::Keep(scale_offset_), ptx::Keep(tile_offset_[0]), ptx::Keep(tile_offset_[1]);
    }
  }

  /// Adds kCount neighbouring blocks, at most kBlocks, of each strip. `weights`: shared address of the first strip's
  /// first block, with its scales; `strip_stride`: bytes to the next strip's; `tile`: shared address of the
  /// activations.
  template <int kCount = 1>
  __device__ void Add(uint32_t weights, uint32_t strip_stride, uint32_t tile, const packing::Layout& layout) {
    if (kPromotion == Promotion::kBlock || (kPromotion == Promotion::kInteger && layout.promotion_k == kBlockK)) {
      AddBlock<true, kCount>(weights, strip_stride, tile, layout);
    } else {
      AddBlock<false, kCount>(weights, strip_stride, tile, layout);
    }
  }

  __device__ void Clear() {
#pragma unroll
    for (int u = 0; u < kBlocks * kStrips; ++u) {
#pragma unroll
      for (int j = 0; j < kFragments; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          partial_[u][j][i] = 0;
          if (!kInt8 && u < kStrips) sum_[u % kSumStrips][j][i] = 0;
        }
      }
    }
  }

  /// Sums of two neighbouring channels for token `fragment * 8 + lane % 4 * 2 + odd`.
  __device__ uint2 Pair(int strip, int fragment, int odd) const {
    if constexpr (kFloat) {
      return {__float_as_uint(sum_[strip][fragment][odd]), __float_as_uint(sum_[strip][fragment][2 + odd])};
    } else {
      if constexpr (kInt8) {
        uint2 pair = {0, 0};
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          pair.x += static_cast<uint32_t>(partial_[b * kStrips + strip][fragment][odd]);
          pair.y += static_cast<uint32_t>(partial_[b * kStrips + strip][fragment][2 + odd]);
        }
        return pair;
      }
      const int (&sums)[4] = sum_[kInt8 ? 0 : strip][fragment];
      return {static_cast<uint32_t>(sums[odd]), static_cast<uint32_t>(sums[2 + odd])};
    }
  }

 private:
  static constexpr int kScaleBytes = kFloat ? sizeof(T) : sizeof(packing::IntegerScale);

  /// `kWhole`: one group of rows, or part of one. Block c of strip s is unit c * kStrips + s.
  template <bool kWhole, int kCount>
  __device__ __forceinline__ void AddBlock(uint32_t weights, uint32_t strip_stride, uint32_t tile,
                                           const packing::Layout& layout) {
    // Few tokens: everything is loaded first, so that the latencies overlap. Many, and 16 tokens of four blocks, or of
    // two with integer scales: half a block at a time, for registers.
    constexpr int kUnits = kCount * kStrips;
    constexpr bool kCrowded = kTokens > 16 || (kTokens == 16 && (kBlocks == 4 || (kBlocks == 2 && !kFloat)));
    constexpr int kHeld = kCrowded || kPromotion == Promotion::kStep ? 1 : 2;
    uint4 words[kUnits][kHeld];
    uint32_t b[kCount][kHeld][kFragments][4];
    const auto unit = [&](int u) { return weights + u % kStrips * strip_stride + u / kStrips * layout.block_stride; };
    const auto load = [&](int half) {
#pragma unroll
      for (int u = 0; u < kUnits && !kInt8; ++u) {
        words[u][half % kHeld] = ptx::LoadShared<uint4>(unit(u) + word_offset_ + half * kHalfBytes);
      }
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
#pragma unroll
        for (int j = 0; j < kFragments; ++j) {
          ptx::LoadMatrices(b[c][half % kHeld][j], tile + tile_offset_[half] + c * kTokens * kBlockK + j * 8 * kBlockK);
        }
      }
    };
    ScalePair scales[kUnits];
    load(0);
    if constexpr (kHeld == 2) load(1);
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      if constexpr (kWhole) scales[u] = ptx::LoadShared<ScalePair>(unit(u) + scale_offset_);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (kHeld == 1 && half > 0) load(half);
#pragma unroll
      for (int in_half = 0; in_half < 2; ++in_half) {
        const int step = 2 * half + in_half;
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
          const uint4& four = words[u][half % kHeld];
          const uint32_t even = in_half == 0 ? four.x : four.z;
          const uint32_t odd = in_half == 0 ? four.y : four.w;
          packing::Fragment fragment;
          if constexpr (kInt8) {
            fragment = ptx::LoadShared<packing::Fragment>(unit(u) + word_offset_ +
                                                          step * (packing::kInt8BlockBytes / kStepsPerBlock));
          } else if constexpr (kFloat) {
            fragment = packing::UnpackFloat(even, odd);
          } else {
            fragment = packing::UnpackDigits(even, odd);
          }
#pragma unroll
          for (int j = 0; j < kFragments; ++j) {
            const uint32_t (&tokens)[4] = b[u / kStrips][half % kHeld][j];
            if (!kInt8 && step == 0) {
              ptx::MmaSet(partial_[u][j], fragment.a, tokens[2 * in_half], tokens[2 * in_half + 1]);
            } else {
              ptx::MmaAdd(partial_[u][j], fragment.a, tokens[2 * in_half], tokens[2 * in_half + 1]);
            }
          }
          if constexpr (kWhole) {
            if (step == kStepsPerBlock - 1) Promote<true>(u, scales[u]);
          } else if constexpr (!kInt8) {
            if (layout.PromotesAfterStep(step)) {
              Promote<false>(u, ptx::LoadShared<ScalePair>(unit(u) + scale_offset_ +
                                                           layout.ScaleRowOfStep(step) * kStripN * kScaleBytes));
            }
          }
        }
      }
    }
  }

  /// Adds the sums of one group of rows times their scale. Digits: 16 times too much, which is exact to take out.
  template <bool kWhole>
  __device__ __forceinline__ void Promote(int unit, ScalePair scales) {
#pragma unroll
    for (int j = 0; j < kFragments; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        Sum& sum = sum_[unit % kSumStrips][j][i];
        int& partial = partial_[unit][j][i];
        if constexpr (kFloat) {
          const float2 scale = Numeric<T>::ToFloat2(scales);
          sum = fmaf(i < 2 ? scale.x : scale.y, static_cast<float>(partial), sum);
        } else {
          sum += (partial >> packing::kDigitShift) * packing::Multiplier(i < 2 ? scales : scales >> 16);
        }
        if constexpr (!kWhole) partial = 0;
      }
    }
  }

  static constexpr int kSumStrips = kInt8 ? 1 : kStrips;
  uint32_t word_offset_, scale_offset_, tile_offset_[2];
  int partial_[kBlocks * kStrips][kFragments][4] = {};
  Sum sum_[kSumStrips][kFragments][4] = {};
};

}  // namespace fptq::cuda

#endif  // FPTQ_CUDA_MMA_SUMS_CUH_
