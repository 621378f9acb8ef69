// float32, float16 and bfloat16 values.
#ifndef FPTQ_CPU_ELEMENT_H_
#define FPTQ_CPU_ELEMENT_H_

#include <cstdint>
#include <cstring>

namespace fptq::cpu {

enum class ElementType { kFloat32, kFloat16, kBFloat16 };

inline float FloatFromBits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t BitsOfFloat(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float FloatFromBFloat16(uint16_t bits) { return FloatFromBits(uint32_t{bits} << 16); }

/// Round half to even; NaN stays NaN.
inline uint16_t BFloat16FromFloat(float value) {
  const uint32_t bits = BitsOfFloat(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float FloatFromFloat16(uint16_t half) {
  const uint32_t sign = uint32_t{half & 0x8000u} << 16;
  const uint32_t magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) return FloatFromBits(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));  // inf, NaN
  // Shifted into place the exponent is short of 127 - 15; one multiplication repairs normal and subnormal alike.
  const float scaled = FloatFromBits(magnitude << 13) * FloatFromBits((127u + 127u - 15u) << 23);
  return FloatFromBits(sign | BitsOfFloat(scaled));
}

/// Round half to even; overflow gives infinity; NaN stays NaN.
inline uint16_t Float16FromFloat(float value) {
  const uint32_t bits = BitsOfFloat(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65536 and more
  if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 0.5 leaves the subnormal half in the low bits, rounded by the addition.
    const uint32_t rounded = BitsOfFloat(FloatFromBits(magnitude) + 0.5f);
    return static_cast<uint16_t>(sign | (rounded - BitsOfFloat(0.5f)));
  }
  const uint32_t rebased = magnitude - ((127u - 15u) << 23);
  return static_cast<uint16_t>(sign | ((rebased + 0xfffu + ((rebased >> 13) & 1u)) >> 13));
}

/// Element of an array at any address: in a memory-mapped file tensors may start anywhere.
template <class T>
T LoadUnaligned(const void* data, int64_t index = 0) {
  T value;
  std::memcpy(&value, static_cast<const char*>(data) + index * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return value;
}

inline float LoadElement(const void* data, ElementType type, int64_t index) {
  switch (type) {
    case ElementType::kFloat32:
      return LoadUnaligned<float>(data, index);
    case ElementType::kFloat16:
      return FloatFromFloat16(LoadUnaligned<uint16_t>(data, index));
    case ElementType::kBFloat16:
      return FloatFromBFloat16(LoadUnaligned<uint16_t>(data, index));
  }
  return 0.0f;
}

inline void StoreElement(void* data, ElementType type, int64_t index, float value) {
  switch (type) {
    case ElementType::kFloat32:
      static_cast<float*>(data)[index] = value;
      break;
    case ElementType::kFloat16:
      static_cast<uint16_t*>(data)[index] = Float16FromFloat(value);
      break;
    case ElementType::kBFloat16:
      static_cast<uint16_t*>(data)[index] = BFloat16FromFloat(value);
      break;
  }
}

}  // namespace fptq::cpu

#endif  // FPTQ_CPU_ELEMENT_H_
