// Device memory between the launches of one call. onnxruntime's KernelContext_GetScratchBuffer would be the obvious
// source, but ends the process where memory runs out: it may not throw, and what it calls does.
#ifndef FPTQ_CUDA_WORKSPACE_H_
#define FPTQ_CUDA_WORKSPACE_H_

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "cuda/kernels.h"

namespace fptq::cuda {

/// The memory of one stream. Calls queue all their launches before the next call may, so that the stream itself keeps
/// one call's kernels from the bytes that another's still read.
class StreamWorkspace {
 public:
  StreamWorkspace() = default;
  ~StreamWorkspace();
  StreamWorkspace(const StreamWorkspace&) = delete;
  StreamWorkspace& operator=(const StreamWorkspace&) = delete;

  /// Calls queue(data): `bytes` bytes, aligned to 256, that only launches on `stream` may touch. Throws CudaError where
  /// there is no memory, and where it would have to be allocated while `stream` is captured into a graph.
  template <class Queue>
  void Use(Stream stream, int64_t bytes, Queue&& queue) {
    const std::lock_guard<std::mutex> lock(mutex_);
    queue(Reserve(stream, bytes));
  }

 private:
  uint8_t* Reserve(Stream stream, int64_t bytes);
  void Follow(Stream stream);

  std::mutex mutex_;
  uint64_t stream_ = 0;  ///< CUDA's number of the stream, 0 before the first use
  uint8_t* data_ = nullptr;
  int64_t bytes_ = 0;
  bool captured_ = false;       ///< a graph may hold data_
  std::vector<void*> retired_;  ///< memory that graphs may hold
};

/// What one op kernel uses. Kernels that run on the same stream share its memory, which is freed with the last of them.
class Workspaces {
 public:
  /// The memory of a stream of the current device.
  StreamWorkspace& Of(Stream stream);

 private:
  std::mutex mutex_;
  std::map<Stream, std::shared_ptr<StreamWorkspace>> streams_;
};

}  // namespace fptq::cuda

#endif  // FPTQ_CUDA_WORKSPACE_H_
