// Product of activations and packed int4 or int8 weights on the CPU, free of onnxruntime.
#ifndef FPTQ_CPU_PACKED_GEMM_H_
#define FPTQ_CPU_PACKED_GEMM_H_

#include <cstddef>
#include <cstdint>

#include "cpu/gemm.h"
#include "cpu/packed_weights.h"
#include "cpu/parallel.h"

namespace fptq::cpu {

/// Packed weights and the kernels that read them. Immutable, so calls may run at the same time.
class PackedGemm {
 public:
  PackedGemm(const WeightSource& source, const Kernels& kernels)
      : weights_(Pack(source)), type_(source.type), kernels_(kernels) {}

  /// Activations are uint8 (a, a_scale, a_zero_point) or float (x), which are quantized as DynamicQuantizePerToken
  /// does.
  enum class Activations { kQuantized, kFloat };

  /// Bytes of scratch that Run needs for `rows` rows.
  size_t ScratchBytes(int64_t rows, Activations activations = Activations::kQuantized) const;

  struct Call {
    const void* x = nullptr;     ///< [rows][k] in the type of the scales; null for quantized activations
    const uint8_t* a = nullptr;  ///< [rows][k]
    int64_t rows = 0;
    const float* a_scale = nullptr;  ///< one, or one per row
    bool per_token = false;
    uint8_t a_zero_point = 128;
    void* y = nullptr;        ///< [rows][n]
    void* scratch = nullptr;  ///< ScratchBytes(rows, ...)
  };
  void Run(const Call& call, const Parallel& parallel) const;

  const PackedWeights& weights() const { return weights_; }

 private:
  PackedWeights weights_;
  ElementType type_;
  const Kernels& kernels_;
};

}  // namespace fptq::cpu

#endif  // FPTQ_CPU_PACKED_GEMM_H_
