#include "op_case.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cpu/element.h"
#include "cpu/isa.h"
#include "cpu/packed_weights.h"
#include "fake_runtime.h"

namespace fptq::fuzz {
namespace {

using Shape = std::vector<int64_t>;
using cpu::ElementType;

[[noreturn]] void Wrong(const std::string& what) {
  std::fprintf(stderr, "op_case: %s\n", what.c_str());
  std::abort();
}

// Choices, read off bytes; all zero where there are no more.
class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  uint8_t Next() { return at_ < size_ ? data_[at_++] : 0; }
  uint32_t Next32() { return Next() | uint32_t{Next()} << 8 | uint32_t{Next()} << 16 | uint32_t{Next()} << 24; }
  int64_t Uniform(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(Next32() % static_cast<uint64_t>(high - low + 1));
  }
  bool OneIn(int count) { return Next() % count == 0; }
  template <class T>
  const T& Of(const std::vector<T>& choices) {
    return choices[Next32() % choices.size()];
  }

 private:
  const uint8_t* data_;
  size_t size_;
  size_t at_ = 0;
};

ElementType ElementOf(ONNXTensorElementDataType type) {
  return type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT     ? ElementType::kFloat32
         : type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 ? ElementType::kFloat16
                                                         : ElementType::kBFloat16;
}

bool IsFloat(ONNXTensorElementDataType type) {
  return type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT || type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 ||
         type == ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
}

int64_t Product(const Shape& shape) {
  int64_t product = 1;
  for (const int64_t dim : shape) product *= dim;
  return product;
}

int64_t Length(Bytes& bytes) {
  static const std::vector<int64_t> edges = {1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 160};
  return bytes.OneIn(2) ? bytes.Of(edges) : bytes.Uniform(1, 96);
}

// Any shape that a tensor of little memory may have.
Shape TensorShape(Bytes& bytes) {
  Shape shape;
  int64_t elements = 1;
  for (int64_t rank = bytes.Uniform(0, 5); rank > 0; --rank) {
    const int64_t dim = bytes.OneIn(6) ? 0 : bytes.OneIn(3) ? 1 : Length(bytes);
    elements *= std::max<int64_t>(dim, 1);
    shape.push_back(elements > 1 << 14 ? 1 : dim);
    if (elements > 1 << 14) elements = 1 << 14;
  }
  return shape;
}

// Any shape that a model may declare.
Shape DeclaredShape(Bytes& bytes) {
  constexpr int64_t kMin = std::numeric_limits<int64_t>::min(), kMax = std::numeric_limits<int64_t>::max();
  static const std::vector<int64_t> edges = {-1, -2, 0, 1, 2, 64, kMin, kMax, int64_t{1} << 62, int64_t{1} << 40};
  Shape shape;
  for (int64_t rank = bytes.Uniform(0, 5); rank > 0; --rank) shape.push_back(bytes.Of(edges));
  return shape;
}

enum class Values { kOrdinary, kZero, kTiny, kHuge, kSpecial };

float FloatValue(std::mt19937& random, Values values) {
  const float uniform = static_cast<float>(static_cast<int>(random() % 2001) - 1000) / 256.0f;
  switch (values) {
    case Values::kZero:
      return random() % 4 == 0 ? -0.0f : 0.0f;
    case Values::kTiny:
      return std::ldexp(uniform, -130 - static_cast<int>(random() % 20));
    case Values::kHuge:
      return std::ldexp(uniform, 100 + static_cast<int>(random() % 26));
    case Values::kSpecial:
      if (random() % 9 == 0) return std::numeric_limits<float>::quiet_NaN();
      return random() % 9 == 0 ? std::copysign(std::numeric_limits<float>::infinity(), uniform) : uniform;
    case Values::kOrdinary:
      break;
  }
  return uniform;
}

void Fill(OrtValue* value, std::mt19937& random, Values values) {
  if (!IsFloat(value->type)) {
    const bool extreme = random() % 4 == 0;
    for (size_t i = 0; i < value->bytes(); ++i) {
      value->data()[i] = static_cast<uint8_t>(extreme ? (random() % 2 == 0 ? 0x88 : 0xff) : random());
    }
    return;
  }
  for (int64_t i = 0; i < Product(value->shape); ++i) {
    const ElementType type = ElementOf(value->type);
    uint32_t bits = 0;
    cpu::StoreElement(&bits, type, 0, FloatValue(random, values));
    const size_t width = type == ElementType::kFloat32 ? 4 : 2;
    std::memcpy(value->data() + static_cast<size_t>(i) * width, &bits, width);
  }
}

float Load(const OrtValue& value, int64_t index) {
  uint32_t bits = 0;
  const size_t width = value.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT ? 4 : 2;
  std::memcpy(&bits, value.data() + static_cast<size_t>(index) * width, width);
  return cpu::LoadElement(&bits, ElementOf(value.type), 0);
}

bool AllFinite(const OrtValue& value) {
  if (!IsFloat(value.type)) return true;
  for (int64_t i = 0; i < Product(value.shape); ++i) {
    if (!std::isfinite(Load(value, i))) return false;
  }
  return true;
}

// All scales of a column multiples of one base, as scale_max_multiple says.
void FillStructured(OrtValue* scale, std::mt19937& random, int64_t max_multiple) {
  const int64_t n = scale->shape[1];
  for (int64_t i = 0; i < Product(scale->shape); ++i) {
    const int64_t multiple =
        static_cast<int64_t>(random() % static_cast<uint64_t>(2 * max_multiple + 1)) - max_multiple;
    const float value = static_cast<float>(multiple) * static_cast<float>(1 + i % n % 8) / 64.0f;
    uint32_t bits = 0;
    cpu::StoreElement(&bits, ElementOf(scale->type), 0, value);
    const size_t width = scale->type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT ? 4 : 2;
    std::memcpy(scale->data() + static_cast<size_t>(i) * width, &bits, width);
  }
}

struct Problem {
  const OrtCustomOp* op = nullptr;
  std::string type;  // of the op
  Node node;
  std::vector<OrtValue> inputs;
  std::vector<bool> constant;
  bool sound = true;

