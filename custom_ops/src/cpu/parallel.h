// Parallel loops on whatever pool the caller has.
#ifndef FPTQ_CPU_PARALLEL_H_
#define FPTQ_CPU_PARALLEL_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace fptq::cpu {

/// A pool: `run` calls function(data, i) for every i in [0, tasks) and returns when all are done.
struct Parallel {
  const void* pool = nullptr;
  void (*run)(const void* pool, void (*function)(void* data, size_t task), size_t tasks, void* data) = nullptr;

  /// Calls body(task) for every task; in order on this thread where there is no pool or one task. `body` must not
  /// throw.
  template <class Body>
  void For(int64_t tasks, Body&& body) const {
    if (run == nullptr || tasks <= 1) {
      for (int64_t task = 0; task < tasks; ++task) body(task);
      return;
    }
    run(
        pool, [](void* data, size_t task) { (*static_cast<Body*>(data))(static_cast<int64_t>(task)); },
        static_cast<size_t>(tasks), &body);
  }
};

/// Rows of k values that are worth a dispatch, for work that passes over them once or twice.
inline int64_t RowsPerTask(int64_t k) { return std::max<int64_t>(1, (int64_t{1} << 15) / k); }

}  // namespace fptq::cpu

#endif  // FPTQ_CPU_PARALLEL_H_
