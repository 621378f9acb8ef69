// Kernels for AMX-INT8, on top of those for AVX512-VNNI.
#include <immintrin.h>

#include <cstdint>

#include "cpu/element.h"
#include "cpu/gemm.h"
#include "cpu/target.h"

FPTQ_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,amx-tile,amx-int8")
namespace fptq::cpu {
namespace {

#include "cpu/store_avx512.inc"

// The intrinsics want the tile as a literal.
#define FPTQ_EACH_TILE(statement)    \
  if constexpr (kTile == 0) {        \
    statement(0);                    \
  } else if constexpr (kTile == 1) { \
    statement(1);                    \
  } else if constexpr (kTile == 2) { \
    statement(2);                    \
  } else if constexpr (kTile == 3) { \
    statement(3);                    \
  } else if constexpr (kTile == 4) { \
    statement(4);                    \
  } else if constexpr (kTile == 5) { \
    statement(5);                    \
  } else if constexpr (kTile == 6) { \
    statement(6);                    \
  } else {                           \
    statement(7);                    \
  }

struct Tiles {
  static void Configure() {
    struct alignas(64) {
      uint8_t palette = 1;
      uint8_t start_row = 0;
      uint8_t reserved[14] = {};
      uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    static_assert(sizeof(config) == 64, "the layout of ldtilecfg");
    _tile_loadconfig(&config);
  }
  static void Release() { _tile_release(); }

  template <int kTile>
  static void Zero() {
#define FPTQ_ZERO(tile) _tile_zero(tile)
    FPTQ_EACH_TILE(FPTQ_ZERO)
#undef FPTQ_ZERO
  }
  template <int kTile>
  static void Load(const void* data, int64_t stride) {
#define FPTQ_LOAD(tile) _tile_loadd(tile, data, stride)
    FPTQ_EACH_TILE(FPTQ_LOAD)
#undef FPTQ_LOAD
  }
  template <int kTile>
  static void Store(void* data, int64_t stride) {
#define FPTQ_STORE(tile) _tile_stored(tile, data, stride)
    FPTQ_EACH_TILE(FPTQ_STORE)
#undef FPTQ_STORE
  }
  // acc += signed activations x signed or unsigned weights.
  template <int kAcc, int kA, int kB, bool kSigned>
  static void Dot() {
    static_assert(kAcc == 2 * (kA - 4) + (kB - 6), "the four products of two by two tiles");
    if constexpr (kAcc == 0 && kSigned) {
      _tile_dpbssd(0, 4, 6);
    } else if constexpr (kAcc == 1 && kSigned) {
      _tile_dpbssd(1, 4, 7);
    } else if constexpr (kAcc == 2 && kSigned) {
      _tile_dpbssd(2, 5, 6);
    } else if constexpr (kAcc == 3 && kSigned) {
      _tile_dpbssd(3, 5, 7);
    } else if constexpr (kAcc == 0) {
      _tile_dpbsud(0, 4, 6);
    } else if constexpr (kAcc == 1) {
      _tile_dpbsud(1, 4, 7);
    } else if constexpr (kAcc == 2) {
      _tile_dpbsud(2, 5, 6);
    } else {
      _tile_dpbsud(3, 5, 7);
    }
  }
};

#include "cpu/gemm_amx.inc"

}  // namespace

const Kernels kAmxKernels = TileKernels("amx");

}  // namespace fptq::cpu
FPTQ_TARGET_END
