// Compiled once for each instruction set, which KVIK_ISA names.
#include "kernels.h"

#include "simd.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>

#define KVIK_NAME_(isa) kernels_##isa
#define KVIK_NAME(isa) KVIK_NAME_(isa)
#define KVIK_TEXT_(isa) #isa
#define KVIK_TEXT(isa) KVIK_TEXT_(isa)

namespace kvik {
namespace {
#include "append.inc"
#include "attend.inc"
#include "linear.inc"
} // namespace

extern const Kernels KVIK_NAME(KVIK_ISA);
const Kernels KVIK_NAME(KVIK_ISA) = {KVIK_TEXT(KVIK_ISA), attend_kernels, linear_kernels};

} // namespace kvik
