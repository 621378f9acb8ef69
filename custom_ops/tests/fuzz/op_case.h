// One attack on the op library, made from bytes: a node that is sound or was spoiled, its kernel, a call, and a check
// of the result.
#ifndef FPTQ_TESTS_FUZZ_OP_CASE_H_
#define FPTQ_TESTS_FUZZ_OP_CASE_H_

#include <cstddef>
#include <cstdint>

namespace fptq::fuzz {

enum class Outcome { kRefusedAtCreation, kRefusedAtCall, kRight, kRan };

inline constexpr int kOutcomes = 4;
/// "refused_at_creation", "refused_at_call", "right" (the result was checked), "ran" (NaN or infinity came in).
const char* NameOf(Outcome outcome);

/// Runs the case that the bytes describe. What must not happen, such as a wrong result or the refusal of a sound node,
/// is printed and ends the process.
Outcome RunCase(const uint8_t* data, size_t size);

}  // namespace fptq::fuzz

#endif  // FPTQ_TESTS_FUZZ_OP_CASE_H_
