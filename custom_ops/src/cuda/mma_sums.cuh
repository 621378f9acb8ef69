// Sums of strips of 64 channels x kTokens tokens in the registers of four warps, by mma.m16n8k32.
#ifndef FPTQ_CUDA_MMA_SUMS_CUH_
#define FPTQ_CUDA_MMA_SUMS_CUH_

#include "cuda/common.cuh"

namespace fptq::cuda {

/// The sums that one thread holds: for each strip kTokens / 8 fragments of 16 channels x 8 tokens. Strips share the
/// activations that a thread loads, and their products do not wait for each other.
template <class T, Promotion kPromotion, int kTokens, int kStrips>
class MmaSums {
  static constexpr int kFragments = kTokens / 8;
  static constexpr bool kFloat = HasFloatScales(kPromotion);
  static constexpr bool kInt8 = kPromotion == Promotion::kInt8;
  using ScalePair = typename Numeric<T>::Pair;

 public:
  __device__ MmaSums() {
    const int thread = threadIdx.x % kGroupThreads;
    const int lane = threadIdx.x % 32;
    word_offset_ = thread * 16;
    scale_offset_ = kBlockBytes + packing::ThreadChannel(thread) * (kFloat ? sizeof(T) : 2);
    tile_offset_[0] = packing::SwizzledOffset(lane % 8, lane / 8);
    tile_offset_[1] = packing::SwizzledOffset(lane % 8, 4 + lane / 8);
  }

  /// Adds one block of each strip. `weights`: shared address of the first strip's block, with its scales;
  /// `strip_stride`: bytes to the next strip's; `tile`: shared address of the activations.
  __device__ void Add(uint32_t weights, uint32_t strip_stride, uint32_t tile, const packing::Layout& layout) {
    // Few tokens: everything is loaded first, so that the latencies overlap. Many: half a block at a time, for
    // registers.
    constexpr int kHeld = kTokens <= 16 && kPromotion != Promotion::kStep ? 2 : 1;
    uint4 words[kStrips][kHeld];
    uint32_t b[kHeld][kFragments][4];
    const auto load = [&](int half) {
#pragma unroll
      for (int s = 0; s < kStrips && !kInt8; ++s) {
        words[s][half % kHeld] = ptx::LoadShared<uint4>(weights + s * strip_stride + word_offset_ + half * kHalfBytes);
      }
#pragma unroll
      for (int j = 0; j < kFragments; ++j) {
        ptx::LoadMatrices(b[half % kHeld][j], tile + tile_offset_[half] + j * 8 * kBlockK);
      }
    };
    packing::SpreadScales multipliers[kStrips];
    ScalePair scales[kStrips];
    load(0);
    if constexpr (kHeld == 2) load(1);
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      const uint32_t at = weights + s * strip_stride + scale_offset_;
      if constexpr (kPromotion == Promotion::kInteger) multipliers[s] = packing::Spread(ptx::LoadShared<uint32_t>(at));
      if constexpr (kPromotion == Promotion::kBlock) scales[s] = ptx::LoadShared<ScalePair>(at);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (kHeld == 1 && half > 0) load(half);
#pragma unroll
      for (int in_half = 0; in_half < 2; ++in_half) {
        const int step = 2 * half + in_half;
#pragma unroll
        for (int s = 0; s < kStrips; ++s) {
          const uint4& four = words[s][half % kHeld];
          const uint32_t even = in_half == 0 ? four.x : four.z;
          const uint32_t odd = in_half == 0 ? four.y : four.w;
          const uint32_t at = weights + s * strip_stride + scale_offset_;
          packing::Fragment fragment;
          if constexpr (kInt8) {
            fragment = ptx::LoadShared<packing::Fragment>(weights + s * strip_stride + word_offset_ +
                                                          step * (packing::kInt8BlockBytes / kStepsPerBlock));
          } else if constexpr (kFloat) {
            fragment = packing::UnpackFloat(even, odd);
          } else {
            if (step > 0 && layout.promotion_k != kBlockK) {
              multipliers[s] =
                  packing::Spread(ptx::LoadShared<uint32_t>(at + layout.ScaleRowOfStep(step) * kStripN * 2));
            }
            fragment = packing::UnpackInteger(even, odd, multipliers[s]);
          }
#pragma unroll
          for (int j = 0; j < kFragments; ++j) {
            const uint32_t (&tokens)[4] = b[half % kHeld][j];
            if (kPromotion == Promotion::kBlock && step == 0) {
              ptx::MmaSet(partial_[s][j], fragment.a, tokens[2 * in_half], tokens[2 * in_half + 1]);
            } else {
              ptx::MmaAdd(partial_[s][j], fragment.a, tokens[2 * in_half], tokens[2 * in_half + 1]);
            }
          }
          if constexpr (kPromotion == Promotion::kStep) {
            if (layout.PromotesAfterStep(step)) {
              Promote(s, ptx::LoadShared<ScalePair>(at + layout.ScaleRowOfStep(step) * kStripN * sizeof(T)));
            }
          } else if constexpr (kPromotion == Promotion::kBlock) {
            if (step == kStepsPerBlock - 1) Promote(s, scales[s]);
          }
        }
      }
    }
  }

  __device__ void Clear() {
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
#pragma unroll
      for (int j = 0; j < kFragments; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          partial_[s][j][i] = 0;
          if constexpr (kFloat) sum_[s][j][i] = 0;
        }
      }
    }
  }

  /// Sums of two neighbouring channels for token `fragment * 8 + lane % 4 * 2 + odd`.
  __device__ uint2 Pair(int strip, int fragment, int odd) const {
    if constexpr (kFloat) {
      return {__float_as_uint(sum_[strip][fragment][odd]), __float_as_uint(sum_[strip][fragment][2 + odd])};
    } else {
      return {static_cast<uint32_t>(partial_[strip][fragment][odd]),
              static_cast<uint32_t>(partial_[strip][fragment][2 + odd])};
    }
  }

 private:
  __device__ void Promote(int strip, ScalePair scales) {
    const float2 scale = Numeric<T>::ToFloat2(scales);
#pragma unroll
    for (int j = 0; j < kFragments; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& sum = sum_[strip][j][i];
        sum = fmaf(i < 2 ? scale.x : scale.y, static_cast<float>(partial_[strip][j][i]), sum);
        if constexpr (kPromotion == Promotion::kStep) partial_[strip][j][i] = 0;
      }
    }
  }

  uint32_t word_offset_, scale_offset_, tile_offset_[2];
  int partial_[kStrips][kFragments][4] = {};
  float sum_[kFloat ? kStrips : 1][kFragments][4] = {};
};

}  // namespace fptq::cuda

#endif  // FPTQ_CUDA_MMA_SUMS_CUH_