  bool IsMatMul() const { return type == "W4A8MatMul" || type == "W8A8MatMul"; }
  bool IsFloatMatMul() const { return type == "DynamicQuantizeW4A8MatMul"; }
  bool IsAttention() const { return type.find("Attention") != std::string::npos; }
  bool Rotates() const { return type.find("Rotary") != std::string::npos; }
  /// Of an attention op, the position of past_key.
  size_t PastInput() const { return type.find("Packed") == 0 ? 1 : 3; }
  std::string Text() const {
    std::string text = type + " '" + node.name + "'";
    for (size_t i = 0; i < inputs.size(); ++i) {
      text += i == 0 ? ": " : ", ";
      for (const int64_t dim : inputs[i].shape) text += std::to_string(dim) + " ";
    }
    for (const auto& [name, value] : node.attributes) {
      if (const auto* number = std::get_if<int64_t>(&value)) text += ", " + name + "=" + std::to_string(*number);
    }
    return text;
  }
};

int64_t IntAttribute(const Problem& problem, const char* name, int64_t otherwise) {
  for (const auto& [key, value] : problem.node.attributes) {
    if (key == name) return std::get<int64_t>(value);
  }
  return otherwise;
}

Shape WithLast(Shape shape, int64_t last) {
  shape.back() = last;
  return shape;
}

// Lengths and heads of an attention node, and the shapes of its inputs.
struct AttentionSizes {
  int64_t batch, rows, kv_heads, heads, size, past_length, total, half;

