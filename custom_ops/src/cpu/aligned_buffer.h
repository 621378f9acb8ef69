// Cache-line aligned memory.
#ifndef FPTQ_CPU_ALIGNED_BUFFER_H_
#define FPTQ_CPU_ALIGNED_BUFFER_H_

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

namespace fptq::cpu {

inline constexpr int64_t kAlignment = 64;

template <class T>
struct AlignedAllocator {
  using value_type = T;
  AlignedAllocator() = default;
  template <class U>
  AlignedAllocator(const AlignedAllocator<U>&) {}  // NOLINT: allocators convert implicitly
  T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{kAlignment})); }
  void deallocate(T* data, size_t) { ::operator delete(data, std::align_val_t{kAlignment}); }
  friend bool operator==(const AlignedAllocator&, const AlignedAllocator&) { return true; }
  friend bool operator!=(const AlignedAllocator&, const AlignedAllocator&) { return false; }
};

template <class T>
using AlignedVector = std::vector<T, AlignedAllocator<T>>;

constexpr int64_t CeilDiv(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }
constexpr int64_t RoundUp(int64_t value, int64_t multiple) { return CeilDiv(value, multiple) * multiple; }

}  // namespace fptq::cpu

#endif  // FPTQ_CPU_ALIGNED_BUFFER_H_
