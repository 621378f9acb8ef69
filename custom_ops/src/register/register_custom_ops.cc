#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <mutex>

#include "common/op_names.h"
#include "cpu/cpu_ops.h"
#include "fptq/fptq_ops.h"
#include "onnxruntime_cxx_api.h"
#include "register/op_registry.h"
#ifdef FPTQ_WITH_CUDA
#include "cuda/cuda_ops.h"
#endif

namespace {

constexpr uint32_t kOldestRuntime = 23;  // 1.23: INT4 custom-op inputs and shape inference as used here

// A runtime answers nullptr when asked for a newer API than its own, so ask for the older of the two.
uint32_t NegotiatedVersion(const OrtApiBase* base) {
  unsigned major = 0, minor = 0;
  if (std::sscanf(base->GetVersionString(), "%u.%u", &major, &minor) != 2) return 0;
  return major > 1 ? ORT_API_VERSION : std::min<uint32_t>(minor, ORT_API_VERSION);
}

fptq::OpRegistry* BuildRegistry(uint32_t version) {
  auto* registry = new fptq::OpRegistry(fptq::kDomain, version);  // lives as long as the process
  fptq::cpu::AddCpuOps(*registry);
#ifdef FPTQ_WITH_CUDA
  fptq::cuda::AddCudaOps(*registry);
#endif
  return registry;
}

}  // namespace

OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  static std::mutex mutex;
  static const OrtApi* bound_api = nullptr;
  static fptq::OpRegistry* registry = nullptr;

  const OrtApi* oldest_api = base->GetApi(1);
  const uint32_t version = NegotiatedVersion(base);
  const OrtApi* api = version >= kOldestRuntime ? base->GetApi(version) : nullptr;
  if (api == nullptr) {
    return oldest_api->CreateStatus(
        ORT_FAIL, "libfptq_ops: this onnxruntime is older than 1.23. Install onnxruntime 1.23 or newer.");
  }
  try {
    const std::lock_guard<std::mutex> lock(mutex);
    if (bound_api != nullptr && bound_api != api) {
      return api->CreateStatus(ORT_FAIL,
                               "libfptq_ops: another copy of onnxruntime in this process already uses this library. "
                               "Use one onnxruntime per process, or a copy of the library under another name.");
    }
    if (bound_api == nullptr) Ort::InitApi(api);  // once: sessions that run already read it
    bound_api = api;
    if (registry == nullptr) registry = BuildRegistry(version);
    return api->AddCustomOpDomain(options, registry->domain());
  } catch (const std::exception& error) {
    return api->CreateStatus(ORT_RUNTIME_EXCEPTION, error.what());
  }
}

OrtStatus* ORT_API_CALL FptqRegisterOps(OrtSessionOptions* options, const OrtApiBase* base) {
  return RegisterCustomOps(options, base);
}
