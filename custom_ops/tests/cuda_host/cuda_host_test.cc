// The CUDA kernels' index and bit maths, walked on the CPU: emulated warps and warpgroups compute real products from
// packed bytes and must reproduce the int64 reference bit by bit.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "fptq/integer_scales.h"
#include "fptq/packing.h"
#include "fptq/quantization.h"
#include "fptq/tile_plan.h"

namespace {

using namespace fptq;           // NOLINT: a test of exactly these
using namespace fptq::packing;  // NOLINT

int failures = 0;

#define EXPECT(condition, ...)                                           \
  do {                                                                   \
    if (!(condition)) {                                                  \
      ++failures;                                                        \
      std::printf("%s:%d: %s failed: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                          \
      std::printf("\n");                                                 \
    }                                                                    \
  } while (false)

int8_t Byte(uint32_t word, int i) { return static_cast<int8_t>(word >> (8 * i) & 0xFF); }

/// A random weight with its packed form, as the packing kernels write it.
struct Problem {
  Layout layout;
  Encoding encoding;
  std::vector<uint8_t> b;        // int4 [k, n]
  std::vector<int8_t> multiple;  // [groups, n], integer encoding
  std::vector<uint32_t> blocks;
  std::vector<IntegerScale> scales;  // [strips][k_blocks][rows per block][64]

  int Q(int64_t k, int64_t n) const { return ReadInt4(b.data(), k * layout.n + n); }
  int Multiple(int64_t row, int64_t n) const { return multiple[static_cast<size_t>(row * layout.n + n)]; }

  Problem(int64_t k, int64_t n, int64_t block_size, Encoding encoding_in, std::mt19937* random)
      : layout(Layout::Of(k, n, block_size, 2)), encoding(encoding_in), b(static_cast<size_t>((k * n + 1) / 2)) {
    for (uint8_t& byte : b) byte = static_cast<uint8_t>((*random)());
    const int64_t groups = CeilDiv(k, block_size);
    multiple.resize(static_cast<size_t>(groups * n));
    for (int8_t& i : multiple) i = static_cast<int8_t>(static_cast<int>((*random)() % 31) - 15);
    for (int64_t block = 0; block < layout.strips * layout.k_blocks; ++block) {
      for (int word = 0; word < kWordsPerBlock; ++word) {
        blocks.push_back(PackWord(layout, encoding, b.data(), block / layout.k_blocks, block % layout.k_blocks, word));
      }
    }
    for (int64_t block = 0; block < layout.strips * layout.k_blocks; ++block) {
      for (int i = 0; i < layout.RowsPerBlock() * kStripN; ++i) {
        const int64_t column = block / layout.k_blocks * kStripN + i % kStripN;
        const int64_t group = layout.GroupOf(block % layout.k_blocks, i / kStripN);
        scales.push_back(IntegerScale::Of(column < n && group < groups ? Multiple(group, column) : 0));
      }
    }
  }
};

/// Two IntegerScale of neighbouring channels as kernels load them.
uint32_t ScalePair(IntegerScale even, IntegerScale odd) {
  return static_cast<uint8_t>(even.multiplier) | static_cast<uint32_t>(even.offset) << 8 |
         static_cast<uint32_t>(static_cast<uint8_t>(odd.multiplier)) << 16 | static_cast<uint32_t>(odd.offset) << 24;
}

/// The integer-structured scales of a thread's two channels for one step.
uint32_t LoadScales(const Problem& p, int64_t strip, int k_block, int step, int thread) {
  const int64_t row = (strip * p.layout.k_blocks + k_block) * p.layout.RowsPerBlock() + p.layout.ScaleRowOfStep(step);
  const size_t at = static_cast<size_t>(row * kStripN + ThreadChannel(thread));
  return ScalePair(p.scales[at], p.scales[at + 1]);
}

/// What a kernel makes of the weights before it multiplies them.
enum class Unpacking {
  kFloat,     ///< 16 q; float scales are multiplied in per group
  kDigits,    ///< 16 q from digits; integer multipliers are multiplied in per group (few tokens)
  kMultiple,  ///< q * i (many tokens)
};

/// The fragment of one thread and step, unpacked from the bytes that it loads.
Fragment LoadFragment(const Problem& p, Unpacking unpacking, int64_t strip, int k_block, int step, int thread) {
  const int64_t block = strip * p.layout.k_blocks + k_block;
  const size_t first =
      static_cast<size_t>(block * kWordsPerBlock + step / 2 * (kHalfBytes / 4) + thread * 4 + step % 2 * 2);
  const uint32_t even = p.blocks[first];
  const uint32_t odd = p.blocks[first + 1];
  if (unpacking == Unpacking::kFloat) return UnpackFloat(even, odd);
  if (unpacking == Unpacking::kDigits) return UnpackDigits(even, odd);
  return UnpackInteger(even, odd, Spread(LoadScales(p, strip, k_block, step, thread)));
}

/// One tensor-core step of a 128-thread group: the documented A fragment of mma.m16n8k32 and wgmma.m64nNk32 (thread
/// t of warp w holds rows 16w + t/4 and + 8, bytes 4(t%4).. and + 16 of K). Adds to sums [64 channels].
void AddStep(const Problem& p, Unpacking unpacking, int64_t strip, int k_block, int step, const uint8_t* activations,
             std::vector<int32_t>* sums) {
  for (int thread = 0; thread < kGroupThreads; ++thread) {
    const Fragment fragment = LoadFragment(p, unpacking, strip, k_block, step, thread);
    for (int r = 0; r < 4; ++r) {
      const int channel = ThreadChannel(thread) + r % 2;  // a0, a2: row; a1, a3: row + 8
      const int first_k = step * kStepK + thread % 4 * 4 + r / 2 * 16;
      for (int i = 0; i < 4; ++i) {
        const int64_t k = int64_t{k_block} * kBlockK + first_k + i;
        // What the copy engine brings for rows of K beyond the last is arbitrary: the weights there must be zero.
        const int a = k < p.layout.k ? activations[k] : 0xA5;
        (*sums)[static_cast<size_t>(channel)] += a * Byte(fragment.a[r], i);
      }
    }
  }
}

void TestFragmentMap() {
  std::set<int> seen;
  for (int word = 0; word < kWordsPerBlock; ++word) {
    const WordOrigin origin = OriginOfWord(word);
    for (int nibble = 0; nibble < 8; ++nibble) {
      const int k = (nibble % 2 == 0 ? origin.low_k : origin.high_k) + nibble / 2;
      EXPECT(origin.channel >= 0 && origin.channel < kStripN && k >= 0 && k < kBlockK, "word %d", word);
      seen.insert(origin.channel * kBlockK + k);
      const NibblePlace place = PlaceOfValue(origin.channel, k);
      EXPECT(place.word == word && place.shift == 4 * nibble, "word %d nibble %d", word, nibble);
    }
  }
  EXPECT(seen.size() == kStripN * kBlockK, "values are placed %zu times", seen.size());
}

void TestUnpacking() {
  for (int i = -kMaxScaleMultiple; i <= kMaxScaleMultiple; ++i) {
    const IntegerScale scale = IntegerScale::Of(i);
    const IntegerScale negated = IntegerScale::Of(-i);
    const SpreadScales spread = Spread(ScalePair(scale, negated));
    EXPECT(Multiplier(ScalePair(scale, negated)) == i && Multiplier(ScalePair(negated, scale) >> 16) == i, "i %d", i);
    for (int q = -8; q <= 7; ++q) {
      for (int other = -8; other <= 7; ++other) {  // neighbours in the word must not disturb each other
        uint32_t word = 0;
        for (int nibble = 0; nibble < 8; ++nibble) {
          word |= static_cast<uint32_t>((nibble % 3 == 0 ? q : other) + kDigitOffset) << (4 * nibble);
        }
        const Fragment fragment = UnpackInteger(word, word, spread);
        for (int nibble = 0; nibble < 8; ++nibble) {
          const int expected = (nibble % 3 == 0 ? q : other) * i;
          const int8_t value = Byte(fragment.a[nibble % 2 * 2], nibble / 2);
          const int8_t neighbour = Byte(fragment.a[1 + nibble % 2 * 2], nibble / 2);
          EXPECT(value == expected && neighbour == -expected, "q %d i %d: %d, %d", q, i, value, neighbour);
        }
      }
    }
  }
  for (uint32_t word : {0x01234567u, 0x89ABCDEFu, 0xFFFFFFFFu, 0x80808080u, 0x77777777u}) {
    const Fragment digits = UnpackDigits(word, ~word);
    for (int nibble = 0; nibble < 8; ++nibble) {
      const int digit = static_cast<int>(word >> (4 * nibble) & 0xF);
      EXPECT(Byte(digits.a[nibble % 2 * 2], nibble / 2) == 16 * (digit - 8), "digit %d of %x", nibble, word);
      EXPECT(Byte(digits.a[1 + nibble % 2 * 2], nibble / 2) == 16 * (7 - digit), "digit %d of ~%x", nibble, word);
    }
    const Fragment fragment = UnpackFloat(word, ~word);
    for (int nibble = 0; nibble < 8; ++nibble) {
      const int q = static_cast<int>((word >> (4 * nibble) & 0xF) ^ 8) - 8;
      EXPECT(Byte(fragment.a[nibble % 2 * 2], nibble / 2) == 16 * q, "nibble %d of %x", nibble, word);
      EXPECT(Byte(fragment.a[1 + nibble % 2 * 2], nibble / 2) == 16 * (-1 - q), "nibble %d of ~%x", nibble, word);
    }
  }
}

/// Both encodings, every kind of edge, against int64.
void TestProducts() {
  std::mt19937 random(7);
  struct Shape {
    int64_t k, n, block_size;
  };
  for (const Shape shape : {Shape{128, 64, 128}, Shape{256, 65, 128}, Shape{300, 130, 32}, Shape{100, 7, 100},
                            Shape{129, 1, 64}, Shape{640, 63, 256}, Shape{16, 200, 16}, Shape{1000, 33, 1000}}) {
    for (const Encoding encoding : {Encoding::kFloat, Encoding::kInteger}) {
      const Problem p(shape.k, shape.n, shape.block_size, encoding, &random);
      const Layout& layout = p.layout;
      EXPECT(layout.promotion_k != 0, "block size %lld", static_cast<long long>(shape.block_size));
      std::vector<uint8_t> a(static_cast<size_t>(shape.k));
      for (uint8_t& x : a) x = static_cast<uint8_t>(random());
      const int zero_point = static_cast<int>(random() % 256);
      for (int64_t strip = 0; strip < layout.strips; ++strip) {
        std::vector<int32_t> whole(kStripN, 0);   // of products with q * i
        std::vector<int32_t> digits(kStripN, 0);  // of products with q, times i per group of rows
        for (int block = 0; block < layout.k_blocks; ++block) {
          std::vector<int32_t> group(kStripN, 0);
          int first_step = 0;
          for (int step = 0; step < kStepsPerBlock; ++step) {
            const bool is_integer = encoding == Encoding::kInteger;
            if (is_integer) AddStep(p, Unpacking::kMultiple, strip, block, step, a.data(), &whole);
            AddStep(p, is_integer ? Unpacking::kDigits : Unpacking::kFloat, strip, block, step, a.data(), &group);
            if (!layout.PromotesAfterStep(step)) continue;
            // One promotion: 16 * sum of a * q over rows of one group of scales.
            const int64_t begin = int64_t{block} * kBlockK + first_step * kStepK;
            const int64_t end = std::min(shape.k, int64_t{block} * kBlockK + (step + 1) * kStepK);
            const int64_t row = layout.GroupOf(block, layout.ScaleRowOfStep(step));
            for (int c = 0; c < kStripN; ++c) {
              const int64_t n = strip * kStripN + c;
              int64_t expected = 0;
              for (int64_t k = begin; n < shape.n && k < end; ++k) {
                expected += int64_t{16} * a[static_cast<size_t>(k)] * p.Q(k, n);
                EXPECT(k / shape.block_size == row, "row %lld of scales for k %lld", static_cast<long long>(row),
                       static_cast<long long>(k));
              }
              EXPECT(group[static_cast<size_t>(c)] == expected, "k %lld n %lld strip %lld block %d step %d channel %d",
                     static_cast<long long>(shape.k), static_cast<long long>(shape.n), static_cast<long long>(strip),
                     block, step, c);
            }
            for (int thread = 0; is_integer && thread < kGroupThreads;
                 thread += 4) {  // one of four with these channels
              const uint32_t scales = LoadScales(p, strip, block, step, thread);
              for (int odd = 0; odd < 2; ++odd) {
                const size_t c = static_cast<size_t>(ThreadChannel(thread) + odd);
                digits[c] += (group[c] >> kDigitShift) * Multiplier(scales >> (16 * odd));
              }
            }
            std::fill(group.begin(), group.end(), 0);
            first_step = step + 1;
          }
        }
        if (encoding != Encoding::kInteger) continue;
        for (int c = 0; c < kStripN && strip * kStripN + c < shape.n; ++c) {
          const int64_t n = strip * kStripN + c;
          int64_t expected = 0;
          int64_t column_sum = 0;
          for (int64_t k = 0; k < shape.k; ++k) {
            const int64_t weight = p.Q(k, n) * p.Multiple(k / shape.block_size, n);
            expected += (a[static_cast<size_t>(k)] - zero_point) * weight;
            column_sum += weight;
          }
          const float y = DequantizeInteger(whole[static_cast<size_t>(c)], static_cast<int32_t>(column_sum), 1.0f,
                                            zero_point, 1.0f);
          EXPECT(digits[static_cast<size_t>(c)] == whole[static_cast<size_t>(c)], "multiplied per group: channel %d",
                 c);
          EXPECT(y == static_cast<float>(expected), "integer k %lld n %lld channel %d: %f",
                 static_cast<long long>(shape.k), static_cast<long long>(n), c, static_cast<double>(y));
        }
      }
    }
  }
  // The factor 16 and the zero point of the float encoding: exact where the sums are.
  EXPECT(DequantizeFloat(16.0f * 1000, 7.0f, 120, 0.5f) == 0.5f * (1000 - 120 * 7), "zero point");
  // A sum that wraps is made right by the correction that wraps.
  EXPECT(DequantizeInteger(INT32_MIN + 5, -1, 1.0f, 100, 1.0f) ==
             static_cast<float>(static_cast<int64_t>(INT32_MIN) + 105),
         "wrap");
}

void TestLayout() {
  EXPECT(PromotionK(4096, 128) == 128 && PromotionK(4096, 256) == 128 && PromotionK(4096, 4096) == 128, "whole blocks");
  EXPECT(PromotionK(100, 100) == 128 && PromotionK(48, 64) == 128, "one group");
  EXPECT(PromotionK(4096, 32) == 32 && PromotionK(4096, 64) == 64, "parts of a block");
  EXPECT(PromotionK(4096, 16) == 0 && PromotionK(4096, 96) == 0 && PromotionK(4096, 200) == 0, "reference kernel only");
  for (int64_t k : {1, 31, 32, 127, 128, 129, 4096, 14336}) {
    for (int64_t block_size : {int64_t{32}, int64_t{64}, int64_t{128}, int64_t{256}, int64_t{384}, k}) {
      const Layout layout = Layout::Of(k, 65, block_size, 4);
      const int rows = layout.promotion_k == 0 ? 0 : 128 / layout.promotion_k;
      EXPECT(layout.block_stride == kBlockBytes + rows * 64 * 4 && layout.block_stride % 128 == 0, "stride");
      EXPECT(layout.strips == 2 && layout.WeightBytes() == 2 * layout.k_blocks * layout.block_stride, "sizes");
      EXPECT(layout.BlockOffset(1, layout.k_blocks - 1) + layout.block_stride == layout.WeightBytes(), "last block");
    }
  }
  // Eight rows x 8 chunks of a swizzled tile: each 16-byte place once, and each column of chunks in eight bank groups.
  for (int chunk = 0; chunk < 8; ++chunk) {
    std::set<int> banks;
    for (int row = 0; row < 8; ++row) banks.insert(SwizzledOffset(row, chunk) / 16 % 8);
    EXPECT(banks.size() == 8, "chunk %d", chunk);
  }
}

void TestTileOrder() {
  for (int tiles_m : {1, 2, 11, 12, 13, 40}) {
    for (int tiles_n : {1, 3, 56}) {
      std::set<std::pair<int, int>> seen;
      for (int i = 0; i < tiles_m * tiles_n; ++i) {
        const plan::Tile tile = plan::TileAt(i, tiles_m, tiles_n, 12);
        EXPECT(tile.m >= 0 && tile.m < tiles_m && tile.n >= 0 && tile.n < tiles_n, "%d of %d x %d", i, tiles_m,
               tiles_n);
        seen.insert({tile.m, tile.n});
      }
      EXPECT(seen.size() == static_cast<size_t>(tiles_m * tiles_n), "%d x %d", tiles_m, tiles_n);
    }
  }
  for (int count : {0, 1, 5, 32, 112}) {
    for (int parts : {1, 2, 3, 4, 8}) {
      int next = 0;
      for (int part = 0; part < parts; ++part) {
        const plan::Range range = plan::Share(count, part, parts);
        EXPECT(range.begin == next && range.end >= range.begin, "%d / %d", count, parts);
        EXPECT(range.end - range.begin <= CeilDiv(count, parts), "%d / %d", count, parts);
        next = range.end;
      }
      EXPECT(next == count, "%d / %d", count, parts);
    }
  }
}

/// Walks the streaming kernel's schedule: every block of every strip once, by one group of one CTA.
void CheckStreamSchedule(const Layout& layout, const plan::Config& config) {
  const int blocks = static_cast<int>(layout.k_blocks);
  const int strips = static_cast<int>(layout.strips);
  const int log_split = plan::LogOfPower(config.split_k);
  const int log_parts = plan::LogOfPower(config.parts);
  std::vector<int> visits(static_cast<size_t>(strips * blocks), 0);
  for (int cluster = 0; cluster < config.clusters; ++cluster) {
    const plan::StreamWork work =
        plan::StreamWork::Of(config.form, plan::Share(strips, cluster, config.clusters), log_parts);
    EXPECT(work.Rounds() <= 1 || config.inboxes == 2, "%d rounds, %d inboxes", work.Rounds(), config.inboxes);
    for (int rank = 0; rank < config.split_k; ++rank) {
      const plan::Range cta = plan::ShareOfPower(blocks, rank, log_split);
      for (int group = 0; group < plan::StreamGroups(config.form); ++group) {
        const plan::Range mine = plan::StreamBlocks(blocks, rank, log_split, group % config.parts, log_parts);
        EXPECT(mine.begin >= cta.begin && mine.end <= cta.end, "group %d leaves the K of its CTA", group);
        for (int round = 0; round < work.Rounds(); ++round) {
          const plan::Range span = work.Strips(round, group / config.parts);
          EXPECT(span.end - span.begin <= plan::StreamStrips(config.form), "span of %d strips", span.end - span.begin);
          for (int strip = span.begin; strip < span.end; ++strip) {
            for (int block = mine.begin; block < mine.end; ++block)
              ++visits[static_cast<size_t>(strip * blocks + block)];
          }
        }
        EXPECT(work.Strips(work.Rounds(), group / config.parts).begin >= work.strips.end, "group %d has work left",
               group);
      }
    }
  }
  EXPECT(std::all_of(visits.begin(), visits.end(), [](int v) { return v == 1; }), "%d strips, %d blocks", strips,
         blocks);
}

/// The exchange of sums gives each pair of channels of a span one owner and each inbox slot one writer.
void CheckStreamExchange(int tokens, plan::StreamForm form, int split, int parts) {
  const int strip_pairs = tokens * kStripN / 2;
  const int pairs = plan::StreamStrips(form) * strip_pairs;
  const int contributors = split * parts;
  const int log_share = plan::LogOfPower(pairs) - plan::LogOfPower(contributors);
  const int share = 1 << log_share;
  EXPECT(share * contributors == pairs, "%d pairs, %d contributors", pairs, contributors);
  std::set<std::tuple<int, int, int>> outputs;
  for (int owner = 0; owner < contributors; ++owner) {
    std::vector<int> writers(static_cast<size_t>(pairs), 0);
    for (int source = 0; source < contributors; ++source) {
      for (int pair = 0; pair < pairs; ++pair) {
        if (pair >> log_share == owner) ++writers[static_cast<size_t>((source << log_share) + (pair & (share - 1)))];
      }
    }
    EXPECT(std::all_of(writers.begin(), writers.end(), [](int w) { return w == 1; }), "inbox of %d", owner);
    const int mine = owner << log_share;
    const int strip = mine / strip_pairs;
    for (int thread = 0; thread < kGroupThreads && thread < share; ++thread) {
      for (int i = thread; i < share; i += kGroupThreads) {  // as the kernel finishes its part
        const int pair = mine + i;
        const int channel = ThreadChannel((mine + thread) % kGroupThreads);
        EXPECT(pair / strip_pairs == strip, "an owner has parts of two strips");
        EXPECT(channel == ThreadChannel(pair % kGroupThreads), "channel of pair %d", pair);
        const int q = pair % strip_pairs / kGroupThreads;
        outputs.insert({strip, channel, q / 2 * 8 + pair % 4 * 2 + q % 2});
      }
    }
  }
  EXPECT(outputs.size() == static_cast<size_t>(pairs), "%d tokens, split %d, %d parts", tokens, split, parts);
}

/// Where the streaming kernel quantizes: every vector of every token belongs to one thread, which can keep it, and
/// every warp of every CTA has a place of its own for the magnitude it finds.
void CheckStreamQuantization(const Layout& layout, const plan::Config& config, int tokens, int value_bytes) {
  const int threads = plan::StreamGroups(config.form) * kGroupThreads;
  const int log_slices = plan::StreamLogSlices(config.form, tokens);
  const int log_split = plan::LogOfPower(config.split_k);
  const int share = static_cast<int>(CeilDiv(layout.k_blocks, config.split_k));
  const int vectors = share * kBlockK / 8;
  const int held = plan::StreamHeldVectors(config.form, value_bytes);
  const auto memory =
      plan::StreamMemory::Of(config.tile_m, config.form, share, config.stages, config.inboxes, layout.block_stride);
  std::vector<int> visits(static_cast<size_t>(tokens * vectors), 0);
  std::set<int> places;
  for (int thread = 0; thread < threads; ++thread) {
    const auto slice = plan::StreamSlice::Of(thread, log_slices);
    if (slice.token >= tokens) continue;
    for (int j = 0; j < held; ++j) {
      const int at = slice.begin + j * slice.stride;
      if (at < vectors) ++visits[static_cast<size_t>(slice.token * vectors + at)];
    }
    if (thread % 32 != 0) continue;
    for (int rank = 0; rank < config.split_k; ++rank) {
      const int place = slice.Place(rank, log_split);
      EXPECT(place >> (log_slices + log_split) == slice.token, "place %d of token %d", place, slice.token);
      EXPECT(memory.exchange + (place + 1) * 4 <= memory.barriers, "place %d is beyond the exchange", place);
      EXPECT(places.insert(place).second, "two warps write place %d", place);
    }
  }
  EXPECT(places.size() == static_cast<size_t>(tokens) << (log_slices + log_split), "%d places are waited for, not %d",
         tokens << (log_slices + log_split), static_cast<int>(places.size()));
  EXPECT(std::all_of(visits.begin(), visits.end(), [](int v) { return v == 1; }), "%d tokens, %d vectors, %d held",
         tokens, vectors, held);
}

void TestStreamPlan() {
  int quantizing = 0;
  const plan::DeviceLimits h200{132, 227 * 1024, 228 * 1024, {0, 132, 66, 0, 30, 0, 0, 0, 14}, 224};
  for (int64_t k : {16, 128, 400, 576, 1536, 4096, 14336, 28672}) {
    for (int64_t n : {1, 64, 200, 960, 4096, 6144, 14336, 28672}) {
      for (int64_t m : {1, 8, 9, 16, 17, 32, 33, 64}) {
        for (const int64_t block_size : {int64_t{32}, int64_t{128}}) {
          const Layout layout = Layout::Of(k, n, std::min(k, block_size), 4);
          if (layout.promotion_k == 0) continue;
          for (int choice = 0; choice < 16; ++choice) {
            plan::Config wanted;
            wanted.split_k = choice % 4 == 0 ? 0 : 1 << choice % 4;
            wanted.form = plan::kStreamForms[choice / 4];
            const plan::StreamScales scales = {layout.promotion_k == kBlockK,
                                               layout.promotion_k == kBlockK && k % 3 != 0};
            const plan::Config config = plan::ChooseStream(h200, layout, scales, m, wanted);
            if (config.stages == 0) continue;  // the activations do not fit: another kernel runs
            EXPECT(plan::HasStreamForm(config.form, config.tile_m, scales), "form");
            EXPECT(wanted.form == config.form || !plan::HasStreamForm(wanted.form, config.tile_m, scales), "form");
            const int groups = plan::StreamGroups(config.form);
            const int blocks = static_cast<int>(layout.k_blocks);
            const auto memory =
                plan::StreamMemory::Of(config.tile_m, config.form, static_cast<int>(CeilDiv(blocks, config.split_k)),
                                       config.stages, config.inboxes, layout.block_stride);
            EXPECT(memory.total <= h200.shared_per_cta, "%d bytes", memory.total);
            EXPECT(config.stages % groups == 0 && config.stages >= groups, "%d stages", config.stages);
            EXPECT(memory.inbox % 1024 == 0 && memory.weights % 128 == 0 && memory.barriers % 8 == 0, "alignment");
            EXPECT(config.split_k >= 2 && config.split_k <= 8 && config.tile_m >= std::min<int64_t>(m, 64), "plan");
            EXPECT(config.parts >= 1 && groups % config.parts == 0, "%d parts of %d groups", config.parts, groups);
            EXPECT(config.clusters <= h200.clusters[config.split_k], "%d clusters", config.clusters);
            if (m == 1 || m == 9 || m == 33) CheckStreamSchedule(layout, config);
            EXPECT(memory.scales + config.tile_m * 4 <= memory.exchange, "scales");
            for (const int value_bytes : {2, 4}) {
              for (int tokens = 1; tokens <= m && tokens <= plan::kQuantizingTile; ++tokens) {
                if (!plan::StreamQuantizes(config, layout, scales, tokens, value_bytes)) continue;
                ++quantizing;
                if (config.tile_m == plan::kQuantizingTile) {
                  CheckStreamQuantization(layout, config, tokens, value_bytes);
                }
              }
            }
          }
        }
      }
    }
  }
  EXPECT(quantizing > 0, "no plan quantizes");
  for (int tokens : {8, 16, 32, 64}) {
    for (int split : {2, 4, 8}) {
      for (const plan::StreamForm form : plan::kStreamForms) {
        if (!plan::HasStreamForm(form, tokens, {true, true})) continue;
        for (int parts = 1; parts <= plan::StreamGroups(form); parts *= 2)
          CheckStreamExchange(tokens, form, split, parts);
      }
    }
  }
  for (int count : {0, 1, 5, 32, 112}) {
    for (int log = 0; log <= 3; ++log) {
      for (int part = 0; part < 1 << log; ++part) {
        const plan::Range quick = plan::ShareOfPower(count, part, log);
        const plan::Range plain = plan::Share(count, part, 1 << log);
        EXPECT(quick.begin == plain.begin && quick.end == plain.end, "part %d of %d", part, 1 << log);
      }
    }
  }
}

/// The exchange of a split tile: each quad of a thread has one owner, who finds it from every rank at its own place in
/// an inbox that is large enough, and a rank's quads are the rows that it writes.
void CheckSplitExchange(int tokens, int split) {
  constexpr int kThreads = 256;
  const plan::SplitExchange exchange = plan::SplitExchange::Of(tokens, split);
  EXPECT(exchange.quads * 8 == tokens, "%d quads", exchange.quads);
  std::set<int> rows;
  for (int owner = 0; owner < split; ++owner) {
    const plan::Range mine = exchange.Mine(owner);
    EXPECT(mine.end - mine.begin <= exchange.Most() && mine.end > mine.begin, "rank %d of %d", owner, split);
    std::set<int> slots;
    for (int from = 0; from < split; ++from) {
      for (int quad = mine.begin; quad < mine.end; ++quad) slots.insert(exchange.Slot(from, quad - mine.begin));
    }
    EXPECT(slots.size() == static_cast<size_t>(split * (mine.end - mine.begin)), "inbox of %d", owner);
    EXPECT((*slots.rbegin() + 1) * kThreads * 16 <= exchange.InboxBytes(kThreads), "inbox of %d", owner);
    for (int quad = mine.begin; quad < mine.end; ++quad) {
      for (int lane = 0; lane < 4; ++lane) {  // the rows of a thread's accumulators 4 quad .. 4 quad + 3
        for (int odd = 0; odd < 2; ++odd) rows.insert(8 * mine.begin + lane * 2 + 8 * (quad - mine.begin) + odd);
      }
    }
  }
  EXPECT(rows.size() == static_cast<size_t>(tokens) && *rows.rbegin() == tokens - 1, "%d tokens, split %d", tokens,
         split);
}

void TestWarpgroupPlan() {
  for (int tokens : {64, 128}) {
    for (int split = 2; split <= 8; ++split) CheckSplitExchange(tokens, split);
  }
  EXPECT(plan::SplitExchange::Of(64, 1).InboxBytes(256) == 0, "a tile that is not split has an inbox");
  const plan::DeviceLimits h200{132, 227 * 1024, 228 * 1024, {0, 132, 66, 40, 30, 24, 20, 16, 14}, 224};
  // Wanted, but not there: scales within a block of K, a split of the largest tile, more ranks than blocks of K.
  const auto wanted = [&](int tile_m, int tile_n, int split, int64_t k, int64_t block_size) {
    plan::Config config;
    config.tile_m = tile_m, config.tile_n = tile_n, config.split_k = split;
    return plan::ChooseWarpgroup(h200, Layout::Of(k, 4096, block_size, 2), 256, Encoding::kInteger, config).stages;
  };
  EXPECT(wanted(128, 192, 1, 4096, 128) > 0 && wanted(128, 192, 1, 4096, 64) == 0, "groups of 64 in 128 x 192");
  EXPECT(wanted(128, 256, 1, 4096, 128) > 0 && wanted(128, 256, 2, 4096, 128) == 0, "a split tile of 256 channels");
  EXPECT(wanted(64, 128, 2, 256, 128) > 0 && wanted(64, 128, 3, 256, 128) == 0, "three ranks for two blocks");
  EXPECT(wanted(64, 64, 1, 256, 128) == 0, "more deep tiles than find room");
  const auto deep = [&](int64_t k, int64_t block_size, Encoding encoding, int split) {
    plan::Config config;
    config.tile_m = 64, config.tile_n = 64, config.split_k = split;
    return plan::ChooseWarpgroup(h200, Layout::Of(k, 4096, block_size, 2), 64, encoding, config).stages;
  };
  EXPECT(deep(256, 128, Encoding::kInteger, 0) > 0 && deep(384, 128, Encoding::kInteger, 0) == 0, "odd blocks of K");
  EXPECT(deep(256, 64, Encoding::kInteger, 0) > 0 && deep(256, 64, Encoding::kFloat, 0) == 0, "float groups of 64");
  EXPECT(deep(256, 128, Encoding::kInt8, 0) == 0 && deep(1024, 128, Encoding::kFloat, 2) == 0, "int8, or split");
  for (const int tile_m : {64, 128}) {
    for (int64_t m = 1; m <= 300; ++m) {
      // Tiles have as many requests as their rows need, and none brings only rows that do not exist.
      const int rows = plan::CopyRows(tile_m, m);
      const int64_t last = (m - 1) % tile_m + 1;
      EXPECT(rows == tile_m || (2 * rows == tile_m && last <= rows), "%d rows of %lld", rows,
             static_cast<long long>(m));
      EXPECT(last > tile_m / 2 || 2 * rows == tile_m, "%lld rows in one request", static_cast<long long>(m));
    }
  }
  for (int64_t k : {16, 128, 4096, 28672}) {
    for (int64_t n : {1, 200, 4096, 28672}) {
      for (int64_t m : {1, 64, 65, 128, 256, 1024, 8192}) {
        for (const int64_t block_size : {int64_t{32}, int64_t{128}}) {
          const Layout layout = Layout::Of(k, n, std::min(k, block_size), 4);
          if (layout.promotion_k == 0) continue;
          for (const Encoding encoding : {Encoding::kFloat, Encoding::kInteger}) {
            const plan::Config config = plan::ChooseWarpgroup(h200, layout, m, encoding, {});
            const int strips = config.tile_n / kStripN;
            const int depth = plan::TileDepth(config.tile_n);
            const auto memory =
                plan::RingMemory::Of(config.tile_m, strips, config.stages, layout.block_stride, config.split_k, depth);
            EXPECT(memory.total <= h200.shared_per_cta && config.stages >= plan::kLeastStages, "%d bytes, %d stages",
                   memory.total, config.stages);
            EXPECT(memory.weights % 1024 == 0 && memory.inbox % 16 == 0 && memory.barriers % 8 == 0, "alignment");
            EXPECT(config.split_k == 1 || layout.k_blocks / config.split_k >= 4, "split %d", config.split_k);
            EXPECT(config.split_k == 1 || config.tile_n < 256, "a split tile of 256 channels");
            const int64_t tiles = CeilDiv(m, config.tile_m) * CeilDiv(n, config.tile_n);
            EXPECT(depth == 1 || (layout.k_blocks % 2 == 0 && tiles <= 2 * h200.clusters[2]), "deep tiles");
            EXPECT(config.split_k == 1 || tiles <= h200.clusters[config.split_k], "split %d", config.split_k);
            const bool in_steps = encoding == Encoding::kFloat && layout.promotion_k != kBlockK;
            EXPECT(config.tile_n <= 128 || !in_steps, "groups of 32 in tiles of %d channels", config.tile_n);
            EXPECT(layout.promotion_k == kBlockK || !plan::NeedsWholeBlocks(config.tile_m, config.tile_n),
                   "groups of 32 in tiles of %d tokens x %d channels", config.tile_m, config.tile_n);
            EXPECT(config.tile_m != 128 || config.tile_n != 192 || encoding == Encoding::kInteger,
                   "float scales in tiles of 128 tokens x 192 channels");
          }
        }
      }
    }
  }
}

/// Blocks of int8 weights: every value once, at the place where the tensor cores' fragment map wants it.
void TestInt8Packing() {
  std::set<int> seen;
  for (int word = 0; word < kInt8BlockBytes / 4; ++word) {
    const Int8WordOrigin origin = OriginOfInt8Word(word);
    const int step = word / 512;
    const int thread = word / 4 % kGroupThreads;
    const int r = word % 4;  // a0, a2: row; a1, a3: row + 8, the next channel; a2, a3: 16 rows of K on
    EXPECT(origin.channel == ThreadChannel(thread) + r % 2, "word %d", word);
    EXPECT(origin.k == step * kStepK + thread % 4 * 4 + r / 2 * 16, "word %d", word);
    for (int byte = 0; byte < 4; ++byte) seen.insert(origin.channel * kBlockK + origin.k + byte);
  }
  EXPECT(seen.size() == kStripN * kBlockK, "values are placed %zu times", seen.size());
  const Layout layout = Layout::OfInt8(200, 70);
  EXPECT(layout.strips == 2 && layout.k_blocks == 2 && layout.WeightBytes() == 4 * kInt8BlockBytes, "sizes");
  std::vector<int8_t> b(200 * 70);
  for (size_t i = 0; i < b.size(); ++i) b[i] = static_cast<int8_t>(i * 37 % 251 - 125);
  for (int strip = 0; strip < 2; ++strip) {
    for (int block = 0; block < 2; ++block) {
      for (int word = 0; word < kInt8BlockBytes / 4; ++word) {
        const Int8WordOrigin origin = OriginOfInt8Word(word);
        const uint32_t packed = PackInt8Word(layout, b.data(), strip, block, word);
        for (int byte = 0; byte < 4; ++byte) {
          const int64_t n = strip * kStripN + origin.channel;
          const int64_t k = block * kBlockK + origin.k + byte;
          const int expected = n < 70 && k < 200 ? b[static_cast<size_t>(k * 70 + n)] : 0;
          EXPECT(static_cast<int8_t>(packed >> (8 * byte)) == expected, "strip %d block %d word %d", strip, block,
                 word);
        }
      }
    }
  }
}

void TestIntegerScales() {
  std::mt19937 random(3);
  for (int trial = 0; trial < 200; ++trial) {
    const int64_t groups = 1 + random() % 8;
    const int64_t n = 1 + random() % 5;
    std::vector<float> scales(static_cast<size_t>(groups * n));
    std::vector<float> base(static_cast<size_t>(n));
    for (float& x : base) x = std::ldexp(static_cast<float>(8 + random() % 8), -12);  // 4 bits: exact times 15
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t c = 0; c < n; ++c) {
        scales[static_cast<size_t>(g * n + c)] =
            base[static_cast<size_t>(c)] * static_cast<float>(static_cast<int>(random() % 31) - 15);
      }
    }
    IntegerScales found;
    EXPECT(FindIntegerScales(scales, groups, n, 15, &found), "structured scales were not recognised");
    for (int64_t i = 0; i < groups * n; ++i) {
      const size_t at = static_cast<size_t>(i);
      EXPECT(found.base[static_cast<size_t>(i % n)] * found.multiple[at] == scales[at], "scale %zu", at);
      EXPECT(std::abs(found.multiple[at]) <= 15, "multiple %d", found.multiple[at]);
    }
    if (groups < 3) continue;  // two scales are easily multiples of something
    scales[0] = scales[static_cast<size_t>(n)] * 1.2345f + 1e-3f;
    scales[static_cast<size_t>(2 * n)] = 0.777f;
    EXPECT(!FindIntegerScales(scales, groups, n, 15, &found), "arbitrary scales were taken for structured ones");
  }
  IntegerScales found;
  EXPECT(FindIntegerScales({0, 0}, 2, 1, 15, &found) && found.multiple[0] == 0, "zero column");
  EXPECT(!FindIntegerScales({1, INFINITY}, 2, 1, 15, &found), "infinite scale");
}

}  // namespace

/// Scales and quotients of activations are those of the division instruction, next to rounding borders too.
void TestDivision() {
  std::mt19937 random(11);
  std::uniform_real_distribution<float> unit(0.0f, 1.0f);
  for (int exponent = -149; exponent <= 127; ++exponent) {
    for (int i = 0; i < 300; ++i) {
      const float largest = std::ldexp(1.0f + unit(random), exponent);
      if (largest == 0.0f || !std::isfinite(largest)) continue;
      const float scale = quantization::RowScale(largest);
      const float plain = largest / 127.0f;
      EXPECT(scale == (plain == 0.0f ? 1.0f : plain), "scale of %a", largest);
      const quantization::RowDivision divide(scale);
      for (int j = 0; j < 20; ++j) {
        float x = largest * unit(random);
        if (j % 2 == 0) {  // next to a border between two integers
          x = std::min(largest, (static_cast<float>(random() % 127) + 0.5f) * scale);
          if (j % 4 == 0) x = std::nextafterf(x, 0.0f);
        }
        if (random() % 2 == 0) x = -x;
        const float expected = std::nearbyintf(std::min(std::max(x / scale, -127.0f), 127.0f));
        const float got = std::nearbyintf(divide(divide.Rescales() ? divide.Prepare(x) : x));
        EXPECT(got == expected, "%a / %a: %g, not %g", x, scale, got, expected);
      }
    }
  }
}

/// The one multiplication gives what the division gives: all pairs of 11-bit significands in one binade of largest
/// magnitudes (a power of two changes nothing but the exponents), all of float16's subnormal numbers, and the ends of
/// the ranges.
void TestShortRowFactor() {
  int64_t without = 0, rows = 0;
  const auto check_row = [&](float largest, float least, const auto& next) {
    const float scale = quantization::RowScale(largest);
    const float reciprocal = 1.0f / scale;
    const quantization::ShortRowFactor factor(largest, scale, reciprocal);
    // A reciprocal of a device is wrong by one unit at most.
    const quantization::ShortRowFactor others[] = {{largest, scale, std::nextafterf(reciprocal, 0.0f)},
                                                   {largest, scale, std::nextafterf(reciprocal, INFINITY)}};
    const quantization::RowDivision divide(scale);
    ++rows;
    if (!factor.Exists()) {
      ++without;
      return;
    }
    EXPECT(!divide.Rescales(), "largest %a needs a rescaled division", largest);
    for (float x = largest; x >= least && x > 0; x = next(x)) {
      const float expected = 12582912.0f + std::nearbyintf(divide(x));
      if (factor.Shifted(x) != expected || factor.Shifted(-x) != 2 * 12582912.0f - expected) {
        EXPECT(false, "%a of a row up to %a: %g, not %g", x, largest, factor.Shifted(x), expected);
      }
      for (const quantization::ShortRowFactor& other : others) {
        EXPECT(other.Shifted(x) == expected, "%a of a row up to %a, rough reciprocal", x, largest);
      }
    }
  };
  const auto below = [](int bits) {  // the next smaller number of so many significant bits
    return [bits](float x) {
      int exponent;
      const float significand = std::ldexp(std::frexp(x, &exponent), bits);
      const bool power = significand == std::ldexp(1.0f, bits - 1);
      return power ? std::ldexp(std::ldexp(1.0f, bits) - 1, exponent - 1 - bits)
                   : std::ldexp(significand - 1, exponent - bits);
    };
  };
  for (int significand = 1024; significand < 2048; ++significand) {
    check_row(std::ldexp(static_cast<float>(significand), -10), 0x1p-9f, below(11));
  }
  for (int significand = 1; significand < 1024; ++significand) {
    check_row(std::ldexp(static_cast<float>(significand), -24), 0x1p-24f, [](float x) { return x - 0x1p-24f; });
  }
  EXPECT(without == 8 + 8, "%d of %d rows are divided", static_cast<int>(without), static_cast<int>(rows));
  for (int exponent = -149; exponent <= 127; ++exponent) {  // of bfloat16
    for (int significand = 128; significand < 256; ++significand) {
      const float largest = std::ldexp(static_cast<float>(significand), exponent - 7);
      const float scale = quantization::RowScale(largest);
      const quantization::ShortRowFactor factor(largest, scale, 1.0f / scale);
      if (factor.Exists()) {
        check_row(largest, largest / 1024, below(8));
      } else {
        EXPECT(significand == 254 || largest < 1e-27f || largest > 1e30f, "no factor for %a", largest);
      }
    }
  }
}

int main() {
  TestFragmentMap();
  TestUnpacking();
  TestProducts();
  TestLayout();
  TestTileOrder();
  TestStreamPlan();
  TestWarpgroupPlan();
  TestInt8Packing();
  TestIntegerScales();
  TestDivision();
  TestShortRowFactor();
  if (failures == 0) std::printf("all passed\n");
  return failures == 0 ? 0 : 1;
}
