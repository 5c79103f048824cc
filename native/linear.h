// Products with quantised weights, and the functions of single rows around them.
#pragma once

#include <cstdint>

namespace kvik {

struct LinearKernels {};

} // namespace kvik
