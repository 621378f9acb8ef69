// Small M on sm_90 and newer: float activations, up to eight tokens, quantized by the kernel that multiplies them.

#include "cuda/stream_kernel.cuh"

namespace fptq::cuda {
namespace {

template <class T, Promotion kPromotion>
void LaunchOf(const Device& device, const MatMulArguments& args, const DynamicMatMulCall& call, const Plan& plan,
              Stream stream) {
  ForStreamForm<kPromotion, plan::kQuantizingTile>(plan.config.form, [&](auto tokens, auto form) {
    constexpr plan::StreamForm kForm = decltype(form)::value;
    if constexpr (plan::HasQuantizingForm(kForm, kScalesOf<kPromotion>)) {
      FloatActivations source;
      source.x = call.x;
      source.log_slices = plan::StreamLogSlices(kForm, static_cast<int>(call.m));
      LaunchStreamKernel<T, kPromotion, decltype(tokens)::value, kForm>(device, args, source, plan, stream);
    } else {
      throw CudaError("the streaming kernel has no such form that quantizes");
    }
  });
}

/// Calls `body` with zero of the weights' type and a std::integral_constant of the promotion.
template <class Body>
void ForInt4Weights(const WeightView& weights, Body&& body) {
  ForType(weights.type, [&](auto zero) {
    if (weights.encoding == Encoding::kInteger) {
      body(zero, std::integral_constant<Promotion, Promotion::kInteger>{});
    } else if (weights.layout.promotion_k == kBlockK) {
      body(zero, std::integral_constant<Promotion, Promotion::kBlock>{});
    } else {
      body(zero, std::integral_constant<Promotion, Promotion::kStep>{});
    }
  });
}

}  // namespace

void LaunchStreamDynamic(const Device& device, const MatMulArguments& args, const DynamicMatMulCall& call,
                         const Plan& plan, Stream stream) {
  ForInt4Weights(args.weights, [&](auto zero, auto promotion) {
    LaunchOf<decltype(zero), decltype(promotion)::value>(device, args, call, plan, stream);
  });
}

}  // namespace fptq::cuda
