// Regions of a file compiled for an instruction set that the rest of the library does not require.
//
// Flags for a whole file would also apply to inline functions and templates of its headers, of which the linker keeps
// one copy for all callers; a region covers only what is written in it.
#ifndef FPTQ_CPU_TARGET_H_
#define FPTQ_CPU_TARGET_H_

#define FPTQ_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define FPTQ_TARGET_BEGIN(features) \
  FPTQ_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define FPTQ_TARGET_END FPTQ_PRAGMA(clang attribute pop)
#else
#define FPTQ_TARGET_BEGIN(features) FPTQ_PRAGMA(GCC push_options) FPTQ_PRAGMA(GCC target(features))
#define FPTQ_TARGET_END FPTQ_PRAGMA(GCC pop_options)
#endif

#define FPTQ_UNROLL _Pragma("GCC unroll 16")  // so that arrays of registers are registers

#endif  // FPTQ_CPU_TARGET_H_
