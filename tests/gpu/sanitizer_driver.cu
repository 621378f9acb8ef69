// Runs every CUDA kernel on small problems and compares the results with exact arithmetic, for compute-sanitizer.
//
//   sanitizer_driver KERNEL_LIBRARY.so [few]
//
// Outputs are poisoned, buffers are exactly as large as the interface says, so that memcheck sees any access beyond
// them. Exit status 1 if a result is wrong or a call fails. "few" keeps one problem per code path, for racecheck.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "cuda/kernels_c_api.h"

namespace {

struct Library {
  explicit Library(const char* path) : handle(dlopen(path, RTLD_NOW | RTLD_LOCAL)) {
    if (handle == nullptr) {
      std::fprintf(stderr, "%s\n", dlerror());
      std::exit(2);
    }
    Load(last_error, "fptq_last_error");
    Load(pack, "fptq_pack_weights");
    Load(free_weights, "fptq_free_weights");
    Load(matmul, "fptq_w4a8_matmul");
    Load(dynamic_matmul, "fptq_dynamic_w4a8_matmul");
    Load(quantizes_inside, "fptq_quantizes_inside");
    Load(quantize_per_token, "fptq_dynamic_quantize_per_token");
    Load(quantize_static, "fptq_quantize_static");
  }
  template <class F>
  void Load(F*& function, const char* name) {
    function = reinterpret_cast<F*>(dlsym(handle, name));
    if (function == nullptr) {
      std::fprintf(stderr, "no %s in the library\n", name);
      std::exit(2);
    }
  }
  void* handle;
  decltype(fptq_last_error)* last_error;
  decltype(fptq_pack_weights)* pack;
  decltype(fptq_free_weights)* free_weights;
  decltype(fptq_w4a8_matmul)* matmul;
  decltype(fptq_dynamic_w4a8_matmul)* dynamic_matmul;
  decltype(fptq_quantizes_inside)* quantizes_inside;
  decltype(fptq_dynamic_quantize_per_token)* quantize_per_token;
  decltype(fptq_quantize_static)* quantize_static;
};

int failures = 0;

void CheckCuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}

/// Device memory of exactly the size asked for.
template <class T>
class Buffer {
 public:
  explicit Buffer(size_t count) : count_(count) {
    CheckCuda(cudaMalloc(&data_, std::max<size_t>(count * sizeof(T), 1)), "cudaMalloc");
  }
  explicit Buffer(const std::vector<T>& host) : Buffer(host.size()) {
    CheckCuda(cudaMemcpy(data_, host.data(), count_ * sizeof(T), cudaMemcpyHostToDevice), "copy to the device");
  }
  ~Buffer() { cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return static_cast<T*>(data_); }
  std::vector<T> Host() const {
    std::vector<T> host(count_);
    CheckCuda(cudaMemcpy(host.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost), "copy to the host");
    return host;
  }

 private:
  void* data_ = nullptr;
  size_t count_;
};

/// Values of one of the interface's dtypes.
struct Typed {
  static size_t Size(int dtype) { return dtype == 0 ? 4 : 2; }
  static void Put(int dtype, float value, uint8_t* to) {
    if (dtype == 0) {
      std::memcpy(to, &value, 4);
    } else if (dtype == 1) {
      const __half half = __float2half_rn(value);
      std::memcpy(to, &half, 2);
    } else {
      const __nv_bfloat16 half = __float2bfloat16_rn(value);
      std::memcpy(to, &half, 2);
    }
  }
  static float Get(int dtype, const uint8_t* from) {
    if (dtype == 0) {
      float value;
      std::memcpy(&value, from, 4);
      return value;
    }
    if (dtype == 1) {
      __half half;
      std::memcpy(&half, from, 2);
      return __half2float(half);
    }
    __nv_bfloat16 half;
    std::memcpy(&half, from, 2);
    return __bfloat162float(half);
  }
};

struct Problem {
  int m, k, n, block, dtype;
  int max_multiple;  // 0, or 15 for integer-structured scales
  bool per_token;
  int zero_point;
};

struct Path {
  const char* name;
  FptqMatMulOptions options;
  int min_capability;
};

