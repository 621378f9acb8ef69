// Greedy text generation with onnxruntime: token ids in, token ids out (README.md shows how to go from text and back).
#include <fptq/register.h>
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "arguments.h"

namespace {

constexpr char kPast[] = "past_key_values";
constexpr char kPresent[] = "present";

// Index of the largest of the last row of logits [1, S, vocabulary], the first among equals.
template <class T>
int64_t MostLikely(const Ort::Value& logits) {
  const auto info = logits.GetTensorTypeAndShapeInfo();
  const int64_t vocabulary = info.GetShape().back();
  const T* row = logits.GetTensorData<T>() + info.GetElementCount() - vocabulary;
  return std::max_element(row, row + vocabulary, [](T a, T b) { return float(a) < float(b); }) - row;
}

// One sequence and its key/value cache, which never leaves the device. In place, past and present are one buffer per
// layer that attention appends to; else the present outputs of a run are the past inputs of the next.
class Decoder {
 public:
  Decoder(Ort::Session& session, const Arguments& arguments)
      : session_(session),
        in_place_(arguments.in_place),
        host_(Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault)),
        device_(arguments.cuda ? Ort::MemoryInfo("Cuda", OrtDeviceAllocator, 0, OrtMemTypeDefault)
                               : Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault)),
        allocator_(session, device_) {
    const int64_t capacity = in_place_ ? int64_t(arguments.prompt.size()) + arguments.tokens : 0;
    for (size_t i = 0; i < session.GetInputCount(); ++i) {
      const std::string name = session.GetInputNameAllocated(i, Ort::AllocatorWithDefaultOptions()).get();
      if (name == "position_ids") has_positions_ = true;
      if (name.rfind(kPast, 0) != 0) continue;
      const Ort::TypeInfo type = session.GetInputTypeInfo(i);
      const auto info = type.GetTensorTypeAndShapeInfo();
      std::vector<int64_t> shape = info.GetShape();  // [batch, heads, past, head size], -1 where it is named
      shape[0] = 1;
      shape[2] = capacity;
      if (shape[3] <= 0) shape[3] = arguments.head_size;
      if (shape[3] <= 0) throw Ort::Exception("the model does not declare its head size: give --head-size", ORT_FAIL);
      past_.push_back(name);
      present_.push_back(kPresent + name.substr(std::size(kPast) - 1));
      cache_.push_back(Ort::Value::CreateTensor(allocator_, shape.data(), shape.size(), info.GetElementType()));
    }
    if (past_.empty()) throw Ort::Exception("the model has no key/value cache (past_key_values.N.key)", ORT_FAIL);
  }

  // Runs tokens after those of earlier calls; returns the most likely next token.
  int64_t Next(std::vector<int64_t> tokens) {
    const int64_t count = int64_t(tokens.size());
    std::vector<int64_t> mask(size_t(length_ + count), 1);
    std::vector<int64_t> positions;
    for (int64_t i = 0; i < count; ++i) positions.push_back(length_ + i);
    Ort::IoBinding binding(session_);
    binding.BindInput("input_ids", Tensor(tokens));
    binding.BindInput("attention_mask", Tensor(mask));
    if (has_positions_) binding.BindInput("position_ids", Tensor(positions));
    binding.BindOutput("logits", host_);
    for (size_t i = 0; i < cache_.size(); ++i) {
      binding.BindInput(past_[i].c_str(), cache_[i]);
      if (in_place_) {
        binding.BindOutput(present_[i].c_str(), cache_[i]);
      } else {
        binding.BindOutput(present_[i].c_str(), device_);
      }
    }
    session_.Run(Ort::RunOptions{nullptr}, binding);
    length_ += count;
    std::vector<Ort::Value> outputs = binding.GetOutputValues();
    if (!in_place_) std::move(outputs.begin() + 1, outputs.end(), cache_.begin());
    const bool half = outputs[0].GetTensorTypeAndShapeInfo().GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    return half ? MostLikely<Ort::Float16_t>(outputs[0]) : MostLikely<float>(outputs[0]);
  }

 private:
  Ort::Value Tensor(std::vector<int64_t>& row) {
    const int64_t shape[] = {1, int64_t(row.size())};
    return Ort::Value::CreateTensor<int64_t>(host_, row.data(), row.size(), shape, std::size(shape));
  }

  Ort::Session& session_;
  bool in_place_;
  bool has_positions_ = false;
  Ort::MemoryInfo host_;
  Ort::MemoryInfo device_;
  Ort::Allocator allocator_;  // outlives the caches, which it frees
  std::vector<std::string> past_;
  std::vector<std::string> present_;
  std::vector<Ort::Value> cache_;
  int64_t length_ = 0;
};

void Run(const Arguments& arguments) {
  const Ort::Env env(ORT_LOGGING_LEVEL_WARNING, "generate");
  Ort::SessionOptions options;
  options.SetIntraOpNumThreads(arguments.threads);
  if (arguments.cuda) options.AppendExecutionProvider_CUDA(OrtCUDAProviderOptions{});
  if (arguments.library) RegisterFptqOps(options);
  Ort::Session session(env, arguments.model.c_str(), options);
  Decoder decoder(session, arguments);

  const auto start = std::chrono::steady_clock::now();
  int64_t token = decoder.Next(arguments.prompt);
  const std::chrono::duration<double> first = std::chrono::steady_clock::now() - start;
  int64_t made = 1;
  std::printf("%lld", static_cast<long long>(token));
  while (made < arguments.tokens && token != arguments.stop) {
    token = decoder.Next({token});
    ++made;
    std::printf(" %lld", static_cast<long long>(token));
  }
  const std::chrono::duration<double> rest = std::chrono::steady_clock::now() - start - first;
  std::printf("\n");
  std::fprintf(stderr, "first token after %.3f s, then %.1f tokens/s\n", first.count(),
               double(made - 1) / rest.count());
}

}  // namespace

int main(int count, char** values) {
  Arguments arguments;
  if (!ParseArguments(count, values, &arguments)) {
    std::fputs(kUsage, stderr);
    return 2;
  }
  try {
    Run(arguments);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
