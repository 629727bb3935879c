#pragma once
#include <string>
#include <vector>

#include "native/kernels/kernels.h"

namespace pi2 {

/** Kernel sets this CPU can run, weakest first; the scalar one always. */
std::vector<const Kernels*> available_kernels();

/** The set called `name`, or the strongest if `name` is empty; null if this CPU has no such set. */
const Kernels* find_kernels(const std::string& name);

/** The matrix unit of that set, or null. */
const TileKernels* find_tiles(const std::string& name);

/** CPU features that kernels use and this CPU has, as the kernel's /proc/cpuinfo spells them. */
std::vector<std::string> cpu_features();

}  // namespace pi2