constexpr Path kPaths[] = {
    {"chosen", {0, 0, 0, 0, 0, 0, 0, 0}, 80},
    {"stream, bulk copies", {1, 1, 0, 0, 0, 0, 0, 0}, 90},
    {"stream, bulk copies, split 4", {1, 1, 16, 0, 4, 0, 0, 0}, 90},
    {"stream, wide", {1, 1, 0, 0, 0, 0, 0, 1}, 90},
    {"stream, paired", {1, 1, 0, 0, 0, 0, 0, 2}, 90},
    {"stream, tall", {1, 1, 0, 0, 0, 0, 0, 3}, 90},
    {"stream, tall, split 4", {1, 1, 16, 0, 4, 0, 0, 3}, 90},
    {"stream, broad", {1, 1, 16, 0, 0, 0, 0, 4}, 90},
    {"warpgroup 64x64", {2, 0, 64, 64, 0, 0, 0, 0}, 90},
    {"stream, cp.async", {1, 2, 0, 0, 0, 0, 0, 0}, 80},
    {"warpgroup 64x128", {2, 0, 64, 128, 0, 0, 0, 0}, 90},
    {"warpgroup 64x128, split 3", {2, 0, 64, 128, 3, 0, 0, 0}, 90},
    {"warpgroup 64x192", {2, 0, 64, 192, 0, 0, 0, 0}, 90},
    {"warpgroup 64x192, split 2", {2, 0, 64, 192, 2, 0, 0, 0}, 90},
    {"warpgroup 128x128", {2, 0, 128, 128, 0, 0, 0, 0}, 90},
    {"warpgroup 128x128, split 3", {2, 0, 128, 128, 3, 0, 0, 0}, 90},
    {"warpgroup 128x192", {2, 0, 128, 192, 0, 0, 0, 0}, 90},
    {"warpgroup 128x256", {2, 0, 128, 256, 0, 0, 0, 0}, 90},
    {"reference", {3, 0, 0, 0, 0, 0, 0, 0}, 80},
};

class Driver {
 public:
  /// `few`: without the products that racecheck misunderstands.
  Driver(const char* path, bool few) : library_(path), few_(few) {
    cudaDeviceProp properties;
    CheckCuda(cudaGetDeviceProperties(&properties, 0), "device");
    capability_ = 10 * properties.major + properties.minor;
  }

