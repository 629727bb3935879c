#include "native/kernels/dispatch.h"

#if defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pi2 {
#if defined(__x86_64__)
namespace {

/** Whether the CPU multiplies tiles of bf16 and the kernel lets this process: tiles are 8 KB more of state to a thread. */
bool has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  constexpr unsigned kTileAndBf16 = 1u << 24 | 1u << 22;
  if ((d & kTileAndBf16) != kTileAndBf16) return false;
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d) == 0 || (a >> 5 & 1) == 0) return false;  // bf16 of the vector unit
  constexpr long kRequestPermission = 0x1023;                                           // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace
#endif

std::vector<std::string> cpu_features() {
  std::vector<std::string> features;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) features.push_back("avx2");
  if (__builtin_cpu_supports("fma")) features.push_back("fma");
  if (__builtin_cpu_supports("f16c")) features.push_back("f16c");
  if (__builtin_cpu_supports("avx512f")) features.push_back("avx512f");
  if (__builtin_cpu_supports("avx512bw")) features.push_back("avx512bw");
  if (__builtin_cpu_supports("avx512dq")) features.push_back("avx512dq");
  if (__builtin_cpu_supports("avx512vl")) features.push_back("avx512vl");
  if (__builtin_cpu_supports("avx512vnni")) features.push_back("avx512_vnni");
  if (has_amx()) features.push_back("amx_bf16");
#elif defined(__aarch64__)
  const unsigned long capabilities = getauxval(AT_HWCAP);
  if (capabilities & HWCAP_ASIMD) features.push_back("asimd");
  if (capabilities & HWCAP_ASIMDHP) features.push_back("asimdhp");
  if (capabilities & HWCAP_ASIMDDP) features.push_back("asimddp");
#endif
  return features;
}

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> sets = {&scalar_kernels()};
  [[maybe_unused]] const auto has = [features = cpu_features()](std::initializer_list<const char*> wanted) {
    for (const char* name : wanted) {
      bool found = false;
      for (const std::string& feature : features) found |= feature == name;
      if (!found) return false;
    }
    return true;
  };
#if defined(__x86_64__)
  if (has({"avx2", "fma", "f16c"})) {
    sets.push_back(&avx2_kernels());
    if (has({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"})) {
      sets.push_back(&avx512_kernels());
      if (has({"amx_bf16"})) sets.push_back(&amx_kernels());
    }
  }
#elif defined(__aarch64__)
  if (has({"asimd", "asimdhp", "asimddp"})) sets.push_back(&neon_kernels());
#endif
  return sets;
}

const Kernels* find_kernels(const std::string& name) {
  const std::vector<const Kernels*> sets = available_kernels();
  if (name.empty()) return sets.back();
  for (const Kernels* set : sets) {
    if (name == set->name) return set;
  }
  return nullptr;
}

const TileKernels* find_tiles(const std::string& name) {
  const Kernels* kernels = find_kernels(name);
  return kernels == nullptr ? nullptr : kernels->tiles;
}

}  // namespace pi2
