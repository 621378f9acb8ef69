// Small M on sm_90 and newer: uint8 activations.

#include "cuda/stream_kernel.cuh"

namespace fptq::cuda {
namespace {

template <class T, Promotion kPromotion>
void LaunchStreamOf(const Device& device, const MatMulArguments& args, const Plan& plan, Stream stream) {
  const auto launch = [&](auto tokens, auto form) {
    constexpr int kTokens = decltype(tokens)::value;
    constexpr plan::StreamForm kForm = decltype(form)::value;
    if constexpr (kTokens <= 8) {
      LaunchStreamKernel<T, kPromotion, kTokens, kForm>(device, args, ByteActivations{}, plan, stream);
    } else {
      const CUtensorMap map = ActivationMap(device, args.call, args.weights.layout.k, kTokens);
      LaunchStreamKernel<T, kPromotion, kTokens, kForm>(device, args, map, plan, stream);
    }
  };
  switch (plan.config.tile_m) {
    case 8:
      return ForStreamForm<kPromotion, 8>(plan.config.form, launch);
    case 16:
      return ForStreamForm<kPromotion, 16>(plan.config.form, launch);
    case 32:
      return ForStreamForm<kPromotion, 32>(plan.config.form, launch);
    case 64:
      return ForStreamForm<kPromotion, 64>(plan.config.form, launch);
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
  const auto kernel = StreamKernel<__half, Promotion::kBlock, 8, plan::StreamForm::kWide, ByteActivations>;
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