  void MatMul(const Problem& p) {
    const int groups = (p.k + p.block - 1) / p.block;
    std::vector<int> q(static_cast<size_t>(p.k) * p.n);
    for (int& value : q) value = Uniform(-8, 7);
    std::vector<uint8_t> packed((q.size() + 1) / 2);
    for (size_t i = 0; i < q.size(); ++i) packed[i / 2] |= static_cast<uint8_t>((q[i] & 15) << (i % 2 * 4));
    std::vector<uint8_t> scale_bytes(static_cast<size_t>(groups) * p.n * Typed::Size(p.dtype));
    std::vector<float> scale(static_cast<size_t>(groups) * p.n);
    for (size_t i = 0; i < scale.size(); ++i) {
      const float base = std::ldexp(1.0f, -8 + static_cast<int>(i % p.n % 3));
      const float value = p.max_multiple > 0 ? base * static_cast<float>(Uniform(-p.max_multiple, p.max_multiple))
                                             : 0.002f + 0.0001f * static_cast<float>(Uniform(-15, 100));
      uint8_t* const at = scale_bytes.data() + i * Typed::Size(p.dtype);
      Typed::Put(p.dtype, value, at);
      scale[i] = Typed::Get(p.dtype, at);
    }
    std::vector<uint8_t> a(static_cast<size_t>(p.m) * p.k);
    for (uint8_t& value : a) value = static_cast<uint8_t>(Uniform(0, 255));
    std::vector<float> a_scale(p.per_token ? p.m : 1);
    for (float& value : a_scale) value = 0.001f * static_cast<float>(Uniform(1, 20));

    FptqWeights* weights = nullptr;
    if (Call(library_.pack(packed.data(), scale_bytes.data(), p.dtype, p.k, p.n, p.block, p.max_multiple, nullptr,
                           &weights))) {
      return;
    }
    const Buffer<uint8_t> a_device(a);
    const Buffer<float> a_scale_device(a_scale);
    const Buffer<uint8_t> zero_point(std::vector<uint8_t>{static_cast<uint8_t>(p.zero_point)});
    std::vector<double> expected(static_cast<size_t>(p.m) * p.n);
    for (int m = 0; m < p.m; ++m) {
      for (int n = 0; n < p.n; ++n) {
        double sum = 0;
        for (int g = 0; g < groups; ++g) {
          int64_t integers = 0;
          for (int k = g * p.block; k < std::min(p.k, (g + 1) * p.block); ++k) {
            integers +=
                int64_t{a[static_cast<size_t>(m) * p.k + k] - p.zero_point} * q[static_cast<size_t>(k) * p.n + n];
          }
          sum += static_cast<double>(integers) * scale[static_cast<size_t>(g) * p.n + n];
        }
        expected[static_cast<size_t>(m) * p.n + n] = sum * a_scale[p.per_token ? m : 0];
      }
    }
    for (const Path& path : kPaths) {
      if (capability_ < path.min_capability) continue;
      // These copy rows of A with 16-byte requests; other rows are the tile kernel's.
      const bool bulk = path.options.kernel == 2 || path.options.loader == 1;
      if (bulk && p.k % 16 != 0) continue;
      // Tiles of 128 tokens x 192 channels are for integer-structured scales of groups of 128 and more, other large
      // ones not for float scales of less.
      if (path.options.tile_m == 128 && path.options.tile_n == 192 && (p.max_multiple == 0 || p.block < 128)) continue;
      if (path.options.kernel == 2 && p.k <= (path.options.split_k - 1) * 128) continue;  // a block of K for each
      // racecheck does not know that wgmma.wait_group synchronises a warp: where the ring of the warpgroup kernel is
      // filled again, it takes the reads of the lanes that do not arrive at the barrier for unordered.
      if (few_ && path.options.kernel == 2 && p.k > 1024) continue;
      if (path.options.tile_n >= 192 && p.max_multiple == 0 && p.block < 128) continue;
      // Deep tiles take K two blocks at a time, and have no float scales of less than one.
      const bool deep = path.options.tile_n == 64;
      if (deep && ((p.k + 127) / 128 % 2 != 0 || (p.max_multiple == 0 && p.block < 128))) continue;
      if (deep && (p.m + 63) / 64 * ((p.n + 127) / 128) > 60) continue;  // pairs that find room at once
      const size_t bytes = expected.size() * Typed::Size(p.dtype);
      const Buffer<uint8_t> y(std::vector<uint8_t>(bytes, 0xFF));  // NaN in every dtype
      if (Call(library_.matmul(weights, a_device.get(), a_scale_device.get(), p.per_token, zero_point.get(), p.m,
                               y.get(), &path.options, nullptr))) {
        std::printf("  in %s\n", path.name);
        continue;
      }
      CheckCuda(cudaDeviceSynchronize(), path.name);
      CompareProduct(p, path.name, expected, y.Host());
    }
    if (p.zero_point == 128) DynamicMatMul(p, weights);
    library_.free_weights(weights);
  }

