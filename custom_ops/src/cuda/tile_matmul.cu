// Any device, any K: mma.m16n8k32 with cp.async. Runs before sm_90, and there for rows of A that are not aligned to 16
// bytes. A CTA computes kStrips strips of 64 channels for kTokens tokens; every strip has four warps. Stages of 128
// rows of K pass through a ring in shared memory that all threads fill.

#include <algorithm>

#include "cuda/mma_sums.cuh"

namespace fptq::cuda {
namespace {

using plan::kAsyncStages;

/// What one CTA works on.
struct TileWork {
  int64_t first_row;  ///< token
  int first_strip, strips;
};

template <int kTokens, int kStrips>
__host__ __device__ __forceinline__ plan::RingMemory TileMemory(const MatMulArguments& args) {
  return plan::RingMemory::Of(kTokens, kStrips, kAsyncStages, args.weights.layout.block_stride, 1);
}

/// All threads feed the ring with cp.async; rows of A that are not aligned to 16 bytes are read byte by byte.
template <int kTokens, int kStrips>
class AsyncLoader {
  static constexpr int kThreads = kStrips * kGroupThreads;

 public:
  __device__ AsyncLoader(const MatMulArguments& args, const TileWork& work, uint8_t* shared)
      : args_(args), work_(work), shared_(shared), memory_(TileMemory<kTokens, kStrips>(args)) {}

  __device__ void Start() {
    ptx::AllowSuccessors();
    ptx::WaitForPredecessors();
    for (int i = 0; i < kAsyncStages - 1; ++i) Load(i);
  }

  __device__ int Wait(int i) {
    ptx::CopyAsyncWait<kAsyncStages - 2>();
    __syncthreads();  // block i has arrived for all threads, block i - 1 is read by all
    Load(i + kAsyncStages - 1);
    return i % kAsyncStages;
  }

 private:
  __device__ void Load(int i) {
    const int block = i;
    if (block < args_.weights.layout.k_blocks) {
      LoadWeights(block, i % kAsyncStages);
      LoadTile(block, i % kAsyncStages);
    }
    ptx::CopyAsyncCommit();
  }

  __device__ void LoadWeights(int block, int stage) {
    const WeightView& w = args_.weights;
    for (int s = 0; s < work_.strips; ++s) {
      Copy(shared_ + memory_.weights + (stage * kStrips + s) * memory_.block_stride,
           w.blocks + w.layout.BlockOffset(work_.first_strip + s, block), memory_.block_stride);
    }
  }
  __device__ void Copy(uint8_t* shared, const uint8_t* global, int bytes) {
    for (int at = threadIdx.x * 16; at < bytes; at += kThreads * 16) {
      ptx::CopyAsync16(ptx::SharedAddress(shared + at), global + at, 16);
    }
  }

