// What every instruction set offers. Each is compiled from kernels.cpp with its own flags.
#pragma once

#include "attend.h"
#include "linear.h"

namespace kvik {

struct Kernels {
    const char *name;
    AttendKernels attend;
    LinearKernels linear;
};

} // namespace kvik
