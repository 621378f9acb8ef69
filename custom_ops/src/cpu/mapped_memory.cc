#include "cpu/mapped_memory.h"

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace fptq::cpu {

void ReleasePages(const void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_PAGEOUT)
  // MADV_PAGEOUT, unlike MADV_DONTNEED, never loses contents. Whole pages only: the ends belong to neighbours as well.
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_PAGEOUT);
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace fptq::cpu