  explicit AttentionSizes(Bytes& bytes) {
    batch = bytes.OneIn(12) ? 0 : bytes.Uniform(1, 3);
    rows = bytes.OneIn(2) ? 1 : bytes.Uniform(1, 40);
    kv_heads = bytes.Uniform(1, 3);
    heads = kv_heads * bytes.Uniform(1, 4);
    size = bytes.OneIn(2) ? 16 * bytes.Uniform(1, 4) : bytes.Uniform(2, 40);
    past_length = bytes.OneIn(3) ? 0 : bytes.Uniform(0, 90);
    total = rows + (bytes.OneIn(3) ? 0 : bytes.Uniform(0, past_length));
    half = bytes.OneIn(2) ? size / 2 : bytes.Uniform(1, size / 2);
  }
  std::vector<Shape> Shapes(const Problem& problem, Bytes& bytes) const {
    const Shape past = {batch, kv_heads, past_length, size};
    const bool packed = problem.PastInput() == 1;
    std::vector<Shape> shapes = {{batch, rows, (heads + (packed ? 2 * kv_heads : 0)) * size}};
    if (!packed) shapes.insert(shapes.end(), 2, {batch, rows, kv_heads * size});
    const Shape lengths = bytes.OneIn(2) ? Shape{batch} : Shape{batch, 1};
    shapes.insert(shapes.end(), {past, past, lengths, Shape(bytes.Next() % 2, 1)});
    if (problem.Rotates()) shapes.insert(shapes.end(), 2, {total + bytes.Uniform(0, 3), half});
    return shapes;
  }
  void SetAttributes(Problem* problem, Bytes& bytes) const {
    auto& attributes = problem->node.attributes;
    attributes = {{"num_heads", heads}, {"kv_num_heads", kv_heads}, {"scale", bytes.OneIn(4) ? 0.0f : 1.0f / 64}};
    if (problem->Rotates()) attributes.emplace_back("rotary_interleaved", bytes.Uniform(0, 1));
  }
  void SetLengths(Problem* problem, Bytes& bytes) const {
    const auto set = [](OrtValue* value, int64_t index, int64_t length) {
      const auto narrow = static_cast<int32_t>(length);
      std::memcpy(value->data() + 4 * index, &narrow, 4);
    };
    const int64_t least = rows == total ? 1 : rows, most = std::min(total, past_length + rows);
    OrtValue* lengths = &problem->inputs[problem->PastInput() + 2];
    for (int64_t i = 0; i < batch; ++i) set(lengths, i, bytes.Uniform(least, rows == total ? total : most) - 1);
    set(&problem->inputs[problem->PastInput() + 3], 0, total);
  }
};

Problem SoundAttention(Problem problem, Bytes& bytes, std::mt19937& random) {
  const AttentionSizes sizes(bytes);
  for (const Shape& shape : sizes.Shapes(problem, bytes)) {
    const size_t i = problem.inputs.size();
    problem.constant.push_back(bytes.OneIn(4));
    const bool misaligned = problem.constant[i] && bytes.OneIn(3);
    problem.inputs.emplace_back(problem.op->GetInputType(problem.op, i), shape, misaligned);
    Fill(&problem.inputs[i], random, bytes.OneIn(6) ? static_cast<Values>(bytes.Uniform(0, 4)) : Values::kOrdinary);
    problem.node.declared.push_back({problem.inputs[i].type, shape, {}});
  }
  sizes.SetAttributes(&problem, bytes);
  sizes.SetLengths(&problem, bytes);
  return problem;
}

Problem SoundProblem(Bytes& bytes, std::mt19937& random) {
  Problem problem;
  problem.op = bytes.Of(RegisteredOps());
  problem.type = problem.op->GetName(problem.op);
  problem.node.name = "node" + std::to_string(bytes.Next());
  if (problem.IsAttention()) return SoundAttention(std::move(problem), bytes, random);

  Shape x;
  int64_t rows = 1;
  for (int64_t rank = bytes.Uniform(0, 3); rank > 0; --rank) {
    x.push_back(bytes.OneIn(12) ? 0 : bytes.OneIn(16) ? bytes.Uniform(1, 40) : bytes.Uniform(1, 4));
    rows *= std::max<int64_t>(x.back(), 1);
  }
  const int64_t k = Length(bytes), n = rows > 64 ? bytes.Uniform(1, 20) : Length(bytes);
  x.push_back(k);

  std::vector<Shape> shapes;
  if (problem.IsMatMul() || problem.IsFloatMatMul()) {
    if (problem.IsFloatMatMul()) {
      shapes = {x, {k, n}, {n}};
      problem.constant = {bytes.OneIn(20), true, true};
    } else {
      const bool per_token = bytes.OneIn(2);
      shapes = {x, per_token ? WithLast(x, 1) : Shape(bytes.Next() % 2, 1), Shape(bytes.Next() % 2, 1), {k, n}, {n}};
      problem.constant = {bytes.OneIn(20), bytes.OneIn(4), !bytes.OneIn(3), true, true};
    }
    if (problem.type != "W8A8MatMul") {
      static const std::vector<int64_t> blocks = {1, 7, 8, 16, 32, 64, 128};
      const int64_t block = std::min(k, bytes.OneIn(4) ? k : bytes.Of(blocks));
      shapes.back() = {(k + block - 1) / block, n};
      problem.node.attributes.emplace_back("block_size", block);
      if (bytes.OneIn(2)) problem.node.attributes.emplace_back("scale_max_multiple", bytes.Uniform(0, 15));
    }
  } else {
    const bool norm = problem.type.find("RMSNorm") != std::string::npos;
    const bool dynamic = problem.type.find("Dynamic") != std::string::npos;
    const size_t inputs = problem.op->GetInputTypeCount(problem.op);
    shapes.assign(inputs, x);
    if (problem.type != "DynamicQuantizePerToken") {
      const size_t floats = dynamic ? inputs : inputs - 2;
      if (norm) shapes[floats - 1] = {k};
      for (size_t i = floats; i < inputs; ++i) shapes[i] = Shape(bytes.Next() % 2, 1);
    }
    if (norm) problem.node.attributes.emplace_back("epsilon", 1e-5f);
    problem.constant.assign(inputs, false);
    for (size_t i = 0; i < inputs; ++i) problem.constant[i] = bytes.OneIn(4);
  }

  for (size_t i = 0; i < shapes.size(); ++i) {
    const bool misaligned = problem.constant[i] && bytes.OneIn(3);  // as in a mapped file
    problem.inputs.emplace_back(problem.op->GetInputType(problem.op, i), shapes[i], misaligned);
    const auto values = bytes.OneIn(3) ? static_cast<Values>(bytes.Uniform(0, 4)) : Values::kOrdinary;
    Fill(&problem.inputs[i], random, values);
    problem.node.declared.push_back({problem.inputs[i].type, shapes[i], {}});
  }
  const int64_t max_multiple = IntAttribute(problem, "scale_max_multiple", 0);  // of int4 weights
  if (max_multiple > 0 && !bytes.OneIn(4)) FillStructured(&problem.inputs.back(), random, max_multiple);
  return problem;
}

Attribute AnyAttribute(Bytes& bytes) {
  static const std::vector<int64_t> edges = {0, -1, 1, 2, 15, 16, 64, 17, 33, INT64_MAX, INT64_MIN, int64_t{1} << 32};
  switch (bytes.Uniform(0, 6)) {
    case 0:
      return bytes.OneIn(2) ? 32.0f : std::numeric_limits<float>::quiet_NaN();
    case 1:
      return std::string("32");
    case 2:
      return std::vector<int64_t>{32, 1};
    case 3:
      return std::vector<float>{};
    case 4:
      return -std::numeric_limits<float>::infinity();
    default:
      return bytes.Of(edges);
  }
}

void Spoil(Problem* problem, Bytes& bytes, std::mt19937& random) {
  problem->sound = false;
  const size_t input = static_cast<size_t>(bytes.Uniform(0, static_cast<int64_t>(problem->inputs.size()) - 1));
  switch (bytes.Uniform(0, 5)) {
    case 0:
    case 1: {  // another shape, declared or not
      OrtValue& value = problem->inputs[input];
      value = OrtValue(value.type, TensorShape(bytes), bytes.OneIn(4));
      Fill(&value, random, static_cast<Values>(bytes.Uniform(0, 4)));
      if (bytes.OneIn(2)) problem->node.declared[input].shape = value.shape;
      break;
    }
    case 2:
      problem->node.declared[input].shape = DeclaredShape(bytes);
      problem->node.declared[input].names.assign(static_cast<size_t>(bytes.Uniform(0, 2)), "batch");
      break;
    case 3:
      problem->constant[input] = !problem->constant[input];
      break;
    case 4:
      if (!problem->node.attributes.empty()) {
        auto& [name, value] = problem->node.attributes[bytes.Next() % problem->node.attributes.size()];
        value = AnyAttribute(bytes);
        if (bytes.OneIn(4)) name = "other";
      }
      break;
    default: {
      static const std::vector<std::string> names = {"", "%s%n", "a\nb", std::string(5000, 'x'), "\xff\xfe"};
      problem->node.name = bytes.Of(names);
    }
  }
}

void CheckRefusal(const Problem& problem, const Result& result) {
  const std::string start = "fptq." + problem.type + " node '" + problem.node.name + "': ";
  if (result.message.compare(0, start.size(), start) != 0 || result.message.back() != '.') {
    Wrong("the message does not name the node: " + result.message);
  }
  if (problem.sound) Wrong("a sound node was refused: " + problem.Text() + ": " + result.message);
}

double Rounding(ElementType type) {
  return type == ElementType::kFloat32 ? 0x1p-24 : type == ElementType::kFloat16 ? 0x1p-11 : 0x1p-8;
}

// Against the definition in plain loops. Returns false where a number left what floats hold.
bool CheckMatMul(const Problem& problem, const OrtValue& y) {
  const OrtValue &a = problem.inputs[0], &a_scale = problem.inputs[1], &b = problem.inputs[3],
                 &scale = problem.inputs[4];
  const int zero_point = problem.inputs[2].data()[0];
  const int64_t k = b.shape[0], n = b.shape[1], rows = Product(a.shape) / k;
  const int64_t block = problem.type == "W4A8MatMul" ? IntAttribute(problem, "block_size", k) : k;
  const bool per_token = Product(a_scale.shape) != 1 || a_scale.shape.size() > 1;
  const ElementType type = ElementOf(y.type);
  const double largest = type == ElementType::kFloat16 ? 65000.0 : 1e38;
  if (y.shape != WithLast(a.shape, n)) Wrong("the output has another shape: " + problem.Text());
  bool checked = true;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < n; ++column) {
      double exact = 0, size = 0;
      for (int64_t first = 0; first < k; first += block) {
        int64_t sum = 0;
        for (int64_t i = first; i < std::min(k, first + block); ++i) {
          const int64_t at = i * n + column;
          const int weight = problem.type == "W4A8MatMul" ? ((b.data()[at / 2] >> (at % 2 * 4) & 15) ^ 8) - 8
                                                          : static_cast<int8_t>(b.data()[at]);
          sum += (a.data()[row * k + i] - zero_point) * weight;
        }
        const double term = static_cast<double>(sum) * Load(scale, first / block * n + column);
        exact += term;
        size += std::fabs(term);
      }
      const double factor = Load(a_scale, per_token ? row : 0);
      const double groups = static_cast<double>((k + block - 1) / block);
      const double float_error = size * std::fabs(factor) * (groups + 4) * 0x1p-24 +
                                 (groups + 2) * 0x1p-149 * std::max(1.0, std::fabs(factor));
      const double tolerance = float_error + (std::fabs(exact * factor) + float_error) * Rounding(type) +
                               (type == ElementType::kFloat16 ? 0x1p-25 : 0x1p-133);
      if (!(size < 1e38) || !(size * std::fabs(factor) < largest)) {
        checked = false;
        continue;
      }
      const double value = Load(y, row * n + column);
      if (!(std::fabs(value - exact * factor) <= tolerance)) {
        char text[160];
        std::snprintf(text, sizeof(text), "row %d, column %d: %.9g instead of %.9g: ", static_cast<int>(row),
                      static_cast<int>(column), value, exact * factor);
        Wrong(text + problem.Text());
      }
    }
  }
  return checked;
}

