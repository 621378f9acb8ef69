// Ceilings: how fast weights can be read at all, and how fast the tensor cores multiply uint8 by int8.
// Compiled for sm_90a only.

#include "cuda/common.cuh"
#include "cuda/wgmma.cuh"

namespace fptq::cuda {
namespace {

constexpr int kChunk = 4096;
constexpr int kStages = 16;

/// Reads a contiguous share of `data` through a ring of bulk copies, like the streaming kernel with no arithmetic.
__global__ void __launch_bounds__(32) ReadKernel(const uint8_t* data, int chunks, uint32_t* sink) {
  extern __shared__ __align__(128) uint8_t ring[];
  __shared__ uint64_t barriers[kStages];
  const plan::Range mine = plan::Share(chunks, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));
  const int count = mine.end - mine.begin;
  ptx::AllowSuccessors();
  if (threadIdx.x != 0) return;
  for (int s = 0; s < kStages; ++s) ptx::BarrierInit(barriers + s, 1);
  ptx::BarrierInitFence();
  const uint64_t policy = ptx::EvictFirstPolicy();
  const auto load = [&](int i) {
    ptx::BarrierArriveExpect(barriers + i % kStages, kChunk);
    ptx::BulkCopy(ptx::SharedAddress(ring + i % kStages * kChunk), data + int64_t{mine.begin + i} * kChunk, kChunk,
                  barriers + i % kStages, policy);
  };
  for (int i = 0; i < min(kStages, count); ++i) load(i);
  for (int i = 0; i < count; ++i) {
    ptx::BarrierWait(barriers + i % kStages, i / kStages & 1);
    if (i + kStages < count) load(i + kStages);
  }
  ptx::WaitForPredecessors();
  if (ring[0] == 1 && count < 0) *sink = 1;
}

constexpr int kUnroll = 8;

__global__ void __launch_bounds__(2 * kGroupThreads, 1) WgmmaKernel(int iterations, uint32_t* sink) {
  __shared__ __align__(1024) uint32_t tile[128 * kBlockK / 4];
  for (int i = threadIdx.x; i < 128 * kBlockK / 4; i += 2 * kGroupThreads) tile[i] = (i + 1) * 2654435761u;
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  uint32_t a[4];
  for (int i = 0; i < 4; ++i) a[i] = (threadIdx.x * 4 + i + 1) * 2246822519u & 0xF0F0F0F0u;
  int sums[64] = {};
  const uint64_t descriptor = wgmma::Descriptor(wgmma::TileDescriptor(ptx::SharedAddress(tile)));
  wgmma::Fence();
  for (int i = 0; i < iterations; ++i) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) wgmma::Mma<128>::Add(sums, a, descriptor + 2 * (u % 4));
    wgmma::Commit();
    wgmma::Wait<1>();
  }
  wgmma::Wait<0>();
  int total = 0;
#pragma unroll
  for (int i = 0; i < 64; ++i) total ^= sums[i];
  if (total == 0x12345678) *sink = 1;
}

}  // namespace

void LaunchReadBenchmark(const Device& device, const void* data, int64_t bytes, void* sink, Stream stream) {
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(2 * device.multiprocessors));
  shape.threads = 32;
  shape.shared_bytes = kStages * kChunk;
  shape.overlap = true;
  Launch(ReadKernel, shape, stream, static_cast<const uint8_t*>(data), static_cast<int>(bytes / kChunk),
         static_cast<uint32_t*>(sink));
}

void LaunchWgmmaBenchmark(const Device& device, int iterations, void* sink, Stream stream) {
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(device.multiprocessors));
  shape.threads = 2 * kGroupThreads;
  shape.shared_bytes = 0;
  Launch(WgmmaKernel, shape, stream, iterations, static_cast<uint32_t*>(sink));
}

}  // namespace fptq::cuda
