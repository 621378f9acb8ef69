#include "fake_runtime.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>

#include "fptq/fptq_ops.h"

struct OrtStatus {
  OrtErrorCode code;
  std::string message;
};
struct OrtTypeInfo {
  OrtTensorTypeAndShapeInfo tensor;
};
struct OrtKernelInfo {
  const fptq::fuzz::Node* node;
};
struct OrtKernelContext {
  const std::vector<const OrtValue*>* inputs;
  std::vector<OrtValue>* outputs;
  const OrtCustomOp* op;
  int threads;
};
struct OrtShapeInferContext {
  const fptq::fuzz::Node* node;
  std::vector<OrtTensorTypeAndShapeInfo> inputs;
  std::vector<OrtTensorTypeAndShapeInfo> outputs;
};
struct OrtMemoryInfo {
  int unused;
};
struct OrtCustomOpDomain {
  std::vector<const OrtCustomOp*> ops;
};
struct OrtSessionOptions {
  std::vector<const OrtCustomOpDomain*> domains;
};

namespace fptq::fuzz {
namespace {

OrtMemoryInfo host_memory;
OrtStatus* Fail(const char* message) { return new OrtStatus{ORT_INVALID_ARGUMENT, message}; }

size_t BitsOf(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32:
      return 32;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
      return 16;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT4:
      return 4;
    default:
      return 8;
  }
}

template <class T>
OrtStatus* GetAttribute(const OrtKernelInfo* info, const char* name, T* out) {
  for (const auto& [key, value] : info->node->attributes) {
    if (key != name) continue;
    if (const T* found = std::get_if<T>(&value)) {
      *out = *found;
      return nullptr;
    }
    return Fail("attribute of another type");
  }
  return Fail("no such attribute");
}

template <class T>
OrtStatus* GetArray(const OrtKernelInfo* info, const char* name, T* out, size_t* size) {
  std::vector<T> found;
  if (OrtStatus* status = GetAttribute(info, name, &found)) return status;
  if (out != nullptr) std::memcpy(out, found.data(), std::min(*size, found.size()) * sizeof(T));
  *size = found.size();
  return nullptr;
}

OrtStatus* CopyText(const std::string& text, char* out, size_t* size) {
  if (out != nullptr) {
    if (*size < text.size() + 1) return Fail("the buffer is too small");
    std::memcpy(out, text.c_str(), text.size() + 1);
  }
  *size = text.size() + 1;
  return nullptr;
}

OrtStatus* RunLoop(const OrtKernelContext* context, void (*function)(void*, size_t), size_t total, void* data) {
  std::atomic<size_t> next{0};
  const auto work = [&] {
    for (size_t task = next++; task < total; task = next++) function(data, task);
  };
  std::vector<std::thread> others;
  for (int i = 1; i < context->threads; ++i) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
  return nullptr;
}

OrtApi MakeApi() {
  OrtApi api{};  // what is not set here is a null pointer: the library must not ask for it
  api.CreateStatus = [](OrtErrorCode code, const char* message) noexcept { return new OrtStatus{code, message}; };
  api.GetErrorCode = [](const OrtStatus* status) noexcept { return status->code; };
  api.GetErrorMessage = [](const OrtStatus* status) noexcept { return status->message.c_str(); };
  api.ReleaseStatus = [](OrtStatus* status) noexcept { delete status; };

  api.CreateCustomOpDomain = [](const char*, OrtCustomOpDomain** out) noexcept -> OrtStatus* {
    *out = new OrtCustomOpDomain;
    return nullptr;
  };
  api.ReleaseCustomOpDomain = [](OrtCustomOpDomain* domain) noexcept { delete domain; };
  api.CustomOpDomain_Add = [](OrtCustomOpDomain* domain, const OrtCustomOp* op) noexcept -> OrtStatus* {
    domain->ops.push_back(op);
    return nullptr;
  };
  api.AddCustomOpDomain = [](OrtSessionOptions* options, OrtCustomOpDomain* domain) noexcept -> OrtStatus* {
    options->domains.push_back(domain);
    return nullptr;
  };

  api.KernelInfo_GetNodeName = [](const OrtKernelInfo* info, char* out, size_t* size) noexcept {
    return CopyText(info->node->name, out, size);
  };
  api.KernelInfo_GetInputTypeInfo = [](const OrtKernelInfo* info, size_t index,
                                       OrtTypeInfo** out) noexcept -> OrtStatus* {
    if (index >= info->node->declared.size()) return Fail("no such input");
    *out = new OrtTypeInfo{info->node->declared[index]};
    return nullptr;
  };
  api.ReleaseTypeInfo = [](OrtTypeInfo* info) noexcept { delete info; };
  api.CastTypeInfoToTensorInfo = [](const OrtTypeInfo* info,
                                    const OrtTensorTypeAndShapeInfo** out) noexcept -> OrtStatus* {
    *out = &info->tensor;
    return nullptr;
  };
  api.KernelInfoGetConstantInput_tensor = [](const OrtKernelInfo* info, size_t index, int* is_constant,
                                             const OrtValue** out) noexcept -> OrtStatus* {
    *out = index < info->node->constants.size() ? info->node->constants[index] : nullptr;
    *is_constant = *out != nullptr ? 1 : 0;
    return nullptr;
  };
  api.KernelInfoGetAttribute_int64 = [](const OrtKernelInfo* info, const char* name, int64_t* out) noexcept {
    return GetAttribute(info, name, out);
  };
  api.KernelInfoGetAttribute_float = [](const OrtKernelInfo* info, const char* name, float* out) noexcept {
    return GetAttribute(info, name, out);
  };
  api.KernelInfoGetAttribute_string = [](const OrtKernelInfo* info, const char* name, char* out,
                                         size_t* size) noexcept -> OrtStatus* {
    std::string text;
    if (OrtStatus* status = GetAttribute(info, name, &text)) return status;
    return CopyText(text, out, size);
  };
  api.KernelInfoGetAttributeArray_int64 = [](const OrtKernelInfo* info, const char* name, int64_t* out,
                                             size_t* size) noexcept { return GetArray(info, name, out, size); };
  api.KernelInfoGetAttributeArray_float = [](const OrtKernelInfo* info, const char* name, float* out,
                                             size_t* size) noexcept { return GetArray(info, name, out, size); };
  api.KernelInfo_GetLogger = [](const OrtKernelInfo*, const OrtLogger** out) noexcept -> OrtStatus* {
    *out = nullptr;
    return nullptr;
  };
  api.Logger_GetLoggingSeverityLevel = [](const OrtLogger*, OrtLoggingLevel* out) noexcept -> OrtStatus* {
    *out = ORT_LOGGING_LEVEL_FATAL;
    return nullptr;
  };
  api.Logger_LogMessage = [](const OrtLogger*, OrtLoggingLevel, const char* message, const ORTCHAR_T*, int,
                             const char*) noexcept -> OrtStatus* {
    return std::strlen(message) > 0 ? nullptr : Fail("an empty message");
  };

  api.CreateTensorTypeAndShapeInfo = [](OrtTensorTypeAndShapeInfo** out) noexcept -> OrtStatus* {
    *out = new OrtTensorTypeAndShapeInfo;
    return nullptr;
  };
  api.ReleaseTensorTypeAndShapeInfo = [](OrtTensorTypeAndShapeInfo* info) noexcept { delete info; };
  api.GetTensorElementType = [](const OrtTensorTypeAndShapeInfo* info,
                                ONNXTensorElementDataType* out) noexcept -> OrtStatus* {
    *out = info->type;
    return nullptr;
  };
  api.SetTensorElementType = [](OrtTensorTypeAndShapeInfo* info,
                                ONNXTensorElementDataType type) noexcept -> OrtStatus* {
    info->type = type;
    return nullptr;
  };
  api.GetDimensionsCount = [](const OrtTensorTypeAndShapeInfo* info, size_t* out) noexcept -> OrtStatus* {
    *out = info->shape.size();
    return nullptr;
  };
  api.GetDimensions = [](const OrtTensorTypeAndShapeInfo* info, int64_t* out, size_t size) noexcept -> OrtStatus* {
    for (size_t i = 0; i < std::min(size, info->shape.size()); ++i) out[i] = info->shape[i];
    return nullptr;
  };
  api.GetSymbolicDimensions = [](const OrtTensorTypeAndShapeInfo* info, const char** out,
                                 size_t size) noexcept -> OrtStatus* {
    for (size_t i = 0; i < size; ++i) out[i] = i < info->names.size() ? info->names[i].c_str() : "";
    return nullptr;
  };
  api.SetDimensions = [](OrtTensorTypeAndShapeInfo* info, const int64_t* dims, size_t size) noexcept -> OrtStatus* {
    info->shape.assign(dims, dims + size);
    return nullptr;
  };
  api.SetSymbolicDimensions = [](OrtTensorTypeAndShapeInfo* info, const char** names,
                                 size_t size) noexcept -> OrtStatus* {
    info->names.assign(names, names + size);
    return nullptr;
  };
  api.ShapeInferContext_GetInputTypeShape = [](const OrtShapeInferContext* context, size_t index,
                                               OrtTensorTypeAndShapeInfo** out) noexcept -> OrtStatus* {
    if (index >= context->inputs.size()) return Fail("no such input");
    *out = const_cast<OrtTensorTypeAndShapeInfo*>(&context->inputs[index]);
    return nullptr;
  };
  api.ShapeInferContext_SetOutputTypeShape = [](const OrtShapeInferContext* context, size_t index,
                                                const OrtTensorTypeAndShapeInfo* info) noexcept -> OrtStatus* {
    auto& outputs = const_cast<OrtShapeInferContext*>(context)->outputs;
    if (index >= outputs.size()) return Fail("no such output");
    outputs[index] = *info;
    return nullptr;
  };

  api.GetTensorTypeAndShape = [](const OrtValue* value, OrtTensorTypeAndShapeInfo** out) noexcept -> OrtStatus* {
    *out = new OrtTensorTypeAndShapeInfo{value->type, value->shape, {}};
    return nullptr;
  };
  api.GetTensorData = [](const OrtValue* value, const void** out) noexcept -> OrtStatus* {
    *out = value->data();
    return nullptr;
  };
  api.GetTensorMutableData = [](OrtValue* value, void** out) noexcept -> OrtStatus* {
    *out = value->data();
    return nullptr;
  };
  api.GetTensorMemoryInfo = [](const OrtValue*, const OrtMemoryInfo** out) noexcept -> OrtStatus* {
    *out = &host_memory;
    return nullptr;
  };
  api.MemoryInfoGetDeviceType = [](const OrtMemoryInfo*, OrtMemoryInfoDeviceType* out) noexcept {
    *out = OrtMemoryInfoDeviceType_CPU;
  };
  api.CreateCpuMemoryInfo = [](OrtAllocatorType, OrtMemType, OrtMemoryInfo** out) noexcept -> OrtStatus* {
    *out = new OrtMemoryInfo;
    return nullptr;
  };
  api.ReleaseMemoryInfo = [](OrtMemoryInfo* info) noexcept { delete info; };

  api.KernelContext_GetInput = [](const OrtKernelContext* context, size_t index,
                                  const OrtValue** out) noexcept -> OrtStatus* {
    *out = index < context->inputs->size() ? (*context->inputs)[index] : nullptr;
    return nullptr;
  };
  api.KernelContext_GetOutput = [](OrtKernelContext* context, size_t index, const int64_t* dims, size_t rank,
                                   OrtValue** out) noexcept -> OrtStatus* {
    if (index >= context->outputs->size()) return Fail("no such output");
    OrtValue& output = (*context->outputs)[index];
    try {
      output = OrtValue(context->op->GetOutputType(context->op, index), std::vector<int64_t>(dims, dims + rank));
    } catch (const std::bad_alloc&) {
      return Fail("no memory");
    }
    std::memset(output.data(), 0xaa, output.bytes());
    *out = &output;
    return nullptr;
  };
  api.KernelContext_GetAllocator = [](const OrtKernelContext*, const OrtMemoryInfo*,
                                      OrtAllocator** out) noexcept -> OrtStatus* {
    *out = new OrtAllocator{};
    return nullptr;
  };
  api.ReleaseAllocator = [](OrtAllocator* allocator) noexcept { delete allocator; };
  api.AllocatorAlloc = [](OrtAllocator*, size_t size, void** out) noexcept -> OrtStatus* {
    *out = std::malloc(size);
    return nullptr;
  };
  api.AllocatorFree = [](OrtAllocator*, void* memory) noexcept -> OrtStatus* {
    std::free(memory);
    return nullptr;
  };
  api.KernelContext_ParallelFor = [](const OrtKernelContext* context, void (*function)(void*, size_t), size_t total,
                                     size_t, void* data) noexcept { return RunLoop(context, function, total, data); };
  return api;
}

const OrtApi* Api() {
  static const OrtApi api = MakeApi();
  return &api;
}

Result ResultOf(OrtStatus* status) {
  const std::unique_ptr<OrtStatus> owned(status);
  return owned == nullptr ? Result{true, ""} : Result{false, owned->message};
}

OrtStatus* RegisterWith(OrtSessionOptions* options) {
  static const OrtApiBase base = {[](uint32_t) noexcept { return Api(); }, []() noexcept { return "1.29.0"; }};
  return RegisterCustomOps(options, &base);
}

}  // namespace