std::vector<OrtValue> PortableOutputs(const Problem& problem, const std::vector<const OrtValue*>& inputs) {
  setenv("FPTQ_CPU_ISA", "portable", 1);
  const Kernel portable(*problem.op, problem.node);
  std::vector<OrtValue> expected;
  if (!portable.created().ok || !portable.Run(inputs, &expected).ok) Wrong("only the portable kernel refuses");
  return expected;
}

float LargestMagnitude(const OrtValue& value) {
  float largest = 0.0f;
  for (int64_t i = 0; i < Product(value.shape); ++i) {
    const float magnitude = std::fabs(Load(value, i));
    if (!(magnitude <= largest)) largest = magnitude;
  }
  return largest;
}

// Attention differs from that of the portable kernels by rounding, and what it copies not at all. Returns false where
// numbers were so large that rounding may be all there is.
bool CheckAttention(const Problem& problem, const std::vector<const OrtValue*>& inputs,
                    const std::vector<OrtValue>& outputs) {
  const std::vector<OrtValue> expected = PortableOutputs(problem, inputs);
  const size_t past = problem.PastInput();
  double largest = 0.0, growth = 1.0;
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (i == past + 2 || i == past + 3) continue;  // lengths
    double& bound = i > past + 3 ? growth : largest;
    if (!AllFinite(*inputs[i])) return false;
    bound = std::max<double>(bound, (i > past + 3 ? 2 : 1) * LargestMagnitude(*inputs[i]));
  }
  const auto size = static_cast<double>(inputs[past]->shape[3]);
  const double scores = size * (size + 4) * std::pow(largest * growth, 2);  // scale is at most 1
  const double tolerance[] = {2 * (scores + 40) * 0x1p-24 * largest, 8 * 0x1p-24 * largest * growth, 0.0};
  if (!(tolerance[0] < 0.1 * largest)) return false;
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (outputs[i].shape != expected[i].shape) Wrong("another shape: " + problem.Text());
    for (int64_t j = 0; j < Product(outputs[i].shape); ++j) {
      if (std::fabs(Load(outputs[i], j) - Load(expected[i], j)) <= tolerance[i]) continue;
      Wrong("output " + std::to_string(i) + ", element " + std::to_string(j) + " differs: " + problem.Text());
    }
  }
  return true;
}

