// C interface to the CUDA kernels, without onnxruntime: for benchmarks and numeric tests through ctypes.
//
// Every function that returns int returns 0 on success; otherwise fptq_last_error() holds the reason (per thread).
// dtype: 0 = float32, 1 = float16, 2 = bfloat16 (the type of scales, X and Y). `stream` is a cudaStream_t.
// Apart from packing and freeing, nothing allocates, synchronises or reads back: all calls may be captured in a graph.
#ifndef FPTQ_CUDA_KERNELS_C_API_H_
#define FPTQ_CUDA_KERNELS_C_API_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FPTQ_EXPORT __attribute__((visibility("default")))

// Weights packed for the kernels, on the device that was current when they were packed.
typedef struct FptqWeights FptqWeights;

typedef struct FptqMatMulOptions {
  int32_t
      kernel;  // 0 = chosen by M, 1 = streaming (mma.sync), 2 = warpgroup (wgmma, sm_90a), 3 = reference (any block)
  int32_t loader;   // streaming kernel: 0 = chosen, 1 = bulk copies (sm_90+), 2 = cp.async
  int32_t tile_m;   // tokens per CTA; 0 = chosen. streaming: 8, 16, 32, 64; warpgroup: 64, 128
  int32_t tile_n;   // channels per CTA; 0 = chosen. warpgroup: 64, 128, 192, 256; the streaming kernel has its own
  int32_t split_k;  // CTAs of one cluster that share a tile; 0 = chosen, else 1 to 8; streaming: 2, 4, 8
  int32_t stages;   // depth of the shared-memory ring; 0 = chosen
  int32_t overlap;  // programmatic dependent launch: 0 = on, 1 = off
  int32_t form;     // streaming kernel, up to 16 tokens: 0 = chosen, 1 = wide, 2 = paired, 3 = tall, 4 = broad
} FptqMatMulOptions;

FPTQ_EXPORT const char* fptq_last_error(void);

// b: INT4 [k, n] row-major, low nibble first, (k*n+1)/2 bytes. b_scale: dtype [ceil(k/block_size), n].
// Both may lie on the host or on the device. Synchronises.
FPTQ_EXPORT int fptq_pack_weights(const void* b, const void* b_scale, int32_t dtype, int64_t k, int64_t n,
                                  int64_t block_size, int32_t scale_max_multiple, void* stream, FptqWeights** weights);
FPTQ_EXPORT void fptq_free_weights(FptqWeights* weights);
FPTQ_EXPORT int64_t fptq_weights_bytes(const FptqWeights* weights);           // device memory held
FPTQ_EXPORT int32_t fptq_weights_integer_scales(const FptqWeights* weights);  // 1: verified base * i, one int32 sum

// y[m, n] = a_scale * sum_g b_scale[g, n] * sum_{k in g} (a - zero_point) * b.
// a: uint8 [m, k]; a_scale: float32 [1] or [m] (per_token != 0); a_zero_point: uint8 [1]; y: dtype [m, n]; device
// memory. options may be NULL (all chosen).
FPTQ_EXPORT int fptq_w4a8_matmul(const FptqWeights* weights, const void* a, const void* a_scale, int32_t per_token,
                                 const void* a_zero_point, int64_t m, void* y, const FptqMatMulOptions* options,
                                 void* stream);
// y[m, n] = the same of x: dtype [m, k], quantized per token on the way. q: uint8 [m, k] and scale: float32 [m] are
// workspace, and may be NULL where fptq_quantizes_inside.
FPTQ_EXPORT int fptq_dynamic_w4a8_matmul(const FptqWeights* weights, const void* x, int64_t m, void* y, void* q,
                                         void* scale, const FptqMatMulOptions* options, void* stream);
FPTQ_EXPORT int fptq_quantizes_inside(const FptqWeights* weights, const void* x, int64_t m, int32_t* inside);
// What "chosen" resolves to on the current device for m rows (kernel, tile_m, tile_n, split_k, stages, loader).
FPTQ_EXPORT int fptq_describe_plan(const FptqWeights* weights, int64_t m, FptqMatMulOptions* chosen);

// x: dtype [m, k] -> q: uint8 [m, k] (zero point 128), scale: float32 [m].
FPTQ_EXPORT int fptq_dynamic_quantize_per_token(const void* x, int32_t dtype, int64_t m, int64_t k, void* q,
                                                void* scale, void* stream);
// x: dtype [count] -> q = saturate_uint8(round_half_even(x / scale) + zero_point), scale float32 [1], zero point uint8
// [1].
FPTQ_EXPORT int fptq_quantize_static(const void* x, int32_t dtype, int64_t count, const void* scale,
                                     const void* zero_point, void* q, void* stream);

// Ceilings. Reads `bytes` (multiple of 16) with the streaming kernel's bulk copies and nothing else; sink: >= 4 bytes.
FPTQ_EXPORT int fptq_bench_read(const void* data, int64_t bytes, void* sink, void* stream);
// wgmma u8 x s8, weights from registers, no memory traffic: `iterations` times 8 m64n128k32 per warpgroup, two
// warpgroups on every multiprocessor. Operations: multiprocessors * 2 * iterations * 8 * 2*64*128*32. sink: >= 4 bytes.
FPTQ_EXPORT int fptq_bench_wgmma(int32_t iterations, void* sink, void* stream);

#ifdef __cplusplus
}
#endif

#endif  // FPTQ_CUDA_KERNELS_C_API_H_
