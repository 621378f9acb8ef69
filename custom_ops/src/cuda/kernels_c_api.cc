#include "cuda/kernels_c_api.h"

#include <exception>
#include <memory>
#include <string>

#include "cuda/kernels.h"

struct FptqWeights {
  std::unique_ptr<fptq::cuda::PackedWeights> packed;
};

namespace {

using fptq::cuda::DataType;
using fptq::cuda::Device;
using fptq::cuda::Stream;

thread_local std::string last_error;

/// Runs `body`; an exception becomes 1 and a message.
template <class Body>
int Guarded(Body&& body) noexcept {
  try {
    body();
    return 0;
  } catch (const std::exception& error) {
    last_error = error.what();
    return 1;
  }
}

fptq::cuda::Plan ToPlan(const FptqMatMulOptions* options) {
  fptq::cuda::Plan plan;
  if (options == nullptr) return plan;
  plan.kernel = static_cast<fptq::cuda::Kernel>(options->kernel);
  plan.loader = static_cast<fptq::cuda::Loader>(options->loader);
  plan.config = {options->tile_m, options->tile_n, options->split_k, options->stages, 0};
  plan.config.form = static_cast<fptq::plan::StreamForm>(options->form);
  plan.overlap = options->overlap == 0;
  return plan;
}

}  // namespace

extern "C" {

const char* fptq_last_error(void) { return last_error.c_str(); }

int fptq_pack_weights(const void* b, const void* b_scale, int32_t dtype, int64_t k, int64_t n, int64_t block_size,
                      int32_t scale_max_multiple, void* stream, FptqWeights** weights) {
  return Guarded([&] {
    auto result = std::make_unique<FptqWeights>();
    result->packed = fptq::cuda::PackedWeights::Pack(b, b_scale, static_cast<DataType>(dtype), k, n, block_size,
                                                     scale_max_multiple, static_cast<Stream>(stream));
    *weights = result.release();
  });
}

void fptq_free_weights(FptqWeights* weights) { delete weights; }

int64_t fptq_weights_bytes(const FptqWeights* weights) { return weights->packed->bytes(); }

int32_t fptq_weights_integer_scales(const FptqWeights* weights) {
  return weights->packed->view().encoding == fptq::packing::Encoding::kInteger ? 1 : 0;
}

int fptq_w4a8_matmul(const FptqWeights* weights, const void* a, const void* a_scale, int32_t per_token,
                     const void* a_zero_point, int64_t m, void* y, const FptqMatMulOptions* options, void* stream) {
  return Guarded([&] {
    fptq::cuda::MatMulCall call;
    call.a = static_cast<const uint8_t*>(a);
    call.a_scale = static_cast<const float*>(a_scale);
    call.per_token = per_token != 0;
    call.a_zero_point = static_cast<const uint8_t*>(a_zero_point);
    call.m = m;
    call.y = y;
    fptq::cuda::LaunchMatMul(weights->packed->device(), weights->packed->view(), call, static_cast<Stream>(stream),
                             ToPlan(options));
  });
}

int fptq_dynamic_w4a8_matmul(const FptqWeights* weights, const void* x, int64_t m, void* y, void* q, void* scale,
                             const FptqMatMulOptions* options, void* stream) {
  return Guarded([&] {
    const fptq::cuda::DynamicMatMulCall call = {x, m, y, static_cast<uint8_t*>(q), static_cast<float*>(scale)};
    fptq::cuda::LaunchDynamicMatMul(weights->packed->device(), weights->packed->view(), call,
                                    static_cast<Stream>(stream), ToPlan(options));
  });
}

int fptq_quantizes_inside(const FptqWeights* weights, const void* x, int64_t m, int32_t* inside) {
  return Guarded([&] {
    const fptq::cuda::DynamicMatMulCall call = {x, m, nullptr, nullptr, nullptr};
    *inside = fptq::cuda::QuantizesInside(weights->packed->device(), weights->packed->view(), call) ? 1 : 0;
  });
}

int fptq_describe_plan(const FptqWeights* weights, int64_t m, FptqMatMulOptions* chosen) {
  return Guarded([&] {
    const fptq::cuda::WeightView& view = weights->packed->view();
    const fptq::cuda::Plan plan = fptq::cuda::ChoosePlan(weights->packed->device(), view, m, view.layout.k % 16 == 0);
    *chosen = {static_cast<int32_t>(plan.kernel),
               static_cast<int32_t>(plan.loader),
               plan.config.tile_m,
               plan.config.tile_n,
               plan.config.split_k,
               plan.config.stages,
               plan.overlap ? 0 : 1,
               static_cast<int32_t>(plan.config.form)};
  });
}

int fptq_dynamic_quantize_per_token(const void* x, int32_t dtype, int64_t m, int64_t k, void* q, void* scale,
                                    void* stream) {
  return Guarded([&] {
    fptq::cuda::LaunchDynamicQuantize(Device::Current(), static_cast<DataType>(dtype), x, m, k,
                                      static_cast<uint8_t*>(q), static_cast<float*>(scale),
                                      static_cast<Stream>(stream));
  });
}

int fptq_quantize_static(const void* x, int32_t dtype, int64_t count, const void* scale, const void* zero_point,
                         void* q, void* stream) {
  return Guarded([&] {
    fptq::cuda::LaunchStaticQuantize(Device::Current(), static_cast<DataType>(dtype), x, count,
                                     static_cast<const float*>(scale), static_cast<const uint8_t*>(zero_point),
                                     static_cast<uint8_t*>(q), static_cast<Stream>(stream));
  });
}

int fptq_bench_read(const void* data, int64_t bytes, void* sink, void* stream) {
  return Guarded(
      [&] { fptq::cuda::LaunchReadBenchmark(Device::Current(), data, bytes, sink, static_cast<Stream>(stream)); });
}

int fptq_bench_wgmma(int32_t iterations, void* sink, void* stream) {
  return Guarded(
      [&] { fptq::cuda::LaunchWgmmaBenchmark(Device::Current(), iterations, sink, static_cast<Stream>(stream)); });
}

}  // extern "C"
