// The AMX kernels on emulated tiles, so that a machine with AVX512-VNNI but without AMX can check their arithmetic.
#include "amx_emulation.h"

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "cpu/element.h"
#include "cpu/target.h"

FPTQ_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace fptq::cpu {
namespace {

#include "cpu/store_avx512.inc"

struct Tiles {
  static inline thread_local int8_t tile[8][16][64];
  static inline thread_local bool configured = false;

  static void Configure() { configured = true; }
  static void Release() { configured = false; }
  template <int kTile>
  static void Zero() {
    std::memset(tile[kTile], 0, sizeof(tile[kTile]));
  }
  template <int kTile>
  static void Load(const void* data, int64_t stride) {
    for (int r = 0; r < 16; ++r) std::memcpy(tile[kTile][r], static_cast<const char*>(data) + r * stride, 64);
  }
  template <int kTile>
  static void Store(void* data, int64_t stride) {
    for (int r = 0; r < 16; ++r) std::memcpy(static_cast<char*>(data) + r * stride, tile[kTile][r], 64);
  }
  // tdpbssd and tdpbsud: acc[m][n] += sum_k sum_i signed a[m][4 k + i] * b[k][4 n + i], b signed or not
  template <int kAcc, int kA, int kB, bool kSigned>
  static void Dot() {
    if (!configured) __builtin_trap();
    for (int m = 0; m < 16; ++m) {
      for (int n = 0; n < 16; ++n) {
        uint32_t sum;
        std::memcpy(&sum, &tile[kAcc][m][4 * n], 4);
        for (int k = 0; k < 16; ++k) {
          for (int i = 0; i < 4; ++i) {
            const int8_t weight = tile[kB][k][4 * n + i];
            sum += static_cast<uint32_t>(tile[kA][m][4 * k + i] * (kSigned ? weight : static_cast<uint8_t>(weight)));
          }
        }
        std::memcpy(&tile[kAcc][m][4 * n], &sum, 4);
      }
    }
  }
};

#include "cpu/gemm_amx.inc"

}  // namespace

const Kernels kEmulatedAmxKernels = TileKernels("amx (emulated tiles)");

}  // namespace fptq::cpu
FPTQ_TARGET_END
