// Which instruction sets were built, which this machine has, and which is in use.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace kvik {

std::vector<std::string> built();      // worst first
std::vector<std::string> available();  // those of `built` that this machine has
const Kernels &kernels();              // those in use
bool use(const std::string &name);     // false: not available

} // namespace kvik
