// What every op of the library shares: exceptions become OrtStatus at the C boundary.
#ifndef FPTQ_COMMON_OP_BASE_H_
#define FPTQ_COMMON_OP_BASE_H_

#include <exception>
#include <utility>

#include "common/shape_inference.h"
#include "onnxruntime_cxx_api.h"

namespace fptq {

/// Runs `body`; no exception leaves. Returns nullptr or a status owned by the caller.
template <class Body>
OrtStatus* ToStatus(Body&& body) noexcept {
  try {
    std::forward<Body>(body)();
    return nullptr;
  } catch (const Ort::Exception& error) {
    return Ort::GetApi().CreateStatus(error.GetOrtErrorCode(), error.what());
  } catch (const std::exception& error) {
    return Ort::GetApi().CreateStatus(ORT_RUNTIME_EXCEPTION, error.what());
  }
}

/// Adds onnxruntime's status-returning entry to a kernel that throws.
template <class Kernel>
struct StatusKernel : Kernel {
  using Kernel::Kernel;
  OrtStatusPtr ComputeV2(OrtKernelContext* context) noexcept {
    return ToStatus([&] { this->Compute(Ort::KernelContext(context)); });
  }
};

/// Base of an op: `Op` is the derived class, `Kernel` has
///   explicit Kernel(Ort::ConstKernelInfo)      checks everything known at session creation
///   void Compute(Ort::KernelContext)           may throw Ort::Exception
///   static constexpr const char* kProvider     execution provider, e.g. "CPUExecutionProvider"
///   static OrtMemType InputMemoryType(size_t)
/// and `Op::InferShapes(InferenceContext&)` sets the output shapes it can.
template <class Op, class Kernel>
struct OpBase : Ort::CustomOpBase<Op, StatusKernel<Kernel>, /*WithStatus=*/true> {
  OpBase() {
    // Inference never fails a model: what is wrong is reported by the kernel, which knows the node's name.
    OrtCustomOp::InferOutputShapeFn = [](const OrtCustomOp*, OrtShapeInferContext* raw) -> OrtStatusPtr {
      OrtStatus* status = ToStatus([&] {
        InferenceContext context(raw);
        Op::InferShapes(context);
      });
      if (status != nullptr) Ort::GetApi().ReleaseStatus(status);
      return nullptr;
    };
  }

  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const noexcept {
    return ToStatus([&] { *kernel = new StatusKernel<Kernel>(Ort::ConstKernelInfo(info)); });
  }
  const char* GetExecutionProviderType() const { return Kernel::kProvider; }
  OrtMemType GetInputMemoryType(size_t index) const { return Kernel::InputMemoryType(index); }
};

}  // namespace fptq

#endif  // FPTQ_COMMON_OP_BASE_H_
