// Rows into pages, and attention over pages as they are stored.
#pragma once

#include <cstdint>

namespace kvik {

struct AttendKernels {};

} // namespace kvik
