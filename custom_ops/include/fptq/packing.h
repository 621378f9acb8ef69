// The packed form of int4 weights that every CUDA kernel reads, as host/device maths.
//
// B [K, N] is cut into blocks of 64 channels x 128 rows of K, 4 KB each, followed by the block's own scales; the blocks
// of one 64-channel strip follow each other along K, so that a CTA that walks along K reads one contiguous stream and
// asks for weights and scales at once. A block holds the A operand of four
// tensor-core steps (32 rows of K each) in fragment order: thread t of a 128-thread group finds all it needs for steps
// 2h and 2h+1 in one 16-byte word at byte h * 2048 + t * 16. The fragment map is that of mma.m16n8k32 (warp w of the
// group holds channels 16w..16w+15 of the strip) and of wgmma.m64nNk32 with A in registers, which is the same.
//
// The two matrix rows that a thread holds, r and r + 8, are mapped to neighbouring channels, so that scales are read
// and results are written two channels at a time.
#ifndef FPTQ_PACKING_H_
#define FPTQ_PACKING_H_

#include <cstdint>

#if defined(__CUDACC__)
#define FPTQ_HD __host__ __device__ __forceinline__
#else
#define FPTQ_HD inline
#endif

namespace fptq::packing {

inline constexpr int kStripN = 64;                         // channels of a block
inline constexpr int kBlockK = 128;                        // rows of K of a block
inline constexpr int kStepK = 32;                          // rows of K of one tensor-core step
inline constexpr int kStepsPerBlock = kBlockK / kStepK;    // 4
inline constexpr int kBlockBytes = kStripN * kBlockK / 2;  // 4096
inline constexpr int kInt8BlockBytes = kStripN * kBlockK;  // 8192
inline constexpr int kGroupThreads = 128;                  // threads that share a block
inline constexpr int kWordsPerBlock = kBlockBytes / 4;     // 1024
inline constexpr int kHalfBytes = kBlockBytes / 2;         // two steps of all threads
inline constexpr int kMaxScaleMultiple = 15;
/// Longest K whose integer-structured sum |q * i| <= 120 against uint8 is sure to fit int32.
inline constexpr int64_t kMaxIntegerK = (int64_t{1} << 31) / (120 * 255);

FPTQ_HD constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// How the values of a block are encoded.
enum class Encoding : int32_t {
  kFloat = 0,    ///< nibble = q (two's complement): unpacks to the int8 16 * q; scales are T
  kInteger = 1,  ///< nibble = unsigned digit q + 8, unpacks to the int8 q * i; multipliers are IntegerScale
  kInt8 = 2,     ///< the int8 values themselves (W8A8), blocks of twice the size
};

/// What the tensor cores multiply by: every scale group is cut at this many rows of K.
/// 0: the fast kernels cannot run this block size (only the reference kernel can).
FPTQ_HD constexpr int PromotionK(int64_t k, int64_t block_size) {
  if (block_size >= k || block_size % kBlockK == 0) return kBlockK;
  return block_size == 32 || block_size == 64 ? static_cast<int>(block_size) : 0;
}

/// Sizes of one packed weight.
struct Layout {
  int64_t k = 0, n = 0;
  int64_t block_size = 0;
  int64_t strips = 0;    ///< ceil(n / 64)
  int64_t k_blocks = 0;  ///< ceil(k / 128)
  int promotion_k = 0;   ///< 32, 64 or 128 rows of K per promotion; 0 for the reference kernel only
  int block_stride = 0;  ///< bytes from one block to the next: 4096 and its scales [RowsPerBlock()][64]

  /// `scale_bytes`: of one scale (IntegerScale has 2).
  FPTQ_HD static Layout Of(int64_t k, int64_t n, int64_t block_size, int scale_bytes) {
    Layout layout;
    layout.k = k;
    layout.n = n;
    layout.block_size = block_size;
    layout.strips = CeilDiv(n, kStripN);
    layout.k_blocks = CeilDiv(k, kBlockK);
    layout.promotion_k = PromotionK(k, block_size);
    layout.block_stride = kBlockBytes + layout.RowsPerBlock() * kStripN * scale_bytes;
    return layout;
  }

