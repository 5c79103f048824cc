// What Python sees of attend.h.
#include "bind.h"

void bind_attend(nb::module_ &) {}