const std::vector<const OrtCustomOp*>& RegisteredOps() {
  static const std::vector<const OrtCustomOp*> ops = [] {
    OrtSessionOptions options;
    const Result result = ResultOf(RegisterWith(&options));
    if (!result.ok || options.domains.size() != 1) std::abort();
    return options.domains[0]->ops;
  }();
  return ops;
}

Result Register() {
  OrtSessionOptions options;
  return ResultOf(RegisterWith(&options));
}

Kernel::Kernel(const OrtCustomOp& op, const Node& node) : op_(op) {
  const OrtKernelInfo info{&node};
  created_ = ResultOf(op.CreateKernelV2(&op, Api(), &info, &kernel_));
}

Kernel::~Kernel() {
  if (kernel_ != nullptr) op_.KernelDestroy(kernel_);
}

Result Kernel::Run(const std::vector<const OrtValue*>& inputs, std::vector<OrtValue>* outputs, int threads) const {
  outputs->clear();
  outputs->resize(op_.GetOutputTypeCount(&op_));
  OrtKernelContext context{&inputs, outputs, &op_, threads};
  return ResultOf(op_.KernelComputeV2(kernel_, &context));
}

std::vector<OrtTensorTypeAndShapeInfo> InferShapes(const OrtCustomOp& op, const Node& node) {
  OrtShapeInferContext context{&node, node.declared, {}};
  context.outputs.resize(op.GetOutputTypeCount(&op));
  if (!ResultOf(op.InferOutputShapeFn(&op, &context)).ok) std::abort();  // inference never fails a model
  return context.outputs;
}

}  // namespace fptq::fuzz

OrtValue::OrtValue(ONNXTensorElementDataType element_type, std::vector<int64_t> dims, bool misaligned)
    : type(element_type), shape(std::move(dims)), offset_(misaligned ? 1 : 0) {
  size_t elements = 1;
  for (const int64_t dim : shape) elements *= static_cast<size_t>(dim);
  size_ = (elements * fptq::fuzz::BitsOf(type) + 7) / 8;
  if (size_ > size_t{1} << 32) throw std::bad_alloc();
  memory_ = std::make_unique<uint8_t[]>(size_ + offset_);
}