  /// Of int8 weights: blocks of 8 KB, one scale per channel that is kept outside of them.
  FPTQ_HD static constexpr Layout OfInt8(int64_t k, int64_t n) {
    Layout layout;
    layout.k = k;
    layout.n = n;
    layout.block_size = k;
    layout.strips = CeilDiv(n, kStripN);
    layout.k_blocks = CeilDiv(k, kBlockK);
    layout.promotion_k = kBlockK;
    layout.block_stride = kInt8BlockBytes;
    return layout;
  }

  /// Rows of scales of one block: 1, 2 or 4; 0 where scales are kept outside the blocks, for the reference kernel.
  FPTQ_HD constexpr int RowsPerBlock() const { return promotion_k == 0 ? 0 : kBlockK / promotion_k; }
  /// The group whose scale is row `row` of a block. A group of several blocks is repeated in each of them.
  FPTQ_HD constexpr int64_t GroupOf(int64_t k_block, int row) const {
    return (k_block * kBlockK + int64_t{row} * promotion_k) / block_size;
  }
  /// Row of scales of a tensor-core step in its block.
  FPTQ_HD constexpr int ScaleRowOfStep(int step) const {
    return promotion_k == kBlockK ? 0 : promotion_k == 2 * kStepK ? step / 2 : step;
  }
  /// Whether a scale's products end with this step of a block.
  FPTQ_HD constexpr bool PromotesAfterStep(int step) const {
    return step == kStepsPerBlock - 1 || promotion_k == kStepK || (promotion_k == 2 * kStepK && step % 2 == 1);
  }
  FPTQ_HD constexpr int64_t StripBytes() const { return k_blocks * block_stride; }
  FPTQ_HD constexpr int64_t WeightBytes() const { return strips * StripBytes(); }
  FPTQ_HD constexpr int64_t BlockOffset(int64_t strip, int64_t k_block) const {
    return strip * StripBytes() + k_block * block_stride;
  }
};

/// Channel, within the strip, of matrix row 0 of thread `thread` (0..127); row 8 is the next channel.
FPTQ_HD constexpr int ThreadChannel(int thread) { return (thread / 32) * 16 + (thread % 32) / 4 * 2; }

/// Where the eight values of a 32-bit word of a block come from.
struct WordOrigin {
  int channel;  ///< in the strip
  int low_k;    ///< row of K, in the block, of the low nibble of byte 0; byte b holds row low_k + b
  int high_k;   ///< the same for the high nibbles
};

/// `word`: 0..1023, counted in 4-byte words from the block's start.
FPTQ_HD constexpr WordOrigin OriginOfWord(int word) {
  const int half = word / (kHalfBytes / 4);
  const int thread = word / 4 % kGroupThreads;
  const int step = 2 * half + word % 4 / 2;
  const int k = step * kStepK + 4 * (thread % 4);
  return {ThreadChannel(thread) + word % 2, k, k + 16};
}

/// Where one value of a block is: the inverse of OriginOfWord.
struct NibblePlace {
  int word;
  int shift;  ///< of the nibble in the word
};

/// `channel`: 0..63; `k`: 0..127, the row of K in the block.
FPTQ_HD constexpr NibblePlace PlaceOfValue(int channel, int k) {
  const int step = k / kStepK;
  const int in_step = k % kStepK;
  const int thread = channel / 16 * 32 + channel % 16 / 2 * 4 + in_step % 16 / 4;
  const int word = step / 2 * (kHalfBytes / 4) + thread * 4 + step % 2 * 2 + channel % 2;
  return {word, 8 * (in_step % 4) + 4 * (in_step / 16)};
}

/// The same for a block of int8 weights, whose 16-byte words are the fragments: thread t finds step s at byte
/// s * 2048 + t * 16. Byte b of the word comes from row k + b.
struct Int8WordOrigin {
  int channel, k;
};
FPTQ_HD constexpr Int8WordOrigin OriginOfInt8Word(int word) {
  const int step = word / (kInt8BlockBytes / 4 / kStepsPerBlock);
  const int thread = word / 4 % kGroupThreads;
  const int r = word % 4;
  return {ThreadChannel(thread) + r % 2, step * kStepK + 4 * (thread % 4) + r / 2 * 16};
}

/// Packs the word `word` of block (strip, k_block) of int8 weights b [k, n].
FPTQ_HD uint32_t PackInt8Word(const Layout& layout, const int8_t* b, int64_t strip, int64_t k_block, int word) {
  const Int8WordOrigin origin = OriginOfInt8Word(word);
  const int64_t n = strip * kStripN + origin.channel;
  uint32_t packed = 0;
  for (int byte = 0; byte < 4; ++byte) {
    const int64_t k = k_block * kBlockK + origin.k + byte;
    const int8_t value = n < layout.n && k < layout.k ? b[k * layout.n + n] : int8_t{0};
    packed |= uint32_t{static_cast<uint8_t>(value)} << (8 * byte);
  }
  return packed;
}

/// Element i of a row-major int4 tensor, low nibble first, sign-extended.
FPTQ_HD int ReadInt4(const uint8_t* data, int64_t i) {
  const int nibble = (data[i >> 1] >> (4 * (i & 1))) & 0xF;
  return (nibble ^ 8) - 8;
}

/// One multiplier of integer-structured scales, as kernels read it: q * i = (q + 8) * multiplier + offset - 128.
struct IntegerScale {
  int8_t multiplier;  ///< i, -15..15
  uint8_t offset;     ///< 128 - 8 i, 8..248

