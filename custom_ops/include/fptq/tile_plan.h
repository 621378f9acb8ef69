// Which CTA computes what: order of output tiles, ranges of K, shares of a split-K reduction. Host/device maths.
#ifndef FPTQ_TILE_PLAN_H_
#define FPTQ_TILE_PLAN_H_

#include <cstdint>

#include "fptq/packing.h"

namespace fptq::plan {

struct Range {
  int begin, end;
};

/// Part `part` of `parts` of `count` items: contiguous, sizes differ by at most one, larger parts first.
FPTQ_HD constexpr Range Share(int count, int part, int parts) {
  const int base = count / parts;
  const int extra = count % parts;
  const int begin = part * base + (part < extra ? part : extra);
  return {begin, begin + base + (part < extra ? 1 : 0)};
}

struct Tile {
  int m, n;
};

/// Output tiles are walked in bands of at most `band` tiles along M, channels slowest inside a band, so that the tiles
/// in flight at one moment read few different activations and few different weights from L2.
FPTQ_HD constexpr Tile TileAt(int index, int tiles_m, int tiles_n, int band) {
  const int per_band = band * tiles_n;
  const int first_m = index / per_band * band;
  const int height = tiles_m - first_m < band ? tiles_m - first_m : band;
  const int rest = index % per_band;
  return {first_m + rest % height, rest / height};
}

/// A kernel configuration. Zero fields are free for Choose*.
struct Config {
  int tile_m = 0;    ///< tokens
  int tile_n = 0;    ///< channels
  int split_k = 0;   ///< CTAs of a cluster that share a tile
  int stages = 0;    ///< depth of the shared-memory ring; streaming kernel: of all groups' rings together
  int clusters = 0;  ///< streaming kernel: clusters of split_k CTAs
};

/// Places in the shared memory of a CTA: a ring of stages of 128 rows of K, each a tile of activations and one block
/// (with its scales) of each of `strips` strips. Tiles come first: the copy engine's swizzle wants them aligned to 1
/// KB. When the ring is empty, the sums of a split tile take its place.
struct RingMemory {
  int tile_bytes, block_stride;  ///< of one stage; of one strip and stage
  int weights, barriers, total;  ///< offsets, and the whole

  FPTQ_HD static constexpr RingMemory Of(int tokens, int strips, int stages, int block_stride) {
    RingMemory memory{};
    memory.tile_bytes = tokens * packing::kBlockK;
    memory.block_stride = block_stride;
    memory.weights = stages * memory.tile_bytes;
    memory.barriers = memory.weights + stages * strips * block_stride;
    memory.total = memory.barriers + stages * 16;
    const int sums = tokens * strips * packing::kStripN * 4;
    if (memory.total < sums) memory.total = sums;
    return memory;
  }
};

/// Depth of the ring where cp.async fills it (before sm_90, and for rows of A that are not aligned to 16 bytes).
inline constexpr int kAsyncStages = 4;

/// What planning needs to know of a device.
struct DeviceLimits {
  int multiprocessors;
  int shared_per_cta;
  int shared_per_multiprocessor;
  int clusters[9];  ///< [size]: clusters of 1, 2, 4 or 8 CTAs that run at once, one CTA on each multiprocessor
};

/// Deepest ring of at most `blocks` stages that lets `ctas` CTAs share a multiprocessor.
inline int DeepestRing(const DeviceLimits& device, int ctas, int blocks, int tokens, int strips, int block_stride) {
  constexpr int kReserved = 1024;  // that CUDA takes from each CTA
  int room = device.shared_per_multiprocessor / ctas - kReserved;
  if (room > device.shared_per_cta) room = device.shared_per_cta;
  int stages = 1;
  while (stages < blocks && RingMemory::Of(tokens, strips, stages + 1, block_stride).total <= room) ++stages;
  return stages;
}

/// Groups of four warps in a CTA of the streaming kernel, each with a strip of its own.
FPTQ_HD constexpr int StreamGroups(int tokens) { return tokens <= 16 ? 4 : 2; }

/// Blocks of a strip that a stage of the streaming kernel's ring holds: the copy engine takes few large requests better
/// than many small ones.
inline constexpr int kChunkBlocks = 2;
/// Warps that keep the rings full; group g is served by producer g % kStreamProducers.
inline constexpr int kStreamProducers = 2;

/// Shared memory of a CTA of the streaming kernel. The activations of its share of K stay for its whole life; every
/// group has a ring of its own (so that a group may run ahead of another: a barrier's parity tells one lap from the
/// next only) that carries chunks of weights; `inbox` receives the sums of the other CTAs of the cluster, twice per
/// group because a round is read while the next one arrives.
struct StreamMemory {
  int tile_bytes, chunk_bytes, inbox_bytes;     ///< of one block of K; of one stage; of one group and round
  int inbox, weights, barriers, barrier_count;  ///< offsets; activations are at 0
  int total;

  /// `blocks`: the largest share of K of a rank, in blocks.
  FPTQ_HD static constexpr StreamMemory Of(int tokens, int blocks, int stages, int block_stride) {
    StreamMemory memory{};
    memory.tile_bytes = tokens * packing::kBlockK;
    memory.chunk_bytes = kChunkBlocks * block_stride;
    memory.inbox_bytes = tokens * packing::kStripN * 4;
    memory.inbox = blocks * memory.tile_bytes;
    memory.weights = memory.inbox + 2 * StreamGroups(tokens) * memory.inbox_bytes;
    memory.barriers = memory.weights + stages * memory.chunk_bytes;
    memory.barrier_count = 2 * stages + 2 * StreamGroups(tokens) + 1;
    memory.total = memory.barriers + memory.barrier_count * 8;
    return memory;
  }
};

/// Which strips a cluster of the streaming kernel computes: `rounds` times one strip per group.
struct StreamWork {
  Range strips;

