// What the CPU kernels ask of onnxruntime.
#ifndef FPTQ_CPU_KERNEL_CONTEXT_H_
#define FPTQ_CPU_KERNEL_CONTEXT_H_

#include <cstdint>

#include "common/node_location.h"
#include "cpu/element.h"
#include "cpu/parallel.h"
#include "onnxruntime_cxx_api.h"

namespace fptq::cpu {

inline constexpr char kProvider[] = "CPUExecutionProvider";

constexpr ElementType ElementOf(ONNXTensorElementDataType type) {
  return type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT     ? ElementType::kFloat32
         : type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 ? ElementType::kFloat16
                                                         : ElementType::kBFloat16;
}

/// The session's intra-op pool.
inline Parallel PoolOf(const Ort::KernelContext& context) {
  return {&context, [](const void* pool, void (*function)(void*, size_t), size_t tasks, void* data) {
            static_cast<const Ort::KernelContext*>(pool)->ParallelFor(function, tasks, 0, data);
          }};
}

/// Scratch memory from the session's arena.
class Scratch {
 public:
  Scratch(const Ort::KernelContext& context, const Ort::MemoryInfo& memory, size_t bytes)
      : allocator_(context.GetAllocator(*static_cast<const OrtMemoryInfo*>(memory))), data_(allocator_.Alloc(bytes)) {
    if (data_ == nullptr) throw Ort::Exception(Concat("fptq: no memory for ", bytes, " bytes of scratch"), ORT_FAIL);
  }
  ~Scratch() { allocator_.Free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* data() const { return data_; }

 private:
  Ort::Allocator allocator_;
  void* data_;
};

}  // namespace fptq::cpu

#endif  // FPTQ_CPU_KERNEL_CONTEXT_H_
