#include "native/kernels/dispatch.h"

#if defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace pi2 {

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
    if (has({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"})) sets.push_back(&avx512_kernels());
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

}  // namespace pi2