void CheckSame(const Problem& problem, const std::vector<OrtValue>& outputs, const std::vector<OrtValue>& expected) {
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (outputs[i].shape != expected[i].shape) Wrong("another shape: " + problem.Text());
    for (int64_t j = 0; j < Product(outputs[i].shape); ++j) {
      if (IsFloat(outputs[i].type)) {
        const float value = Load(outputs[i], j), wanted = Load(expected[i], j);
        if (value == wanted || (std::isnan(value) && std::isnan(wanted))) continue;
      } else if (outputs[i].data()[j] == expected[i].data()[j]) {
        continue;
      }
      Wrong("output " + std::to_string(i) + ", element " + std::to_string(j) + " differs: " + problem.Text());
    }
  }
}

// The other ops give the same bytes on every instruction set.
void CheckAgainstPortable(const Problem& problem, const std::vector<const OrtValue*>& inputs,
                          const std::vector<OrtValue>& outputs) {
  CheckSame(problem, outputs, PortableOutputs(problem, inputs));
}

// Runs the op of a name and a float type.
std::vector<OrtValue> RunOther(const std::string& type, ONNXTensorElementDataType float_type, const Problem& problem,
                               const std::vector<const OrtValue*>& inputs) {
  for (const OrtCustomOp* op : RegisteredOps()) {
    const bool product = op->GetInputTypeCount(op) > 1;
    if (op->GetName(op) != type) continue;
    if ((product ? op->GetOutputType(op, 0) : op->GetInputType(op, 0)) != float_type) continue;
    Node node;
    node.attributes = problem.node.attributes;
    for (size_t i = 0; i < inputs.size(); ++i) {
      node.declared.push_back({inputs[i]->type, inputs[i]->shape, {}});
      node.constants.push_back(product && i >= 2 ? inputs[i] : nullptr);
    }
    const Kernel kernel(*op, node);
    std::vector<OrtValue> outputs;
    if (!kernel.created().ok || !kernel.Run(inputs, &outputs).ok) Wrong(type + " refuses: " + problem.Text());
    return outputs;
  }
  Wrong("there is no " + type);
}

