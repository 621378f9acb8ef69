#include <algorithm>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>

#include "cpu/isa.h"
#include "fptq/fptq_ops.h"
#ifdef FPTQ_WITH_CUDA
#include "cuda/describe_cuda.h"
#endif

namespace {

std::string Quoted(const char* text) { return "\"" + std::string(text) + "\""; }

std::string DescribeCpu() {
  std::string available;
  for (const fptq::cpu::Kernels* kernels : fptq::cpu::AvailableKernels()) {
    available += (available.empty() ? "" : ", ") + Quoted(kernels->name);
  }
  std::string json = "{\"available\": [" + available + "], ";
  try {
    const fptq::cpu::Kernels& chosen = fptq::cpu::ChosenKernels();
    const bool special = chosen.few_rows_name != nullptr;
    json += "\"chosen\": " + Quoted(chosen.name) +
            ", \"few_rows\": " + (special ? Quoted(chosen.few_rows_name) : "null") +
            ", \"few_rows_below\": " + std::to_string(chosen.few_rows_below) + ", \"error\": null}";
  } catch (const std::exception&) {  // the message repeats the environment variable, which may hold any character
    json += R"("chosen": null, "few_rows": null, "few_rows_below": 0, )"
            R"("error": "FPTQ_CPU_ISA names no kernels of this library and CPU"})";
  }
  return json;
}

std::string DescribeProduct(const FptqProduct& product) {
  if (product.cuda_device >= 0) {
#ifdef FPTQ_WITH_CUDA
    return fptq::cuda::DescribeProduct(product);
#else
    throw std::runtime_error("this library was built without CUDA kernels");
#endif
  }
  const fptq::cpu::Kernels& chosen = fptq::cpu::ChosenKernels();
  return product.rows < chosen.few_rows_below ? chosen.few_rows_name : chosen.name;
}

void Copy(const std::string& from, char* text, size_t size) {
  if (size == 0) return;
  const size_t length = std::min(from.size(), size - 1);
  std::memcpy(text, from.data(), length);
  text[length] = '\0';
}

}  // namespace

const char* FptqDescribeLibrary() {
#ifdef FPTQ_WITH_CUDA
  static const std::string cuda = fptq::cuda::DescribeDevices();
#else
  static const std::string cuda = "null";
#endif
  static const std::string json =
      "{\"version\": \"" FPTQ_VERSION "\", \"cpu\": " + DescribeCpu() + ", \"cuda\": " + cuda + "}";
  return json.c_str();
}

int FptqDescribeProduct(const FptqProduct* product, char* text, size_t size) {
  try {
    Copy(DescribeProduct(*product), text, size);
    return 0;
  } catch (const std::exception& error) {
    Copy(error.what(), text, size);
    return 1;
  }
}
