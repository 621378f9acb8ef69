// Sessions side by side: registrations, kernels made and destroyed, two kernels called by several threads at once, each
// call with a thread pool of its own. Meant for ThreadSanitizer; results must be the bytes of a call alone.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "fake_runtime.h"

namespace fptq::fuzz {
namespace {

constexpr int64_t kRows = 9, kK = 96, kN = 80, kBlock = 32;

void Require(bool condition, const std::string& what) {
  if (condition) return;
  std::fprintf(stderr, "concurrency_test: %s\n", what.c_str());
  std::exit(1);
}

// A sound node of any op and its operands.
struct Job {
  const OrtCustomOp* op;
  Node node;
  std::vector<OrtValue> inputs;
  std::vector<const OrtValue*> pointers;

  explicit Job(const OrtCustomOp* custom_op) : op(custom_op) {
    const std::string type = op->GetName(op);
    const bool quantizes = type == "DynamicQuantizeW4A8MatMul";
    const bool four_bits = quantizes || type == "W4A8MatMul", matmul = four_bits || type == "W8A8MatMul";
    const size_t weight = quantizes ? 1 : 3;  // position of a product's B
    const size_t count = op->GetInputTypeCount(op);
    if (type.find("Attention") != std::string::npos) {
      AddAttention(type.find("Packed") == 0, type.find("Rotary") != std::string::npos);
      return;
    }
    for (size_t i = 0; i < count; ++i) {
      std::vector<int64_t> shape = {kRows, kK};
      const bool norm = type.find("RMSNorm") != std::string::npos;
      const size_t floats = type.find("Dynamic") != std::string::npos ? count : count - 2;
      if (matmul) {
        const std::vector<int64_t> shapes[] = {
            {kRows, kK},
            {kRows, 1},
            {},
            {kK, kN},
            four_bits ? std::vector<int64_t>{kK / kBlock, kN} : std::vector<int64_t>{kN}};
        shape = shapes[quantizes && i > 0 ? i + 2 : i];
      } else if (i >= floats) {
        shape = {};
      } else if (norm && i + 1 == floats) {
        shape = {kK};
      }
      inputs.emplace_back(op->GetInputType(op, i), shape);
      OrtValue& value = inputs.back();
      const bool integers = value.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 || (matmul && i == weight);
      const size_t width = value.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT ? 4 : 2;
      for (size_t j = 0; j < value.bytes(); ++j) {
        // Floats get the high byte 0x3c: near 1 in every type.
        const size_t small = j % width == width - 1 ? 0x3c : 11 * j % 64;
        value.data()[j] = static_cast<uint8_t>(integers ? 37 * j : small);
      }
    }
    node.name = "shared";
    if (four_bits) node.attributes = {{"block_size", kBlock}, {"scale_max_multiple", int64_t{15}}};
    if (!matmul) node.attributes = {{"epsilon", 1e-5f}};
    for (size_t i = 0; i < inputs.size(); ++i) {
      pointers.push_back(&inputs[i]);
      node.declared.push_back({inputs[i].type, inputs[i].shape, {}});
      node.constants.push_back(matmul && i >= (quantizes ? weight : 2) ? &inputs[i] : nullptr);
    }
  }

  // 9 new positions after 60; enough work that the calls use their threads.
  void AddAttention(bool packed, bool rotary) {
    constexpr int64_t kHeads = 12, kKvHeads = 3, kSize = 32, kPast = 60;
    std::vector<std::vector<int64_t>> shapes = {{1, kRows, (kHeads + (packed ? 2 * kKvHeads : 0)) * kSize}};
    if (!packed) shapes.insert(shapes.end(), 2, {1, kRows, kKvHeads * kSize});
    shapes.insert(shapes.end(), 2, {1, kKvHeads, kPast, kSize});
    const size_t lengths = shapes.size();
    shapes.insert(shapes.end(), {{1}, {}});
    if (rotary) shapes.insert(shapes.end(), 2, {kPast + kRows, kSize / 2});
    for (size_t i = 0; i < shapes.size(); ++i) {
      inputs.emplace_back(op->GetInputType(op, i), shapes[i]);
      for (size_t j = 0; j < inputs[i].bytes() / 4; ++j) {
        const float value = static_cast<float>(j * 7 % 64) / 64.0f - 0.5f;
        const int32_t length = static_cast<int32_t>(i == lengths ? kPast + kRows - 1 : kPast + kRows);
        const bool integer = i == lengths || i == lengths + 1;
        std::memcpy(inputs[i].data() + 4 * j, integer ? static_cast<const void*>(&length) : &value, 4);
      }
    }
    node.name = "shared";
    node.attributes = {{"num_heads", kHeads}, {"kv_num_heads", kKvHeads}, {"scale", 0.5f}};
    if (rotary) node.attributes.emplace_back("rotary_interleaved", int64_t{0});
    for (const OrtValue& input : inputs) {
      pointers.push_back(&input);
      node.declared.push_back({input.type, input.shape, {}});
      node.constants.push_back(nullptr);
    }
  }
};

std::string Bytes(const std::vector<OrtValue>& outputs) {
  std::string bytes;
  for (const OrtValue& output : outputs) bytes.append(reinterpret_cast<const char*>(output.data()), output.bytes());
  return bytes;
}

void Attack(const std::vector<std::unique_ptr<Job>>& jobs, const std::vector<std::unique_ptr<Kernel>>& shared,
            const std::vector<std::string>& expected, int seed) {
  std::vector<OrtValue> outputs;
  for (size_t i = 0; i < jobs.size(); ++i) {
    const size_t at = (i + static_cast<size_t>(seed)) % jobs.size();
    const Job& job = *jobs[at];
    Require(Register().ok, "registration failed");
    const Kernel own(*job.op, job.node);
    Require(own.created().ok, own.created().message);
    InferShapes(*job.op, job.node);
    for (const Kernel* kernel : {static_cast<const Kernel*>(shared[at].get()), &own}) {
      const Result result = kernel->Run(job.pointers, &outputs, 2);
      Require(result.ok, result.message);
      Require(Bytes(outputs) == expected[at], std::string("another result beside others: ") + job.op->GetName(job.op));
    }
  }
}

}  // namespace
}  // namespace fptq::fuzz

int main(int argc, char** argv) {
  using namespace fptq::fuzz;
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 3;
  std::vector<std::thread> first;  // the first registrations of a process, at once
  for (int i = 0; i < 4; ++i) first.emplace_back([] { Require(Register().ok, "registration failed"); });
  for (std::thread& thread : first) thread.join();

  std::vector<std::unique_ptr<Job>> jobs;
  std::vector<std::unique_ptr<Kernel>> shared;
  std::vector<std::string> expected;
  for (const OrtCustomOp* op : RegisteredOps()) {
    jobs.push_back(std::make_unique<Job>(op));
    shared.push_back(std::make_unique<Kernel>(*op, jobs.back()->node));
    Require(shared.back()->created().ok, shared.back()->created().message);
    std::vector<OrtValue> outputs;
    const Result result = shared.back()->Run(jobs.back()->pointers, &outputs);
    Require(result.ok, result.message);
    expected.push_back(Bytes(outputs));
  }
  for (int round = 0; round < rounds; ++round) {
    std::vector<std::thread> sessions;
    for (int i = 0; i < 4; ++i) {
      sessions.emplace_back([&, i] { Attack(jobs, shared, expected, 7 * i + round); });
    }
    for (std::thread& session : sessions) session.join();
  }
  std::printf("%d rounds of 4 sessions with %d kernels each gave the bytes of calls alone\n", rounds,
              static_cast<int>(jobs.size()));
  return 0;
}
