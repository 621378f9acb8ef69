// The command line of the example.
#ifndef FPTQ_EXAMPLES_CPP_ARGUMENTS_H_
#define FPTQ_EXAMPLES_CPP_ARGUMENTS_H_

#include <cstdint>
#include <exception>
#include <sstream>
#include <string>
#include <vector>

constexpr char kUsage[] =
    "Usage: generate MODEL.onnx PROMPT_IDS [options]\n"
    "  PROMPT_IDS       token ids of the prompt, such as 504,3575,282\n"
    "  --tokens N       most tokens to generate (64)\n"
    "  --stop ID        token that ends the text (none)\n"
    "  --in-place       append to the cache in one buffer (models of onnxruntime-genai: GroupQueryAttention)\n"
    "  --head-size N    size of a head, where the model declares it by a name (onnxruntime-genai does)\n"
    "  --threads N      threads of an operator (onnxruntime's choice)\n"
    "  --cuda           run on the GPU\n"
    "  --no-library     do not register the op library: the ops run through their function bodies\n";

struct Arguments {
  std::string model;
  std::vector<int64_t> prompt;
  int64_t tokens = 64;
  int64_t stop = -1;
  int64_t head_size = -1;
  int threads = 0;
  bool in_place = false;
  bool cuda = false;
  bool library = true;
};

/// False where the arguments are not as in kUsage.
inline bool ParseArguments(int count, char** values, Arguments* arguments) try {
  if (count < 3) return false;
  arguments->model = values[1];
  std::stringstream ids(values[2]);
  for (std::string id; std::getline(ids, id, ',');) arguments->prompt.push_back(std::stoll(id));
  for (int i = 3; i < count; ++i) {
    const std::string option = values[i];
    if (option == "--in-place") {
      arguments->in_place = true;
    } else if (option == "--cuda") {
      arguments->cuda = true;
    } else if (option == "--no-library") {
      arguments->library = false;
    } else if (i + 1 == count) {
      return false;
    } else if (option == "--tokens") {
      arguments->tokens = std::stoll(values[++i]);
    } else if (option == "--stop") {
      arguments->stop = std::stoll(values[++i]);
    } else if (option == "--head-size") {
      arguments->head_size = std::stoll(values[++i]);
    } else if (option == "--threads") {
      arguments->threads = std::stoi(values[++i]);
    } else {
      return false;
    }
  }
  return !arguments->prompt.empty();
} catch (const std::exception&) {  // not a number
  return false;
}

#endif  // FPTQ_EXAMPLES_CPP_ARGUMENTS_H_
