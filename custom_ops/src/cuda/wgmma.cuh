// Warpgroup matrix instructions of sm_90a: int8 weights from registers, uint8 activations from shared memory.
#ifndef FPTQ_CUDA_WGMMA_CUH_
#define FPTQ_CUDA_WGMMA_CUH_

#include <cstdint>

namespace fptq::cuda::wgmma {

/// Orders register accesses of the warpgroup before the wgmmas that follow.
__device__ __forceinline__ void Fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void Commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/// Waits until at most kPending committed groups are in flight.
template <int kPending>
__device__ __forceinline__ void Wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

/// Keeps the computation of operand registers where it is written.
__device__ __forceinline__ void Pin(uint32_t (&a)[4]) {
  asm volatile("" : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3])::"memory");
}

/// Descriptor of a K-major tile with 128-byte rows and the 128-byte swizzle at a shared address aligned to 1 KB:
/// address / 16 in bits 0..13, 1 KB / 16 between groups of 8 rows in bits 32..45, swizzle mode in bits 62..63.
/// A step of 32 along K adds 2.
__device__ __forceinline__ uint64_t TileDescriptor(uint32_t shared_address) {
  return (uint64_t{1} << 62) | (uint64_t{1024 / 16} << 32) | (uint64_t{1} << 16) | (shared_address >> 4 & 0x3FFF);
}

#define FPTQ_R8(d, i)                                                                                         \
  "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3]), "+r"(d[i + 4]), "+r"(d[i + 5]), "+r"(d[i + 6]), \
      "+r"(d[i + 7])
#define FPTQ_R32(d, i) FPTQ_R8(d, i), FPTQ_R8(d, i + 8), FPTQ_R8(d, i + 16), FPTQ_R8(d, i + 24)

/// d (64 channels x kTokens) (+)= a (64 x 32, int8) * tile (32 x kTokens, uint8). Overwrites d where `accumulate` is 0.
template <int kTokens>
struct Mma;

template <>
struct Mma<64> {
  __device__ static void Run(int (&d)[32], const uint32_t (&a)[4], uint64_t tile, int accumulate) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.u8 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,"
        "%29,%30,%31}, {%32,%33,%34,%35}, %36, p;\n"
        "}"
        : FPTQ_R32(d, 0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(tile), "r"(accumulate));
  }
};

template <>
struct Mma<128> {
  __device__ static void Run(int (&d)[64], const uint32_t (&a)[4], uint64_t tile, int accumulate) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.u8 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,"
        "%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,"
        "%56,%57,%58,%59,%60,%61,%62,%63}, {%64,%65,%66,%67}, %68, p;\n"
        "}"
        : FPTQ_R32(d, 0), FPTQ_R32(d, 32)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(tile), "r"(accumulate));
  }
};

#undef FPTQ_R32
#undef FPTQ_R8

}  // namespace fptq::cuda::wgmma

#endif  // FPTQ_CUDA_WGMMA_CUH_
