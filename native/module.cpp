// What Python sees of the dispatch and the pool.
#include "bind.h"

NB_MODULE(_native, m) {
    nb::set_leak_warnings(false); // what lives until the process ends is not a leak
    m.doc() = "kvik's CPU kernels; use them through kvik.ops.native";
    m.def("built", &kvik::built, "Instruction sets that were built, worst first.");
    m.def("available", &kvik::available, "Those of them that this machine has.");
    m.def("isa", [] { return std::string(kvik::kernels().name); }, "The one in use.");
    m.def("use", &kvik::use, nb::arg("name"), "Uses another; false if it is not available.");
    m.def("threads", &kvik::threads, "Threads that work, the caller's included.");
    m.def("set_threads", &kvik::set_threads, nb::arg("count"));
    m.def("spin", &kvik::spin, "Microseconds that an idle thread looks for work before it sleeps.");
    m.def("set_spin", &kvik::set_spin, nb::arg("microseconds"));
    bind_linear(m);
    bind_attend(m);
}
