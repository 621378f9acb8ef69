// float32, float16 and bfloat16 behind one interface, two neighbouring values at a time.
#ifndef FPTQ_CUDA_NUMERIC_CUH_
#define FPTQ_CUDA_NUMERIC_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace fptq::cuda {

template <class T>
struct Numeric;

template <>
struct Numeric<float> {
  using Pair = float2;
  __device__ static float ToFloat(float x) { return x; }
  __device__ static float FromFloat(float x) { return x; }
  __device__ static float2 ToFloat2(float2 x) { return x; }
  __device__ static float2 FromFloat2(float2 x) { return x; }
};

template <>
struct Numeric<__half> {
  using Pair = __half2;
  __device__ static float ToFloat(__half x) { return __half2float(x); }
  __device__ static __half FromFloat(float x) { return __float2half_rn(x); }
  __device__ static float2 ToFloat2(__half2 x) { return __half22float2(x); }
  __device__ static __half2 FromFloat2(float2 x) { return __float22half2_rn(x); }
};

template <>
struct Numeric<__nv_bfloat16> {
  using Pair = __nv_bfloat162;
  __device__ static float ToFloat(__nv_bfloat16 x) { return __bfloat162float(x); }
  __device__ static __nv_bfloat16 FromFloat(float x) { return __float2bfloat16_rn(x); }
  __device__ static float2 ToFloat2(__nv_bfloat162 x) { return __bfloat1622float2(x); }
  __device__ static __nv_bfloat162 FromFloat2(float2 x) { return __float22bfloat162_rn(x); }
};

}  // namespace fptq::cuda

#endif  // FPTQ_CUDA_NUMERIC_CUH_
