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

/// Keeps the computation and the use of registers where they are written.
template <class Value, int kCount>
__device__ __forceinline__ void Pin(Value (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(values[i])::"memory");
}

/// Low word of the descriptor of a K-major tile with 128-byte rows and the 128-byte swizzle at a shared address aligned
/// to 1 KB: address / 16. A step of 32 along K adds 2, 16 bytes add 1.
__device__ __forceinline__ uint32_t TileDescriptor(uint32_t shared_address) { return (1u << 16) | shared_address >> 4; }
/// The whole one: 1 KB / 16 between groups of 8 rows in bits 32..45, swizzle mode in bits 62..63.
__device__ __forceinline__ uint64_t Descriptor(uint32_t low) {
  return (uint64_t{1} << 62) | (uint64_t{1024 / 16} << 32) | low;
}

// 32 sums per thread: one product of 64 tokens, or half of one of 128.
#define FPTQ_8(access, d, i)                                                                              \
  access(d[i]), access(d[i + 1]), access(d[i + 2]), access(d[i + 3]), access(d[i + 4]), access(d[i + 5]), \
      access(d[i + 6]), access(d[i + 7])
#define FPTQ_32(access, d, i) \
  FPTQ_8(access, d, i), FPTQ_8(access, d, i + 8), FPTQ_8(access, d, i + 16), FPTQ_8(access, d, i + 24)
#define FPTQ_NAMES_32                                                                                              \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29," \
  "%30,%31"
#define FPTQ_NAMES_64                                                                                             \
  FPTQ_NAMES_32                                                                                                   \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58," \
  "%59,%60,%61,%62,%63"
#define FPTQ_ADD(x) "+r"(x)
#define FPTQ_SET(x) "=&r"(x)  // not shared with operands, which are read for as long as it is written

/// d (64 channels x kTokens) = or += a (64 x 32, int8) * tile (32 x kTokens, uint8).
template <int kTokens>
struct Mma;

template <>
struct Mma<64> {
  __device__ static void Set(int (&d)[32], const uint32_t (&a)[4], uint64_t tile) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, 0, 0;\nwgmma.mma_async.sync.aligned.m64n64k32.s32.s8.u8 {" FPTQ_NAMES_32
        "}, {%32,%33,%34,%35}, %36, add;\n}"
        : FPTQ_32(FPTQ_ADD, d, 0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(tile));
  }
  __device__ static void Add(int (&d)[32], const uint32_t (&a)[4], uint64_t tile) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.eq.b32 add, 0, 0;\nwgmma.mma_async.sync.aligned.m64n64k32.s32.s8.u8 {" FPTQ_NAMES_32
        "}, {%32,%33,%34,%35}, %36, add;\n}"
        : FPTQ_32(FPTQ_ADD, d, 0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(tile));
  }
};

template <>
struct Mma<128> {
  __device__ static void Add(int (&d)[64], const uint32_t (&a)[4], uint64_t tile) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.eq.b32 add, 0, 0;\nwgmma.mma_async.sync.aligned.m64n128k32.s32.s8.u8 {" FPTQ_NAMES_64
        "}, {%64,%65,%66,%67}, %68, add;\n}"
        : FPTQ_32(FPTQ_ADD, d, 0), FPTQ_32(FPTQ_ADD, d, 32)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(tile));
  }
};

#undef FPTQ_SET
#undef FPTQ_ADD
#undef FPTQ_NAMES_64
#undef FPTQ_NAMES_32
#undef FPTQ_32
#undef FPTQ_8

}  // namespace fptq::cuda::wgmma

#endif  // FPTQ_CUDA_WGMMA_CUH_
