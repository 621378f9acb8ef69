#include "cuda/workspace.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <string>
#include <utility>

namespace fptq::cuda {
namespace {

constexpr int64_t kLeastBytes = int64_t{1} << 20;

void Check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next check would report it again
  throw CudaError(std::string(what) + ": " + cudaGetErrorString(status));
}

bool IsCaptured(Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  Check(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

/// The workspaces in use, by device and stream.
struct Registry {
  std::mutex mutex;
  std::map<std::pair<int, Stream>, std::weak_ptr<StreamWorkspace>> streams;
};

Registry& TheRegistry() {
  static auto* registry = new Registry;  // kernels may outlive static objects
  return *registry;
}

}  // namespace

StreamWorkspace::~StreamWorkspace() {
  // Waits for what still runs. Nothing can be done about an error here, such as that of a runtime that is shut down.
  for (void* memory : retired_) cudaFree(memory);
  cudaFree(data_);
}

// A destroyed stream's handle may be given to a new one while the old one's kernels still run.
void StreamWorkspace::Follow(Stream stream) {
  unsigned long long number = 0;  // no other stream of the process ever has it
  Check(cudaStreamGetId(stream, &number), "cudaStreamGetId");
  if (stream_ != 0 && stream_ != number) Check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  stream_ = number;
}

uint8_t* StreamWorkspace::Reserve(Stream stream, int64_t bytes) {
  const bool captured = IsCaptured(stream);
  if (!captured) Follow(stream);  // not permitted in a capture, and runs come before it
  if (bytes > bytes_) {
    if (captured) {
      throw CudaError("its workspace of " + std::to_string(bytes) +
                      " bytes cannot be allocated while a CUDA graph is captured. Run once with as many rows before");
    }
    int64_t wanted = std::max(kLeastBytes, bytes_);
    while (wanted < bytes) wanted *= 2;
    if (captured_) {
      retired_.push_back(data_);
    } else {
      Check(cudaFree(data_), "cudaFree");  // waits for what still runs
    }
    data_ = nullptr;
    bytes_ = 0;
    captured_ = false;
    void* memory = nullptr;
    const cudaError_t status = cudaMalloc(&memory, static_cast<size_t>(wanted));
    if (status != cudaSuccess) {
      cudaGetLastError();
      throw CudaError("there is no memory for " + std::to_string(wanted) + " bytes of workspace (cudaMalloc: " +
                      cudaGetErrorString(status) + "). Run fewer rows at a time, or free device memory");
    }
    data_ = static_cast<uint8_t*>(memory);
    bytes_ = wanted;
  }
  captured_ |= captured;
  return data_;
}

StreamWorkspace& Workspaces::Of(Stream stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::shared_ptr<StreamWorkspace>& own = streams_[stream];
  if (own == nullptr) {
    int device = 0;
    Check(cudaGetDevice(&device), "cudaGetDevice");
    Registry& registry = TheRegistry();
    const std::lock_guard<std::mutex> registry_lock(registry.mutex);
    for (auto entry = registry.streams.begin(); entry != registry.streams.end();) {
      entry = entry->second.expired() ? registry.streams.erase(entry) : std::next(entry);
    }
    std::weak_ptr<StreamWorkspace>& shared = registry.streams[{device, stream}];
    own = shared.lock();
    if (own == nullptr) shared = own = std::make_shared<StreamWorkspace>();
  }
  return *own;
}

}  // namespace fptq::cuda
