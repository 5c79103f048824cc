// Addresses come from Python as integers: `ops/native.py` and `ops/linear.py` have checked what they point at.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "dispatch.h"
#include "pool.h"

namespace nb = nanobind;

void bind_attend(nb::module_ &m);
void bind_linear(nb::module_ &m);
