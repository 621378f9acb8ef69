// Thin wrappers of the PTX instructions that the kernels use.
#ifndef FPTQ_CUDA_PTX_CUH_
#define FPTQ_CUDA_PTX_CUH_

#include <cuda.h>  // CUtensorMap; types only, the driver is never linked

#include <cstdint>
#include <cstring>

namespace fptq::cuda::ptx {

__device__ __forceinline__ uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

/// Keeps a value in a register: the compiler would compute it anew wherever it is used.
template <class Value>
__device__ __forceinline__ void Keep(Value& value) {
  asm volatile("" : "+r"(value));
}

// ---- tensor cores, warp level -------------------------------------------------------------------------------------

/// d += a (16 x 32, int8) * b (32 x 8, uint8).
__device__ __forceinline__ void MmaAdd(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
/// d = a * b.
__device__ __forceinline__ void MmaSet(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(0));
}

__device__ __forceinline__ void LoadMatrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

/// One access of 4, 8 or 16 bytes; the compiler would split a 16-byte load whose words are used apart.
template <class Value>
__device__ __forceinline__ Value LoadShared(uint32_t address) {
  static_assert(sizeof(Value) == 4 || sizeof(Value) == 8 || sizeof(Value) == 16);
  uint32_t words[sizeof(Value) / 4];
  if constexpr (sizeof(Value) == 4) {
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(words[0]) : "r"(address) : "memory");
  } else if constexpr (sizeof(Value) == 8) {
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "r"(address) : "memory");
  } else {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
  }
  Value value;
  memcpy(&value, words, sizeof(Value));
  return value;
}

__device__ __forceinline__ void StoreShared(uint32_t address, uint4 value) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}

// ---- asynchronous copies of sm_80 ---------------------------------------------------------------------------------

/// 16 bytes to shared memory; those from `valid` (0..16) on become zero.
__device__ __forceinline__ void CopyAsync16(uint32_t shared, const void* global, int valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid) : "memory");
}
__device__ __forceinline__ void CopyAsyncCommit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void CopyAsyncWait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- mbarriers, sm_90
// ------------------------------------------------------------------------------------------------

__device__ __forceinline__ void BarrierInit(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(SharedAddress(barrier)), "r"(count) : "memory");
}
/// Makes initialised barriers visible to the copy engine and to the cluster.
__device__ __forceinline__ void BarrierInitFence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void BarrierArrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(SharedAddress(barrier)) : "memory");
}
__device__ __forceinline__ void BarrierArrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void BarrierArriveExpect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(SharedAddress(barrier)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void BarrierWait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\n"
      "bra WAIT;\n"
      "DONE:\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ void BarrierWait(uint64_t* barrier, uint32_t parity) {
  BarrierWait(SharedAddress(barrier), parity);
}

/// Whether the phase is complete; does not wait.
__device__ __forceinline__ bool BarrierTest(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done;\n"
      "}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}

// ---- bulk copies --------------------------------------------------------------------------------------------------

/// Cache policy for bytes that are read once.
__device__ __forceinline__ uint64_t EvictFirstPolicy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
/// Cache policy for bytes that other CTAs read soon.
__device__ __forceinline__ uint64_t EvictLastPolicy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
/// `bytes` contiguous bytes (multiple of 16, aligned to 16) to shared memory, counted by `barrier`.
__device__ __forceinline__ void BulkCopy(uint32_t shared, const void* global, uint32_t bytes, uint64_t* barrier,
                                         uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(shared),
      "l"(global), "r"(bytes), "r"(SharedAddress(barrier)), "l"(policy)
      : "memory");
}
/// Asks for `bytes` (multiple of 16) to be brought into L2; nothing waits for them.
__device__ __forceinline__ void BulkPrefetch(const void* global, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory");
}
/// The box at (x, y) of a two-dimensional tensor map; the part outside the tensor arrives as zeros and is counted.
__device__ __forceinline__ void BulkCopyTile(uint32_t shared, const CUtensorMap* map, int x, int y, uint64_t* barrier,
                                             uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared),
      "l"(map), "r"(x), "r"(y), "r"(SharedAddress(barrier)), "l"(policy)
      : "memory");
}
/// The same to the same place of all CTAs of the cluster in `ranks` (a bit each), counted by the barrier of each.
__device__ __forceinline__ void BulkCopyTileToCluster(uint32_t shared, const CUtensorMap* map, int x, int y,
                                                      uint64_t* barrier, uint16_t ranks, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
      ".L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5, %6;" ::"r"(shared),
      "l"(map), "r"(x), "r"(y), "r"(SharedAddress(barrier)), "h"(ranks), "l"(policy)
      : "memory");
}
__device__ __forceinline__ void PrefetchLine(const void* global) {
  asm volatile("prefetch.global.L1 [%0];" ::"l"(global));
}
__device__ __forceinline__ void PrefetchToL2(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}
__device__ __forceinline__ void PrefetchTensorMap(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// ---- clusters -----------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t ClusterRank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
/// The address of what lies at `shared` here in the shared memory of CTA `rank`.
__device__ __forceinline__ uint32_t ClusterAddress(uint32_t shared, uint32_t rank) {
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared), "r"(rank));
  return remote;
}
/// Orders no writes for the other CTA (that would take a device-wide memory barrier): says that something was read.
__device__ __forceinline__ void ClusterBarrierArrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
/// Without ordering memory: for barriers that BarrierInitFence has made visible.
__device__ __forceinline__ void ClusterArriveRelaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void ClusterWait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
/// One word to the shared memory of CTA `rank`, counted there by the barrier at the same place as `barrier` here.
__device__ __forceinline__ void StoreClusterAsync(uint32_t shared, uint32_t value, uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .u32 remote, counted;\n"
      "mapa.shared::cluster.u32 remote, %0, %3;\n"
      "mapa.shared::cluster.u32 counted, %2, %3;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [remote], %1, [counted];\n"
      "}" ::"r"(shared),
      "r"(value), "r"(SharedAddress(barrier)), "r"(rank)
      : "memory");
}
/// The same for two words.
__device__ __forceinline__ void StoreClusterAsync(uint32_t shared, uint2 value, uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .u32 remote, counted;\n"
      "mapa.shared::cluster.u32 remote, %0, %4;\n"
      "mapa.shared::cluster.u32 counted, %3, %4;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [remote], {%1, %2}, [counted];\n"
      "}" ::"r"(shared),
      "r"(value.x), "r"(value.y), "r"(SharedAddress(barrier)), "r"(rank)
      : "memory");
}

/// The same with four words.
__device__ __forceinline__ void StoreClusterAsync(uint32_t shared, uint4 value, uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .u32 remote, counted;\n"
      "mapa.shared::cluster.u32 remote, %0, %6;\n"
      "mapa.shared::cluster.u32 counted, %5, %6;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [remote], {%1, %2, %3, %4}, [counted];\n"
      "}" ::"r"(shared),
      "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(SharedAddress(barrier)), "r"(rank)
      : "memory");
}

// ---- programmatic dependent launch --------------------------------------------------------------------------------

/// Until here a kernel may only touch constants: the kernels before it may still run.
__device__ __forceinline__ void WaitForPredecessors() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
/// The next kernel may be scheduled as soon as there is room.
__device__ __forceinline__ void AllowSuccessors() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace fptq::cuda::ptx

#endif  // FPTQ_CUDA_PTX_CUH_