  /// Float activations: the same bytes as quantization and product one after the other.
  void DynamicMatMul(const Problem& p, const FptqWeights* weights) {
    std::vector<uint8_t> x(static_cast<size_t>(p.m) * p.k * Typed::Size(p.dtype));
    std::normal_distribution<float> normal;
    for (size_t i = 0; i < x.size(); i += Typed::Size(p.dtype)) Typed::Put(p.dtype, normal(random_), x.data() + i);
    const Buffer<uint8_t> x_device(x);
    const Buffer<uint8_t> q(static_cast<size_t>(p.m) * p.k);
    const Buffer<float> scale(static_cast<size_t>(p.m));
    const Buffer<uint8_t> zero_point(std::vector<uint8_t>{128});
    const size_t bytes = static_cast<size_t>(p.m) * p.n * Typed::Size(p.dtype);
    int32_t inside = 0;
    if (Call(library_.quantizes_inside(weights, x_device.get(), p.m, &inside))) return;
    inside_ += inside;
    for (const Path& path : kPaths) {
      if (path.options.kernel > 1 || capability_ < path.min_capability) continue;
      if (path.options.loader == 1 && p.k % 16 != 0) continue;
      const Buffer<uint8_t> y(std::vector<uint8_t>(bytes, 0xFF));
      const Buffer<uint8_t> expected(std::vector<uint8_t>(bytes, 0));
      const bool alone = inside != 0 && path.options.kernel == 0;  // needs no workspace
      if (Call(library_.dynamic_matmul(weights, x_device.get(), p.m, y.get(), alone ? nullptr : q.get(),
                                       alone ? nullptr : scale.get(), &path.options, nullptr)) ||
          Call(library_.quantize_per_token(x_device.get(), p.dtype, p.m, p.k, q.get(), scale.get(), nullptr)) ||
          Call(library_.matmul(weights, q.get(), scale.get(), 1, zero_point.get(), p.m, expected.get(), &path.options,
                               nullptr))) {
        std::printf("  float activations in %s\n", path.name);
        continue;
      }
      CheckCuda(cudaDeviceSynchronize(), path.name);
      if (y.Host() != expected.Host()) {
        Fail("float activations, %s: m=%d k=%d n=%d dtype=%d differ from two kernels", path.name, p.m, p.k, p.n,
             p.dtype);
      }
    }
  }
  int inside() const { return inside_; }
  bool CanQuantizeInside() const { return capability_ >= 90; }

  void QuantizePerToken(int m, int k, int dtype) {
    std::vector<uint8_t> x(static_cast<size_t>(m) * k * Typed::Size(dtype));
    std::normal_distribution<float> normal;
    for (size_t i = 0; i < x.size(); i += Typed::Size(dtype)) Typed::Put(dtype, normal(random_), x.data() + i);
    const Buffer<uint8_t> x_device(x);
    const Buffer<uint8_t> q(std::vector<uint8_t>(static_cast<size_t>(m) * k, 0));
    const Buffer<float> scale(std::vector<float>(m, NAN));
    if (Call(library_.quantize_per_token(x_device.get(), dtype, m, k, q.get(), scale.get(), nullptr))) return;
    CheckCuda(cudaDeviceSynchronize(), "quantize per token");
    const std::vector<uint8_t> quantized = q.Host();
    const std::vector<float> scales = scale.Host();
    for (int row = 0; row < m; ++row) {
      float largest = 0;
      for (int i = 0; i < k; ++i) largest = std::max(largest, std::fabs(At(x, dtype, row, k, i)));
      const float step = largest > 0 ? largest / 127.0f : 1.0f;
      bool good = scales[row] == step;
      for (int i = 0; i < k && good; ++i) {
        const int wanted = static_cast<int>(std::nearbyint(At(x, dtype, row, k, i) / step)) + 128;
        good = quantized[static_cast<size_t>(row) * k + i] == std::clamp(wanted, 1, 255);
      }
      if (!good) Fail("quantize per token: m=%d k=%d dtype=%d row %d", m, k, dtype, row);
    }
  }

  void QuantizeStatic(int count, int dtype) {
    const float step = 0.03f;
    std::vector<uint8_t> x(static_cast<size_t>(count) * Typed::Size(dtype));
    std::normal_distribution<float> normal(0, 3);
    for (size_t i = 0; i < x.size(); i += Typed::Size(dtype)) Typed::Put(dtype, normal(random_), x.data() + i);
    const Buffer<uint8_t> x_device(x);
    const Buffer<float> scale(std::vector<float>{step});
    const Buffer<uint8_t> zero_point(std::vector<uint8_t>{120});
    const Buffer<uint8_t> q(std::vector<uint8_t>(count, 0));
    if (Call(library_.quantize_static(x_device.get(), dtype, count, scale.get(), zero_point.get(), q.get(), nullptr))) {
      return;
    }
    CheckCuda(cudaDeviceSynchronize(), "quantize static");
    const std::vector<uint8_t> quantized = q.Host();
    for (int i = 0; i < count; ++i) {
      const int wanted = static_cast<int>(std::nearbyint(At(x, dtype, 0, count, i) / step)) + 120;
      if (quantized[i] != std::clamp(wanted, 0, 255)) {
        return Fail("quantize static: count=%d dtype=%d element %d", count, dtype, i);
      }
    }
  }

