// What every instruction set offers. Each is compiled from kernels.cpp with its own flags.
#pragma once

#include <cstdint>

namespace kvik {

struct Kernels {
    const char *name;
    void (*probe)(float *out); // temporary
};

} // namespace kvik
