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

}  // namespace

void LaunchStreamDynamic(const Device& device, const MatMulArguments& args, const DynamicMatMulCall& call,
                         const Plan& plan, Stream stream) {
  ForType(args.weights.type, [&](auto zero) {
    using T = decltype(zero);
    if (args.weights.encoding == Encoding::kInteger) {
      return LaunchOf<T, Promotion::kInteger>(device, args, call, plan, stream);
    }
    if (args.weights.layout.promotion_k == kBlockK) {
      return LaunchOf<T, Promotion::kBlock>(device, args, call, plan, stream);
    }
    LaunchOf<T, Promotion::kStep>(device, args, call, plan, stream);
  });
}

}  // namespace fptq::cuda
