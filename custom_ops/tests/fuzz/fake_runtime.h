// As much of onnxruntime's C API as the op library asks for, so that its real entry points can be called with nodes
// that a runtime would meet only once in a million models. What a runtime promises holds here too: types are those that
// the op declares, every input is there, a tensor has the bytes of its shape.
#ifndef FPTQ_TESTS_FUZZ_FAKE_RUNTIME_H_
#define FPTQ_TESTS_FUZZ_FAKE_RUNTIME_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "onnxruntime_c_api.h"

/// A tensor in memory of exactly its size, so that AddressSanitizer sees one byte too many; or, where `misaligned`, one
/// byte off, as in a memory-mapped file.
struct OrtValue {
  OrtValue() = default;
  OrtValue(ONNXTensorElementDataType element_type, std::vector<int64_t> dims, bool misaligned = false);

  size_t bytes() const { return size_; }
  uint8_t* data() const { return memory_.get() + offset_; }

  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  std::vector<int64_t> shape;

 private:
  std::unique_ptr<uint8_t[]> memory_;
  size_t size_ = 0;
  size_t offset_ = 0;
};

struct OrtTensorTypeAndShapeInfo {
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  std::vector<int64_t> shape;
  std::vector<std::string> names;
};

namespace fptq::fuzz {

using Attribute =
    std::variant<int64_t, float, std::string, std::vector<int64_t>, std::vector<float>, std::vector<std::string>>;

/// A node as it stands in a model: what is declared need not be what is fed.
struct Node {
  std::string name;
  std::vector<std::pair<std::string, Attribute>> attributes;
  std::vector<OrtTensorTypeAndShapeInfo> declared;  ///< of the inputs
  std::vector<const OrtValue*> constants;           ///< of the inputs; nullptr where one is not constant
};

/// What a call gave.
struct Result {
  bool ok = false;
  std::string message;
};

/// All ops that the library registers, by its own entry point.
const std::vector<const OrtCustomOp*>& RegisteredOps();

/// Registers the library with one more session.
Result Register();

/// A kernel of a node; its destructor destroys the kernel.
class Kernel {
 public:
  Kernel(const OrtCustomOp& op, const Node& node);
  ~Kernel();
  Kernel(const Kernel&) = delete;
  Kernel& operator=(const Kernel&) = delete;

  const Result& created() const { return created_; }
  /// `threads`: of the loop inside; calls may run at the same time.
  Result Run(const std::vector<const OrtValue*>& inputs, std::vector<OrtValue>* outputs, int threads = 1) const;

 private:
  const OrtCustomOp& op_;
  void* kernel_ = nullptr;
  Result created_;
};

/// The shapes that the op infers for its outputs; an empty type where it says nothing.
std::vector<OrtTensorTypeAndShapeInfo> InferShapes(const OrtCustomOp& op, const Node& node);

}  // namespace fptq::fuzz

#endif  // FPTQ_TESTS_FUZZ_FAKE_RUNTIME_H_