// The product of float activations gives the bytes of the two ops it stands for, on the same instruction set.
void CheckAgainstTwoOps(const Problem& problem, const std::vector<const OrtValue*>& inputs,
                        const std::vector<OrtValue>& outputs) {
  const ONNXTensorElementDataType type = outputs[0].type;
  const std::vector<OrtValue> quantized = RunOther("DynamicQuantizePerToken", type, problem, {inputs[0]});
  OrtValue zero_point(ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, {});
  *zero_point.data() = 128;
  CheckSame(problem, outputs,
            RunOther("W4A8MatMul", type, problem, {&quantized[0], &quantized[1], &zero_point, inputs[1], inputs[2]}));
}

void CheckInference(const Problem& problem, const std::vector<OrtTensorTypeAndShapeInfo>& inferred,
                    const std::vector<OrtValue>& outputs) {
  for (size_t i = 0; i < problem.inputs.size(); ++i) {
    if (problem.node.declared[i].shape != problem.inputs[i].shape) return;
  }
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (inferred[i].type == ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED) continue;
    Shape known = inferred[i].shape;
    for (size_t j = 0; j < std::min(known.size(), outputs[i].shape.size()); ++j) {
      if (known[j] == -1) known[j] = outputs[i].shape[j];  // only a call knows it
    }
    if (inferred[i].type != outputs[i].type || known != outputs[i].shape) {
      Wrong("output " + std::to_string(i) + " is not what shape inference says: " + problem.Text());
    }
  }
}

}  // namespace

