#pragma once

/**
 * Before a function: compiled for the instruction sets named (`"avx2"`) and for the least CPU; the best the CPU has is
 * chosen when the program is loaded.
 */
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
#define PI2_VECTOR_CODE(...) __attribute__((target_clones(__VA_ARGS__, "default")))
#else
#define PI2_VECTOR_CODE(...)
#endif