  FPTQ_HD static constexpr StreamWork Of(int strips, int cluster, int clusters) {
    return {Share(strips, cluster, clusters)};
  }
  FPTQ_HD constexpr int Rounds(int groups) const { return (strips.end - strips.begin + groups - 1) / groups; }
  /// Groups that have a strip in a round.
  FPTQ_HD constexpr int Active(int round, int groups) const {
    const int left = strips.end - strips.begin - round * groups;
    return left < groups ? left : groups;
  }
};

/// The streaming kernel for m tokens: clusters of at least two CTAs share K, strips are dealt to clusters evenly.
/// stages = 0 if the activations do not fit: then the kernel cannot run.
inline Config ChooseStream(const DeviceLimits& device, const packing::Layout& layout, int64_t m, Config config) {
  if (config.tile_m == 0) config.tile_m = m <= 8 ? 8 : m <= 16 ? 16 : m <= 32 ? 32 : 64;
  if (config.split_k == 1) config.split_k = 2;
  const int blocks = static_cast<int>(layout.k_blocks);
  const int strips = static_cast<int>(layout.strips);
  const int groups = StreamGroups(config.tile_m);
  // Two CTAs on a multiprocessor, so that the next kernel's weights arrive while this one finishes; one if need be.
  const auto stages = [&](int split) {
    int depth = 0;
    for (int ctas = 2; ctas >= 1 && depth < 2 * groups; --ctas) {
      int room = device.shared_per_multiprocessor / ctas - 1024;
      if (room > device.shared_per_cta) room = device.shared_per_cta;
      const int share = (blocks + split - 1) / split;
      depth = 0;
      while (depth < 24 && StreamMemory::Of(config.tile_m, share, depth + 1, layout.block_stride).total <= room)
        ++depth;
    }
    return depth < groups ? 0 : depth / groups * groups;
  };
  const auto per_cluster = [&](int split) { return (strips + device.clusters[split] - 1) / device.clusters[split]; };
  if (config.split_k == 0) {
    int64_t best = INT64_MAX;
    for (int split = 2; split <= 8; split *= 2) {
      if (split > 2 && blocks / split < 2) continue;
      if (stages(split) == 0) continue;
      // Clocks: the multiprocessor's share of the bandwidth, or the time of a group's own chain of blocks (measured).
      const int64_t share = (blocks + split - 1) / split;
      const int64_t per = per_cluster(split);
      const int64_t rounds = (per + groups - 1) / groups;
      const int64_t active = per < groups ? per : groups;
      const int64_t bandwidth = 220 * per * share;
      const int64_t latency = rounds * share * (250 + 80 * active + 10 * config.tile_m);
      const int64_t cost = (bandwidth > latency ? bandwidth : latency) + 800 * rounds + 100 * split;
      if (cost < best) {
        best = cost;
        config.split_k = split;
      }
    }
    if (config.split_k == 0) config.split_k = 2;
  }
  config.tile_n = packing::kStripN;
  config.clusters = (strips + per_cluster(config.split_k) - 1) / per_cluster(config.split_k);
  config.stages = config.stages == 0 ? stages(config.split_k) : (config.stages + groups - 1) / groups * groups;
  return config;
}

/// The warpgroup kernel for m tokens: the tile shape and split with the least estimated time, one CTA per
/// multiprocessor. `wide`: tiles of 256 channels are allowed.
inline Config ChooseWarpgroup(const DeviceLimits& device, const packing::Layout& layout, int64_t m, bool wide,
                              Config config) {
  struct Shape {
    int tile_m, tile_n;
    int64_t block_ns;  ///< time of 128 rows of K on an H200, measured
  };
  const Shape shapes[] = {{64, 128, 350}, {128, 128, 630}, {128, 256, 1060}};
  const int blocks = static_cast<int>(layout.k_blocks);
  const Config wanted = config;
  int64_t best = INT64_MAX;
  for (const Shape& shape : shapes) {
    if (wanted.tile_m != 0 && wanted.tile_m != shape.tile_m) continue;
    if (wanted.tile_n != 0 ? wanted.tile_n != shape.tile_n : shape.tile_n == 256 && !wide) continue;
    const int64_t tiles =
        packing::CeilDiv(m, shape.tile_m) * packing::CeilDiv(layout.strips * packing::kStripN, shape.tile_n);
    for (int split = 1; split <= 8; split *= 2) {
      if (wanted.split_k != 0 && wanted.split_k != split) continue;
      if (wanted.split_k == 0 && split > 1 && (tiles > device.clusters[split] || blocks / split < 4)) continue;
      const int64_t waves = split > 1 ? 1 : packing::CeilDiv(tiles, device.multiprocessors);
      const int64_t reduction = split > 1 ? int64_t{3000} * shape.tile_m * shape.tile_n / (64 * 128) : 0;  // measured
      const int64_t cost = waves * packing::CeilDiv(blocks, split) * shape.block_ns + reduction;
      if (cost >= best) continue;
      best = cost;
      config = {shape.tile_m, shape.tile_n, split, wanted.stages, 0};
    }
  }
  const int strips = config.tile_n / packing::kStripN;
  if (config.stages == 0 && strips > 0) {
    config.stages = DeepestRing(device, 1, 64, config.tile_m, strips, layout.block_stride);
  }
  return config;
}

}  // namespace fptq::plan

#endif  // FPTQ_TILE_PLAN_H_