const char* NameOf(Outcome outcome) {
  static const char* const names[] = {"refused_at_creation", "refused_at_call", "right", "ran"};
  return names[static_cast<int>(outcome)];
}

Outcome RunCase(const uint8_t* data, size_t size) {
  Bytes bytes(data, size);
  std::mt19937 random(bytes.Next32());
  Problem problem = SoundProblem(bytes, random);
  if (!bytes.OneIn(3)) {
    for (int64_t count = bytes.Uniform(1, 3); count > 0; --count) Spoil(&problem, bytes, random);
  }
  std::vector<const OrtValue*> inputs;
  for (size_t i = 0; i < problem.inputs.size(); ++i) {
    inputs.push_back(&problem.inputs[i]);
    problem.node.constants.push_back(problem.constant[i] ? &problem.inputs[i] : nullptr);
  }

  static const std::vector<const cpu::Kernels*> kernels = cpu::AvailableKernels();
  setenv("FPTQ_CPU_ISA", bytes.Of(kernels)->name, 1);
  const std::vector<OrtTensorTypeAndShapeInfo> inferred = InferShapes(*problem.op, problem.node);
  const Kernel kernel(*problem.op, problem.node);
  if (!kernel.created().ok) {
    CheckRefusal(problem, kernel.created());
    return Outcome::kRefusedAtCreation;
  }
  std::vector<OrtValue> outputs;
  const Result result = kernel.Run(inputs, &outputs, bytes.OneIn(16) ? 3 : 1);
  if (!result.ok) {
    CheckRefusal(problem, result);
    return Outcome::kRefusedAtCall;
  }
  CheckInference(problem, inferred, outputs);
  if (problem.IsAttention()) return CheckAttention(problem, inputs, outputs) ? Outcome::kRight : Outcome::kRan;
  if (problem.IsFloatMatMul()) {
    CheckAgainstTwoOps(problem, inputs, outputs);
    return Outcome::kRight;
  }
  if (!problem.IsMatMul()) {
    CheckAgainstPortable(problem, inputs, outputs);
    return Outcome::kRight;
  }
  if (!AllFinite(problem.inputs[1]) || !AllFinite(problem.inputs[4])) return Outcome::kRan;
  return CheckMatMul(problem, outputs[0]) ? Outcome::kRight : Outcome::kRan;
}

}  // namespace fptq::fuzz