 private:
  int Uniform(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_); }

  static float At(const std::vector<uint8_t>& x, int dtype, int row, int k, int i) {
    return Typed::Get(dtype, x.data() + (static_cast<size_t>(row) * k + i) * Typed::Size(dtype));
  }

  bool Call(int status) {
    if (status != 0) Fail("%s", library_.last_error());
    return status != 0;
  }

  template <class... Args>
  void Fail(const char* format, Args... args) {
    std::printf("FAILED ");
    std::printf(format, args...);
    std::printf("\n");
    ++failures;
  }

  void CompareProduct(const Problem& p, const char* path, const std::vector<double>& expected,
                      const std::vector<uint8_t>& y) {
    double worst = 0;
    for (int m = 0; m < p.m; ++m) {
      double rms = 0;
      for (int n = 0; n < p.n; ++n) rms += std::pow(expected[static_cast<size_t>(m) * p.n + n], 2) / p.n;
      rms = std::sqrt(rms);
      for (int n = 0; n < p.n; ++n) {
        const size_t i = static_cast<size_t>(m) * p.n + n;
        const double error = std::fabs(Typed::Get(p.dtype, y.data() + i * Typed::Size(p.dtype)) - expected[i]) /
                             std::max(std::fabs(expected[i]), rms);
        worst = error <= worst ? worst : error;  // keeps NaN
      }
    }
    // Half a unit in the last place of the type, and a little for float32 sums.
    const double tolerance = std::ldexp(1.0, p.dtype == 0 ? -24 : p.dtype == 1 ? -11 : -8) + 1e-4;
    if (!(worst <= tolerance)) {
      Fail("%s: m=%d k=%d n=%d block=%d dtype=%d max_multiple=%d per_token=%d zero_point=%d: error %g", path, p.m, p.k,
           p.n, p.block, p.dtype, p.max_multiple, p.per_token ? 1 : 0, p.zero_point, worst);
    }
  }

  Library library_;
  int capability_ = 0;
  bool few_;
  int inside_ = 0;  // problems whose product quantizes
  std::mt19937 random_{20};
};

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: %s KERNEL_LIBRARY.so [few]\n", argv[0]);
    return 2;
  }
  const bool few = argc > 2 && std::strcmp(argv[2], "few") == 0;
  Driver driver(argv[1], few);
  int problems = 0;
  const std::vector<int> tokens = few ? std::vector<int>{1, 70} : std::vector<int>{1, 3, 8, 16, 17, 64, 65, 130};
  const std::vector<Problem> layers = {
      // m, k, n, block, dtype, max_multiple, per_token, zero_point; the second quantizes itself
      {0, 256, 128, 128, 1, 0, true, 128},  {0, 2048, 72, 128, 1, 0, true, 128}, {0, 576, 200, 128, 1, 15, true, 128},
      {0, 200, 72, 64, 0, 0, false, 3},     {0, 512, 72, 32, 2, 0, true, 7},     {0, 300, 136, 300, 2, 0, true, 255},
      {0, 1000, 100, 32, 1, 0, false, 128}, {0, 129, 65, 100, 2, 15, true, 128}, {0, 512, 4200, 128, 1, 0, true, 128},
      {0, 2048, 72, 128, 2, 15, true, 128}, {0, 2064, 72, 32, 0, 0, true, 128},  {0, 512, 136, 128, 0, 15, true, 128},
  };
  for (Problem p : layers) {
    for (int m : tokens) {
      if (few && m > 16 && p.k > 1024) continue;  // would take the warpgroup kernel, see MatMul
      p.m = m;
      driver.MatMul(p);
      ++problems;
    }
    if (few && problems >= 4) break;
  }
  for (int dtype = 0; dtype < 3; ++dtype) {
    for (int k : few ? std::vector<int>{576} : std::vector<int>{1, 100, 576, 4096, 5001}) {
      driver.QuantizePerToken(3, k, dtype);
      driver.QuantizeStatic(k, dtype);
      problems += 2;
    }
  }
  if (driver.CanQuantizeInside() && driver.inside() == 0) {
    std::printf("FAILED no product quantized its activations itself\n");
    ++failures;
  }
  std::printf("%d problems, %d of products that quantize, %d failures\n", problems, driver.inside(), failures);
  return failures == 0 ? 0 : 1;
}
