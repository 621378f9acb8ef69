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
/// The same for 2^log_parts parts. A division would take a kernel's first loads some hundred clocks.
FPTQ_HD constexpr Range ShareOfPower(int count, int part, int log_parts) {
  const int base = count >> log_parts;
  const int extra = count & ((1 << log_parts) - 1);
  const int begin = part * base + (part < extra ? part : extra);
  return {begin, begin + base + (part < extra ? 1 : 0)};
}
FPTQ_HD constexpr int LogOfPower(int power) {
  int log = 0;
  while (1 << log < power) ++log;
  return log;
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

/// How the warps of a CTA of the streaming kernel share its work.
enum class StreamForm : int32_t {
  kMany = 0,    ///< many tokens: two groups of four warps, one strip at a time
  kWide = 1,    ///< four groups, two strips at a time: warps enough for layers with many strips
  kPaired = 2,  ///< two groups, two strips at a time
  kTall = 3,    ///< two groups, four blocks of one strip at a time: for layers of few strips
  kBroad = 4,   ///< four groups, two blocks of one strip at a time: 16 tokens, layers of many strips
};
/// All of them; of equally good ones the first is chosen.
inline constexpr StreamForm kStreamForms[] = {StreamForm::kPaired, StreamForm::kTall, StreamForm::kWide,
                                              StreamForm::kBroad, StreamForm::kMany};

/// A kernel configuration. Zero fields are free for Choose*.
struct Config {
  int tile_m = 0;    ///< tokens
  int tile_n = 0;    ///< channels
  int split_k = 0;   ///< CTAs of a cluster that share a tile
  int stages = 0;    ///< depth of the shared-memory ring; streaming kernel: of all groups' rings together
  int clusters = 0;  ///< streaming kernel: clusters of split_k CTAs
  int parts = 1;     ///< streaming kernel: groups of a CTA that share its rows of K
  int inboxes = 1;   ///< streaming kernel: inboxes of a group
  StreamForm form = StreamForm::kMany;
};

/// The exchange of the sums of a tile that the CTAs of a cluster have split along K. A thread holds quads of sums (two
/// rows, two channels), the same ones in every CTA; each rank adds up and writes a contiguous share of them, and has a
/// place in its inbox for what each rank has to give.
struct SplitExchange {
  int quads, split;  ///< of a thread; CTAs

  FPTQ_HD static constexpr SplitExchange Of(int tokens, int split) { return {tokens / 8, split}; }
  /// Quads of every thread that a rank adds up, and the most of any rank.
  FPTQ_HD constexpr Range Mine(int rank) const { return Share(quads, rank, split); }
  FPTQ_HD constexpr int Most() const { return (quads + split - 1) / split; }
  /// Place in the owner's inbox of its i-th quad from a rank, the same for every thread.
  FPTQ_HD constexpr int Slot(int from_rank, int i) const { return from_rank * Most() + i; }
  FPTQ_HD constexpr int InboxBytes(int threads) const { return split > 1 ? split * Most() * threads * 16 : 0; }
};

/// Tiles of the warpgroup kernel that are not for integer-structured scales of groups of 32 or 64.
FPTQ_HD constexpr bool NeedsWholeBlocks(int tile_m, int tile_n) { return tile_m == 128 && tile_n == 192; }

/// Blocks of K in a stage of the warpgroup kernel. Two in a deep tile: its consumers have one strip, and take turns
/// along K.
FPTQ_HD constexpr int TileDepth(int tile_n) { return tile_n == packing::kStripN ? 2 : 1; }

/// Rows of activations that one request of the warpgroup kernel brings: of a whole tile, or of half of one where the
/// last tile has no more. The copy engine takes longer to fill rows that do not exist than to bring others.
FPTQ_HD constexpr int CopyRows(int tile_m, int64_t m) {
  const int64_t last = m % tile_m;
  return last > 0 && last <= tile_m / 2 ? tile_m / 2 : tile_m;
}

/// Least stages of the warpgroup kernel's ring: its consumers may hold two while they wait for another.
inline constexpr int kLeastStages = 3;

/// Places in the shared memory of a CTA: a ring of stages of `depth` times 128 rows of K, each a tile of activations
/// and one block (with its scales) of each of `strips` strips, and the inbox of a tile that is split over `split` CTAs.
/// Tiles come first: the copy engine's swizzle wants them aligned to 1 KB.
struct RingMemory {
  int tile_bytes, block_stride;         ///< of 128 rows of K; of one strip's block
  int weights, inbox, barriers, total;  ///< offsets, and the whole

  FPTQ_HD static constexpr RingMemory Of(int tokens, int strips, int stages, int block_stride, int split,
                                         int depth = 1) {
    RingMemory memory{};
    memory.tile_bytes = tokens * packing::kBlockK;
    memory.block_stride = block_stride;
    memory.weights = stages * depth * memory.tile_bytes;
    memory.inbox = memory.weights + stages * depth * strips * block_stride;
    memory.barriers = memory.inbox + SplitExchange::Of(tokens, split).InboxBytes(strips * packing::kGroupThreads);
    memory.total = memory.barriers + (2 * stages + 1) * 8;
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
  int clusters[9];   ///< [size]: clusters of 1 to 8 CTAs that run at once, one CTA on each multiprocessor
  int block_clocks;  ///< in which a multiprocessor's part of the memory bandwidth brings one block of weights
};

/// Deepest ring of at most `blocks` stages.
inline int DeepestRing(const DeviceLimits& device, int blocks, int tokens, int strips, int block_stride, int split,
                       int depth = 1) {
  int stages = 1;
  while (stages < blocks &&
         RingMemory::Of(tokens, strips, stages + 1, block_stride, split, depth).total <= device.shared_per_cta)
    ++stages;
  return stages;
}

// The streaming kernel. A cluster of `split` CTAs computes a range of strips; its CTAs share K. The groups of a CTA,
// four warps each, form teams of `parts` groups: a team computes one span of strips at a time, and its groups share the
// CTA's rows of K once more. So split * parts groups add up to one span; group (rank, part) is contributor rank * parts
// + part. Both numbers are powers of two.

/// Groups of four warps in a CTA.
FPTQ_HD constexpr int StreamGroups(StreamForm form) {
  return form == StreamForm::kWide || form == StreamForm::kBroad ? 4 : 2;
}
/// Strips of a span: with two, a warp has twice the independent work for each activation that it loads.
FPTQ_HD constexpr int StreamStrips(StreamForm form) {
  return form == StreamForm::kWide || form == StreamForm::kPaired ? 2 : 1;
}
/// Blocks of a strip that a warp multiplies at once.
FPTQ_HD constexpr int StreamBlocksAtOnce(StreamForm form) {
  return form == StreamForm::kTall ? 4 : form == StreamForm::kBroad ? 2 : 1;
}
/// Rows of K, in blocks, of a stage of a group's ring: at least two blocks of weights in all.
FPTQ_HD constexpr int StreamChunk(StreamForm form) { return form == StreamForm::kMany ? 2 : StreamBlocksAtOnce(form); }

/// Stages of a group's ring in flight while it is filled for the first time, 34 to 68 KB of all groups (measured). They
/// keep the memory busy; more would hold up the activations, which others write and read in the meantime.
FPTQ_HD constexpr int StreamWindow(StreamForm form) {
  return form == StreamForm::kTall || form == StreamForm::kBroad ? 1 : form == StreamForm::kWide ? 2 : 4;
}
/// Bytes of weights beyond its ring that a CTA asks into L2 when the ring is full. It costs more than it brings where
/// more tokens have to pass through L2 and the ring holds most of the weights anyway (measured).
FPTQ_HD constexpr int StreamPrefetch(int tokens, int64_t weight_bytes) {
  return tokens <= 16 || weight_bytes > (int64_t{64} << 20) ? 64 * 1024 : 0;
}

// Where the streaming kernel quantizes activations itself, a CTA quantizes its share of K of all tokens. Its warps
// divide a token into slices where there are fewer tokens than warps.

/// Most tokens of a product that quantizes, and most bytes of values of a CTA: they are kept in registers.
inline constexpr int kMaxQuantizedTokens = 8;
inline constexpr int kQuantizingTile = 8;  // tokens of its tile
inline constexpr int kMaxQuantizedBytes = 32768;
/// Places for the magnitudes that a CTA receives: one from each of at most 16 warps of each of at most 8 CTAs.
inline constexpr int kExchangeMagnitudes = 16 * 8;

/// Slices of a token, as a power of two.
FPTQ_HD constexpr int StreamLogSlices(StreamForm form, int tokens) {
  int log_slices = 0;
  while (tokens << (log_slices + 1) <= 4 * StreamGroups(form)) ++log_slices;
  return log_slices;
}
/// Vectors of 8 values that a thread keeps.
FPTQ_HD constexpr int StreamHeldVectors(StreamForm form, int value_bytes) {
  return kMaxQuantizedBytes / (8 * value_bytes) / (StreamGroups(form) * packing::kGroupThreads);
}
/// The vectors of a consumer thread: begin, begin + stride, ... of those of its token in the CTA's share of K.
struct StreamSlice {
  int warp, token, begin, stride;

  FPTQ_HD static constexpr StreamSlice Of(int thread, int log_slices) {
    const int warp = thread / 32;
    return {warp, warp >> log_slices, (warp & ((1 << log_slices) - 1)) * 32 + thread % 32, 32 << log_slices};
  }
  /// Where CTA `rank` of a cluster leaves the magnitude of the warp's slice; a token's places follow each other.
  FPTQ_HD constexpr int Place(int rank, int log_split) const { return (warp << log_split) + rank; }
};

/// Shared memory of a CTA. The activations of its share of K stay for its whole life; every group has a ring of its own
/// (so that a group may run ahead of another: a barrier's parity tells one lap from the next only) that carries chunks
/// of weights; its inboxes receive the sums of the contributors for the part of a span that it owns: two where there
/// are several rounds, because a round is read while the next one arrives.
struct StreamMemory {
  int tile_bytes, chunk_bytes, inbox_bytes;  ///< of one block of K; of one strip in a stage; of one inbox
  int inbox, weights, scales, exchange, barriers, barrier_count;  ///< offsets; activations are at 0
  int total;

  /// `blocks`: the largest share of K of a CTA, in blocks.
  FPTQ_HD static constexpr StreamMemory Of(int tokens, StreamForm form, int blocks, int stages, int inboxes,
                                           int block_stride) {
    StreamMemory memory{};
    memory.tile_bytes = tokens * packing::kBlockK;
    memory.chunk_bytes = StreamChunk(form) * block_stride;
    memory.inbox_bytes = tokens * StreamStrips(form) * packing::kStripN * 4;
    memory.inbox = blocks * memory.tile_bytes;
    memory.weights = memory.inbox + inboxes * StreamGroups(form) * memory.inbox_bytes;
    memory.scales = memory.weights + stages * StreamStrips(form) * memory.chunk_bytes;
    memory.exchange = memory.scales + tokens * 4;
    memory.barriers = memory.exchange + (tokens == kQuantizingTile ? kExchangeMagnitudes * 4 : 0);
    memory.barrier_count = 2 * stages + 2 * StreamGroups(form) + 2;
    memory.total = memory.barriers + memory.barrier_count * 8;
    return memory;
  }
};

/// Which strips a cluster computes: `Rounds` times one span per team.
struct StreamWork {
  Range strips;
  int per_span, log_teams;

  /// `strips`: all of the cluster.
  FPTQ_HD static constexpr StreamWork Of(StreamForm form, Range strips, int log_parts) {
    return {strips, StreamStrips(form), LogOfPower(StreamGroups(form)) - log_parts};
  }
  FPTQ_HD constexpr int Spans() const { return (strips.end - strips.begin + per_span - 1) / per_span; }
  FPTQ_HD constexpr int Rounds() const { return (Spans() + (1 << log_teams) - 1) >> log_teams; }
  /// Strips of a team in a round; the range is empty where the team has nothing left to do.
  FPTQ_HD constexpr Range Strips(int round, int team) const {
    const int begin = strips.begin + ((round << log_teams) + team) * per_span;
    const int end = begin + per_span < strips.end ? begin + per_span : strips.end;
    return {begin, begin < end ? end : begin};
  }
};

/// Rows of K, in blocks, of one group.
FPTQ_HD constexpr Range StreamBlocks(int k_blocks, int rank, int log_split, int part, int log_parts) {
  const Range cta = ShareOfPower(k_blocks, rank, log_split);
  const Range in_cta = ShareOfPower(cta.end - cta.begin, part, log_parts);
  return {cta.begin + in_cta.begin, cta.begin + in_cta.end};
}

/// What the forms of the streaming kernel depend on.
struct StreamScales {
  bool plain;     ///< int4 weights, and one scale or multiplier per channel and block
  bool is_float;  ///< plain, and float scales
};

/// Whether the streaming kernel has a form for a tile of tokens: no form without use, because each takes a compiler
/// seconds.
constexpr bool HasStreamForm(StreamForm form, int tokens, StreamScales scales) {
  switch (form) {
    case StreamForm::kMany:
      return tokens > 16;
    case StreamForm::kWide:
      return tokens <= 16;
    case StreamForm::kPaired:
      return tokens <= 16 && scales.plain;
    case StreamForm::kTall:
      return tokens <= 16 && scales.plain;
    case StreamForm::kBroad:
      return tokens == 16 && scales.plain;
  }
  return false;
}

/// Whether it has a form that quantizes up to kMaxQuantizedTokens.
constexpr bool HasQuantizingForm(StreamForm form, StreamScales scales) {
  return HasStreamForm(form, kQuantizingTile, scales);
}

/// The streaming kernel for m tokens: clusters of at least two CTAs share K, strips are dealt to clusters evenly.
/// stages = 0 if the activations do not fit: then the kernel cannot run.
inline Config ChooseStream(const DeviceLimits& device, const packing::Layout& layout, StreamScales scales, int64_t m,
                           Config config) {
  if (config.tile_m == 0) config.tile_m = m <= 8 ? 8 : m <= 16 ? 16 : m <= 32 ? 32 : 64;
  if (config.split_k == 1) config.split_k = 2;
  const int tokens = config.tile_m;
  const int blocks = static_cast<int>(layout.k_blocks);
  const int strips = static_cast<int>(layout.strips);
  const Config wanted = config;
  config.stages = 0;
  int64_t best = INT64_MAX;
  for (const StreamForm form : kStreamForms) {
    if (!HasStreamForm(form, tokens, scales)) continue;
    if (wanted.form != StreamForm::kMany && wanted.form != form && HasStreamForm(wanted.form, tokens, scales)) {
      continue;
    }
    const int groups = StreamGroups(form);
    const int room = groups == 2 && tokens <= 16 ? 4096 : 0;  // for a small kernel beside this one
    for (int split = 2; split <= 8; split *= 2) {
      if (wanted.split_k != 0 ? split != wanted.split_k : split > 2 && blocks / split < 2) continue;
      if (form == StreamForm::kBroad && split > 2 && wanted.split_k == 0) continue;  // not measured
      const int share = (blocks + split - 1) / split;
      const int per_cluster = (strips + device.clusters[split] - 1) / device.clusters[split];
      const int spans = (per_cluster + StreamStrips(form) - 1) / StreamStrips(form);
      int parts = spans == 1 ? groups : spans == 2 ? groups / 2 : 1;
      while (parts > 1 && share < parts) parts /= 2;
      const int rounds = (spans * parts + groups - 1) / groups;
      const int inboxes = rounds > 1 ? 2 : 1;
      // Stages of all rings, no more than there are chunks: initialising their barriers takes time.
      const int chunks =
          rounds * static_cast<int>(packing::CeilDiv(packing::CeilDiv(share, parts), StreamChunk(form))) * groups;
      const int most = chunks < 40 ? chunks : 40;
      int depth = 0;
      while (depth < most &&
             StreamMemory::Of(tokens, form, share, depth + groups, inboxes, layout.block_stride).total <=
                 device.shared_per_cta - room)
        depth += groups;
      if (depth == 0) continue;
      // Clocks, fitted to measurements of all forms, with weights in device memory (H100 and H200) and in L2, as if
      // memory were twice as fast. A round takes its part of the device's bandwidth, or a group's own chain of blocks.
      const int64_t bandwidth = int64_t{device.block_clocks} * strips * blocks / device.multiprocessors;
      const bool integers = !scales.is_float;  // they take more instructions
      const bool many = tokens > 8;
      int64_t at_once = 1500 + (integers && many ? 400 : 0);
      if (form == StreamForm::kTall) at_once = 1930 + (many ? 150 : 0) + (integers ? 400 : 0);
      if (form == StreamForm::kPaired) at_once = 950 + (many ? 60 : 0) + (integers ? 180 : 0);
      const int64_t chain = packing::CeilDiv(packing::CeilDiv(share, parts), StreamBlocksAtOnce(form)) * at_once;
      const int teams = groups / parts;
      int64_t cost = 0;
      for (int round = 0; round < rounds; ++round) {
        const int in_round = spans - round * teams < teams ? spans - round * teams : teams;
        const int64_t arrival = bandwidth * in_round / spans;
        cost += arrival > chain ? arrival : chain;
      }
      cost += int64_t{6} * share * tokens;         // loading the activations
      cost += int64_t{10} * per_cluster * tokens;  // exchanging the sums
      cost += int64_t{form == StreamForm::kTall ? 1350 : form == StreamForm::kPaired ? 2150 : 120} * (rounds - 1);
      cost += split == 2 ? 0 : split == 4 ? 2800 : 1000;  // larger clusters
      // The quantization of the activations finds no room beside a kernel with this many threads.
      if (form == StreamForm::kWide) cost += 3150 + (many ? 1500 : 0);
      if (form == StreamForm::kBroad) cost += 1000 + (parts > 1 ? 1000 : 0);
      if (form == StreamForm::kTall) cost -= 420;  // the better one where memory decides
      if (per_cluster < StreamStrips(form)) cost += 20000;
      if (cost >= best) continue;
      best = cost;
      config = {tokens,
                StreamStrips(form) * packing::kStripN,
                split,
                wanted.stages == 0 ? depth : (wanted.stages + groups - 1) / groups * groups,
                (strips + per_cluster - 1) / per_cluster,
                parts,
                inboxes,
                form};
    }
  }
  return config;
}

/// Whether the streaming kernel with this plan quantizes m tokens itself. Every cluster repeats that for all of them,
/// so it costs more with more tokens and blocks in a CTA, where a kernel in front costs the same (measured).
inline bool StreamQuantizes(const Config& config, const packing::Layout& layout, StreamScales scales, int64_t m,
                            int value_bytes) {
  if (!HasQuantizingForm(config.form, scales) || m > kMaxQuantizedTokens || layout.k_blocks < 16) return false;
  const int64_t share = packing::CeilDiv(layout.k_blocks, config.split_k);
  if (config.form == StreamForm::kTall && m * share > 32 + layout.k_blocks) return false;
  const int64_t places = int64_t{StreamHeldVectors(config.form, value_bytes)} * 32
                         << StreamLogSlices(config.form, static_cast<int>(m));
  return share * packing::kBlockK / 8 <= places;
}

/// The warpgroup kernel for m tokens: the tile shape and split with the least estimated time, one CTA per
/// multiprocessor. stages = 0 if it has no such tile and split for these weights, which only a wanted one can be.
inline Config ChooseWarpgroup(const DeviceLimits& device, const packing::Layout& layout, int64_t m,
                              packing::Encoding encoding, Config config) {
  struct Shape {
    int tile_m, tile_n;
    int64_t float_ns, integer_ns;  ///< time of a stage, 128 rows of K or 256; 0: the kernel has no such tile
    int64_t end_ns;                ///< from the last sums to the next tile
  };
  // Measured on an H100, from one and several tiles per multiprocessor.
  const Shape shapes[] = {{64, 64, 315, 300, 750},    {64, 128, 312, 300, 700}, {64, 192, 434, 445, 800},
                          {128, 128, 500, 380, 1200}, {128, 192, 0, 545, 1300}, {128, 256, 905, 700, 1500}};
  constexpr int64_t kExchangeNs = 50;  // for a KB of sums that a CTA sends to the others of its cluster
  constexpr int64_t kSplitNs = 600;    // for waiting for them
  constexpr int64_t kManyNs = 700;     // in clusters of more than four
  const int blocks = static_cast<int>(layout.k_blocks);
  const bool is_float = encoding == packing::Encoding::kFloat;
  const Config wanted = config;
  int64_t best = INT64_MAX;
  for (const Shape& shape : shapes) {
    const int64_t stage_ns = is_float ? shape.float_ns : shape.integer_ns;
    // Float scales of groups of 32 or 64 are applied one at a time; that and int8 weights have no larger tiles.
    const bool in_steps = layout.promotion_k != packing::kBlockK;
    const bool small = encoding == packing::Encoding::kInt8 || (is_float && in_steps);
    if (stage_ns == 0 || (small && shape.tile_n != 128)) continue;
    if (in_steps && NeedsWholeBlocks(shape.tile_m, shape.tile_n)) continue;
    if (wanted.tile_m != 0 && wanted.tile_m != shape.tile_m) continue;
    if (wanted.tile_n != 0 && wanted.tile_n != shape.tile_n) continue;
    const int depth = TileDepth(shape.tile_n);
    const bool is_deep = depth > 1;
    // Deep tiles come in pairs of one row of tiles.
    const int64_t tiles = packing::CeilDiv(m, shape.tile_m) *
                          packing::CeilDiv(layout.strips * packing::kStripN, shape.tile_n * depth) * depth;
    for (int split = 1; split <= 8; ++split) {
      if (split > blocks || (wanted.split_k != 0 && wanted.split_k != split)) continue;
      // The kernel splits tiles of one strip per warpgroup only.
      if (split > 1 && (shape.tile_n == 256 || is_deep)) continue;
      if (wanted.split_k == 0 && split > 1 && (tiles > device.clusters[split] || blocks / split < 4)) continue;
      if (is_deep && (blocks % 2 != 0 || tiles / 2 > device.clusters[2])) continue;
      if (is_deep && wanted.tile_n == 0 && m > shape.tile_m) continue;  // no faster with several rows of tiles
      const int64_t waves = split > 1 ? 1 : packing::CeilDiv(tiles, device.multiprocessors);
      const int64_t sent = int64_t{shape.tile_m} * shape.tile_n / 256 * (split - 1) / split;
      const int64_t cost = waves * (packing::CeilDiv(blocks, split * depth) * stage_ns + shape.end_ns) +
                           sent * kExchangeNs + (split > 1 ? kSplitNs : 0) + (split > 4 ? kManyNs : 0);
      if (cost >= best) continue;
      best = cost;
      config = {shape.tile_m, shape.tile_n, split, wanted.stages, 0};
    }
  }
  if (best == INT64_MAX) {
    config.stages = 0;
    return config;
  }
  const int strips = config.tile_n / packing::kStripN;
  if (config.stages == 0) {
    config.stages =
        DeepestRing(device, 64, config.tile_m, strips, layout.block_stride, config.split_k, TileDepth(config.tile_n));
  }
  if (config.stages < kLeastStages) config.stages = kLeastStages;
  return config;
}

}  // namespace fptq::plan

#endif  // FPTQ_TILE_PLAN_H_