  __device__ void LoadTile(int block, int stage) {
    const MatMulCall& call = args_.call;
    const int64_t k = args_.weights.layout.k;
    const bool aligned = k % 16 == 0 && (reinterpret_cast<uintptr_t>(call.a) & 15) == 0;
    uint8_t* tile = shared_ + stage * kTokens * kBlockK;
    for (int c = threadIdx.x; c < kTokens * kBlockK / 16; c += kThreads) {
      const int64_t row = work_.first_row + c / 8;
      const int64_t column = int64_t{block} * kBlockK + c % 8 * 16;
      const int64_t left = row < call.m ? k - column : 0;
      const int valid = static_cast<int>(left < 0 ? 0 : left > 16 ? 16 : left);
      uint8_t* shared = tile + packing::SwizzledOffset(c / 8, c % 8);
      const uint8_t* global = valid > 0 ? call.a + row * k + column : call.a;
      if (aligned) {
        ptx::CopyAsync16(ptx::SharedAddress(shared), global, valid);
      } else {
        uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
        for (int b = 0; b < 16; ++b) {
          if (b < valid) words[b / 4] |= uint32_t{global[b]} << (8 * (b % 4));
        }
        *reinterpret_cast<uint4*>(shared) = make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  }

  const MatMulArguments& args_;
  const TileWork& work_;
  uint8_t* shared_;
  plan::RingMemory memory_;
};

template <class T, Promotion kPromotion, int kTokens, int kStrips>
__global__ void __launch_bounds__(kStrips* kGroupThreads) TileKernel(const __grid_constant__ MatMulArguments args) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const packing::Layout& layout = args.weights.layout;
  TileWork work;
  work.first_row = int64_t{blockIdx.y} * kTokens;
  work.first_strip = static_cast<int>(blockIdx.x) * kStrips;
  work.strips = min(kStrips, static_cast<int>(layout.strips) - work.first_strip);

  AsyncLoader<kTokens, kStrips> loader(args, work, shared);
  loader.Start();
  const plan::RingMemory memory = TileMemory<kTokens, kStrips>(args);
  const int strip = static_cast<int>(threadIdx.x) / kGroupThreads;
  MmaSums<T, kPromotion, kTokens, 1> sums;
  for (int i = 0; i < layout.k_blocks; ++i) {
    const int stage = loader.Wait(i);
    if (strip >= work.strips) continue;
    const uint32_t base = ptx::SharedAddress(shared);
    sums.Add(base + memory.weights + (stage * kStrips + strip) * memory.block_stride, 0,
             base + stage * memory.tile_bytes, layout);
  }
  if (strip >= work.strips) return;
  const int thread = static_cast<int>(threadIdx.x) % kGroupThreads;
  const int64_t n = int64_t{work.first_strip + strip} * kStripN + packing::ThreadChannel(thread);
  if (n >= layout.n) return;
  Epilogue<T, EncodingOf(kPromotion)> epilogue(args, n);
  epilogue.ReadZeroPoint();
#pragma unroll
  for (int q = 0; q < kTokens / 4; ++q) {
    const int64_t m = work.first_row + q / 2 * 8 + thread % 4 * 2 + q % 2;
    epilogue.Store(m, sums.Pair(0, q / 2, q % 2), epilogue.Scale(m));
  }
}

template <class T, Promotion kPromotion, int kTokens, int kStrips>
void LaunchTileKernel(const Device& device, const MatMulArguments& args, Stream stream) {
  // Tokens go along grid.y, which is limited; more of them take several launches.
  constexpr int64_t kMaxRows = int64_t{65535} * kTokens;
  for (int64_t first = 0; first < args.call.m; first += kMaxRows) {
    MatMulArguments part = args;
    part.call.m = std::min(args.call.m - first, kMaxRows);
    part.call.a += first * args.weights.layout.k;
    if (args.call.per_token) part.call.a_scale += first;
    part.call.y = static_cast<T*>(args.call.y) + first * args.weights.layout.n;
    LaunchShape shape;
    shape.grid = dim3(static_cast<unsigned>(packing::CeilDiv(args.weights.layout.strips, kStrips)),
                      static_cast<unsigned>(packing::CeilDiv(part.call.m, kTokens)));
    shape.threads = kStrips * kGroupThreads;
    shape.shared_bytes = TileMemory<kTokens, kStrips>(args).total;
    shape.overlap = device.HasBulkCopies();
    Launch(TileKernel<T, kPromotion, kTokens, kStrips>, shape, stream, part);
  }
}

template <class T, Promotion kPromotion>
void LaunchTileOf(const Device& device, const MatMulArguments& args, Stream stream) {
  if (args.call.m <= 8) return LaunchTileKernel<T, kPromotion, 8, 1>(device, args, stream);
  return LaunchTileKernel<T, kPromotion, 64, 2>(device, args, stream);
}

}  // namespace

void LaunchTile(const Device& device, const MatMulArguments& args, Stream stream) {
  ForType(args.weights.type, [&](auto zero) {
    ForPromotion(args.weights, [&](auto promotion) {
      LaunchTileOf<decltype(zero), decltype(promotion)::value>(device, args, stream);
    });
  });
}

}  // namespace fptq::cuda
