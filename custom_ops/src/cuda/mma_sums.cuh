// Sums of 64 channels x kTokens tokens in the registers of four warps, by mma.m16n8k32.
#ifndef FPTQ_CUDA_MMA_SUMS_CUH_
#define FPTQ_CUDA_MMA_SUMS_CUH_

#include "cuda/common.cuh"

namespace fptq::cuda {

/// The activations become int8 minus 128 in registers: the common zero point needs no correction.
inline constexpr int kMmaCentre = 128;

/// The sums that one thread holds: kTokens / 8 fragments of 16 channels x 8 tokens.
template <class T, Promotion kPromotion, int kTokens>
class MmaSums {
  static constexpr int kFragments = kTokens / 8;
  static constexpr bool kFloat = kPromotion != Promotion::kInteger;
  using ScalePair = typename Numeric<T>::Pair;

 public:
  /// Adds one block: `weights` of the thread's strip, with their scales; `tile` the activations.
  __device__ void Add(const uint8_t* weights, const uint8_t* tile, const packing::Layout& layout) {
    const int thread = threadIdx.x % kGroupThreads;
    const int lane = threadIdx.x % 32;
    const uint8_t* own_scales = weights + kBlockBytes + packing::ThreadChannel(thread) * (kFloat ? sizeof(T) : 2);
    packing::SpreadScales multipliers;
    if constexpr (!kFloat) multipliers = packing::Spread(*reinterpret_cast<const uint32_t*>(own_scales));
    // Few tokens: everything is loaded first, so that the latencies overlap. Many: half a block at a time, for
    // registers.
    constexpr int kHeld = kTokens <= 16 ? 2 : 1;
    uint4 words_of[kHeld];
    uint32_t b_of[kHeld][kFragments][4];
    const auto load = [&](int half) {
      words_of[half % kHeld] = *reinterpret_cast<const uint4*>(weights + half * kHalfBytes + thread * 16);
#pragma unroll
      for (int j = 0; j < kFragments; ++j) {
        const int offset = packing::SwizzledOffset(j * 8 + lane % 8, half * 4 + lane / 8);
        ptx::LoadMatrices(b_of[half % kHeld][j], ptx::SharedAddress(tile + offset));
      }
    };
    if constexpr (kHeld == 2) {
      load(0);
      load(1);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if constexpr (kHeld == 1) load(half);
      const uint4& words = words_of[half % kHeld];
      auto& b = b_of[half % kHeld];
#pragma unroll
      for (int j = 0; j < kFragments; ++j) {
#pragma unroll
        for (int r = 0; r < 4; ++r) b[j][r] ^= packing::kCentre128;
      }
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const int step = 2 * half + s;
        const uint32_t even = s == 0 ? words.x : words.z;
        const uint32_t odd = s == 0 ? words.y : words.w;
        packing::Fragment fragment;
        if constexpr (kFloat) {
          fragment = packing::UnpackFloat(even, odd);
        } else {
          if (step > 0 && layout.promotion_k != kBlockK) {
            multipliers = packing::Spread(
                *reinterpret_cast<const uint32_t*>(own_scales + layout.ScaleRowOfStep(step) * kStripN * 2));
          }
          fragment = packing::UnpackInteger(even, odd, multipliers);
        }
#pragma unroll
        for (int j = 0; j < kFragments; ++j) ptx::MmaS8(partial_[j], fragment.a, b[j][2 * s], b[j][2 * s + 1]);
        if constexpr (kPromotion == Promotion::kStep) {
          if (layout.PromotesAfterStep(step)) Promote(own_scales + layout.ScaleRowOfStep(step) * kStripN * sizeof(T));
        } else if constexpr (kPromotion == Promotion::kBlock) {
          if (step == kStepsPerBlock - 1) Promote(own_scales);
        }
      }
    }
  }

  __device__ void Clear() {
#pragma unroll
    for (int j = 0; j < kFragments; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        partial_[j][i] = 0;
        if constexpr (kFloat) sum_[j][i] = 0;
      }
    }
  }

  /// Sums of two neighbouring channels for token `fragment * 8 + lane % 4 * 2 + odd`.
  __device__ uint2 Pair(int fragment, int odd) const {
    if constexpr (kFloat) {
      return {__float_as_uint(sum_[fragment][odd]), __float_as_uint(sum_[fragment][2 + odd])};
    } else {
      return {static_cast<uint32_t>(partial_[fragment][odd]), static_cast<uint32_t>(partial_[fragment][2 + odd])};
    }
  }

 private:
  __device__ void Promote(const uint8_t* scales) {
    const float2 scale = Numeric<T>::ToFloat2(*reinterpret_cast<const ScalePair*>(scales));
#pragma unroll
    for (int j = 0; j < kFragments; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sum_[j][i] = fmaf(i < 2 ? scale.x : scale.y, static_cast<float>(partial_[j][i]), sum_[j][i]);
        partial_[j][i] = 0;
      }
    }
  }

  int partial_[kFragments][4] = {};
  float sum_[kFloat ? kFragments : 1][4] = {};
};

}  // namespace fptq::cuda

#endif  // FPTQ_CUDA_MMA_SUMS_CUH_
