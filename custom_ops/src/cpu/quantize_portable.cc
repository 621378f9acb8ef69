#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/gemm_portable.h"

namespace fptq::cpu::portable {

void Quantize(const void* x, ElementType type, int64_t rows, int64_t k, uint8_t* y, float* scale) {
  for (int64_t row = 0; row < rows; ++row, y += k) {
    const int64_t first = row * k;
    float largest = 0.0f;
    bool finite = true;
    for (int64_t i = 0; i < k; ++i) {
      const float magnitude = std::fabs(LoadElement(x, type, first + i));
      finite = finite && magnitude <= std::numeric_limits<float>::max();
      largest = std::max(largest, magnitude);
    }
    if (!finite) {
      scale[row] = std::numeric_limits<float>::quiet_NaN();
      std::fill(y, y + k, uint8_t{128});
      continue;
    }
    const float step = largest / 127.0f;
    scale[row] = step == 0.0f ? 1.0f : step;
    for (int64_t i = 0; i < k; ++i) {
      const float q = std::nearbyint(LoadElement(x, type, first + i) / scale[row]);
      y[i] = static_cast<uint8_t>(static_cast<int>(std::min(std::max(q, -127.0f), 127.0f)) + 128);
    }
  }
}

}  // namespace fptq::cpu::portable