  FPTQ_HD static constexpr IntegerScale Of(int i) {
    return {static_cast<int8_t>(i), static_cast<uint8_t>(128 - 8 * i)};
  }
};
inline constexpr int kDigitOffset = 8;  ///< the unsigned digit that stores q is q + 8

/// The four int8 fragment registers of one tensor-core step, in the operand order of mma and wgmma:
/// a0 (row, k), a1 (row + 8, k), a2 (row, k + 16), a3 (row + 8, k + 16).
struct Fragment {
  uint32_t a[4];
};

/// Values 16 * q: the nibble stays in the high half of its byte; the factor 16 is folded into the output scale.
FPTQ_HD Fragment UnpackFloat(uint32_t even, uint32_t odd) {
  constexpr uint32_t kHigh = 0xF0F0F0F0u;
  return {{(even << 4) & kHigh, (odd << 4) & kHigh, even & kHigh, odd & kHigh}};
}
inline constexpr float kFloatEncodingScale = 1.0f / 16;

/// (x & mask) ^ flip: one instruction, for which the compiler does not keep a constant in a register.
FPTQ_HD uint32_t MaskAndFlip(uint32_t x, uint32_t mask, uint32_t flip) {
#ifdef __CUDA_ARCH__
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0x6A;" : "=r"(result) : "r"(x), "r"(mask), "r"(flip));
  return result;
#else
  return (x & mask) ^ flip;
#endif
}

/// Values 16 * q of the integer encoding, to be multiplied by i / 16 once per group of rows instead of once per value.
FPTQ_HD Fragment UnpackDigits(uint32_t even, uint32_t odd) {
  constexpr uint32_t kHigh = 0xF0F0F0F0u;
  constexpr uint32_t kSign = 0x80808080u;
  return {{MaskAndFlip(even << 4, kHigh, kSign), MaskAndFlip(odd << 4, kHigh, kSign), MaskAndFlip(even, kHigh, kSign),
           MaskAndFlip(odd, kHigh, kSign)}};
}
inline constexpr int kDigitShift = 4;

/// The multipliers of the two channels of a thread, spread for UnpackInteger.
struct SpreadScales {
  uint32_t multiplier[2];  ///< modulo 2^32
  uint32_t offset[2];      ///< in all four bytes
};

/// The multiplier of one IntegerScale in the low half of a word.
FPTQ_HD int Multiplier(uint32_t scale) { return static_cast<int8_t>(scale & 0xFF); }

/// `pair`: two IntegerScale, even channel in the low half.
FPTQ_HD SpreadScales Spread(uint32_t pair) {
#ifdef __CUDA_ARCH__
  // A byte and its sign, or a byte four times: one instruction each. (__byte_perm leaves out the sign.)
  SpreadScales scales;
  asm("prmt.b32 %0, %1, 0, 0x8880;" : "=r"(scales.multiplier[0]) : "r"(pair));
  asm("prmt.b32 %0, %1, 0, 0xAAA2;" : "=r"(scales.multiplier[1]) : "r"(pair));
  scales.offset[0] = __byte_perm(pair, 0, 0x1111);
  scales.offset[1] = __byte_perm(pair, 0, 0x3333);
  return scales;
#else
  return {{static_cast<uint32_t>(Multiplier(pair)), static_cast<uint32_t>(Multiplier(pair >> 16))},
          {(pair >> 8 & 0xFF) * 0x01010101u, (pair >> 24) * 0x01010101u}};
#endif
}

/// Values q * i: digit * i + offset is 8..248 in every byte, so four bytes are multiplied at once (what a negative
/// product borrows from the next byte, its offset gives back: all is modulo 2^32); flipping the top bit subtracts the
/// 128 in the offset.
FPTQ_HD Fragment UnpackInteger(uint32_t even, uint32_t odd, const SpreadScales& scales) {
  constexpr uint32_t kLow = 0x0F0F0F0Fu;
  constexpr uint32_t kSign = 0x80808080u;
  return {{((even & kLow) * scales.multiplier[0] + scales.offset[0]) ^ kSign,
           ((odd & kLow) * scales.multiplier[1] + scales.offset[1]) ^ kSign,
           ((even >> 4 & kLow) * scales.multiplier[0] + scales.offset[0]) ^ kSign,
           ((odd >> 4 & kLow) * scales.multiplier[1] + scales.offset[1]) ^ kSign}};
}

/// Packs the word `word` of block (strip, k_block) of int4 weights b [k, n].
FPTQ_HD uint32_t PackWord(const Layout& layout, Encoding encoding, const uint8_t* b, int64_t strip, int64_t k_block,
                          int word) {
  const WordOrigin origin = OriginOfWord(word);
  const int64_t n = strip * kStripN + origin.channel;
  uint32_t packed = 0;
  for (int nibble = 0; nibble < 8; ++nibble) {
    const int byte = nibble / 2;
    const int64_t k = k_block * kBlockK + (nibble % 2 == 0 ? origin.low_k : origin.high_k) + byte;
    const int q = n < layout.n && k < layout.k ? ReadInt4(b, k * layout.n + n) : 0;
    const uint32_t digit = static_cast<uint32_t>(encoding == Encoding::kInteger ? q + kDigitOffset : q) & 0xF;
    packed |= digit << (4 * nibble);
  }
  return packed;
}

// Zero point. The tensor cores multiply the activations as they are, uint8. What is left to take off is
// zero_point * sum_k scale * q per channel: a float32 for float scales, an exact int32 for integer-structured ones.

/// y of the float encoding, without the factor 16.
FPTQ_HD float DequantizeFloat(float sum, float column_sum, int zero_point, float a_scale) {
  return a_scale * (sum * kFloatEncodingScale - static_cast<float>(zero_point) * column_sum);
}

/// y of the integer encoding; the correction wraps like the sum does, and the corrected sum fits int32.
FPTQ_HD float DequantizeInteger(int32_t sum, int32_t column_sum, float base, int zero_point, float a_scale) {
  const uint32_t corrected =
      static_cast<uint32_t>(sum) - static_cast<uint32_t>(zero_point) * static_cast<uint32_t>(column_sum);
  return a_scale * (base * static_cast<float>(static_cast<int32_t>(corrected)));
}

/// Byte offset of 16-byte chunk `chunk` (0..7) of row `row` in a tile of 128-byte rows with the 128-byte swizzle of the
/// tensor copy engine and of wgmma descriptors: chunks are exchanged within 8 rows (1 KB) so that columns spread over
/// all banks. The tile starts at a multiple of 1024.
FPTQ_HD constexpr int SwizzledOffset(int row, int chunk) { return row * 128 + ((chunk ^ (row & 7)) * 16); }

}  // namespace fptq::packing

#endif  // FPTQ_PACKING_H_
