#include "common/shape_inference.h"

#include <atomic>

namespace fptq {

SymbolicShape InferenceContext::InputShape(size_t index) const {
  const OrtApi& api = Ort::GetApi();
  OrtTensorTypeAndShapeInfo* info = nullptr;  // stays with the context
  size_t rank = 0;
  Ort::ThrowOnError(api.ShapeInferContext_GetInputTypeShape(context_, index, &info));
  Ort::ThrowOnError(api.GetDimensionsCount(info, &rank));
  std::vector<int64_t> sizes(rank);
  std::vector<const char*> names(rank);
  Ort::ThrowOnError(api.GetDimensions(info, sizes.data(), rank));
  Ort::ThrowOnError(api.GetSymbolicDimensions(info, names.data(), rank));
  SymbolicShape shape(rank);
  for (size_t i = 0; i < rank; ++i) shape[i] = {sizes[i], names[i] != nullptr ? names[i] : ""};
  return shape;
}

ONNXTensorElementDataType InferenceContext::InputType(size_t index) const {
  const OrtApi& api = Ort::GetApi();
  OrtTensorTypeAndShapeInfo* info = nullptr;  // stays with the context
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  Ort::ThrowOnError(api.ShapeInferContext_GetInputTypeShape(context_, index, &info));
  Ort::ThrowOnError(api.GetTensorElementType(info, &type));
  return type;
}

void InferenceContext::SetOutputShape(size_t index, const SymbolicShape& shape, ONNXTensorElementDataType type) {
  static std::atomic<unsigned> next{0};
  std::vector<int64_t> sizes;
  std::vector<std::string> names;
  for (const Dimension& dim : shape) {
    const bool known = dim.size >= 0;
    sizes.push_back(known ? dim.size : -1);
    names.push_back(known ? "" : dim.name.empty() ? "fptq_dim_" + std::to_string(next++) : dim.name);
  }
  std::vector<const char*> name_pointers;
  for (const std::string& name : names) name_pointers.push_back(name.c_str());

  const OrtApi& api = Ort::GetApi();
  OrtTensorTypeAndShapeInfo* raw = nullptr;
  Ort::ThrowOnError(api.CreateTensorTypeAndShapeInfo(&raw));
  const Ort::TensorTypeAndShapeInfo info(raw);
  Ort::ThrowOnError(api.SetTensorElementType(raw, type));
  Ort::ThrowOnError(api.SetDimensions(raw, sizes.data(), sizes.size()));
  Ort::ThrowOnError(api.SetSymbolicDimensions(raw, name_pointers.data(), name_pointers.size()));
  Ort::ThrowOnError(api.ShapeInferContext_SetOutputTypeShape(context_, index, raw));
}

}  // namespace fptq
