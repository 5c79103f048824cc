#include "dispatch.h"

#include <atomic>

namespace kvik {

#define KVIK_DECLARE(isa) extern const Kernels kernels_##isa;
KVIK_DECLARE(baseline)
#ifdef KVIK_HAS_avx2
KVIK_DECLARE(avx2)
KVIK_DECLARE(avx512)
KVIK_DECLARE(avx512x)
#endif

namespace {

struct Entry {
    const Kernels *kernels;
    bool here;
};

std::vector<Entry> entries() {
    std::vector<Entry> all{{&kernels_baseline, true}};
#ifdef KVIK_HAS_avx2
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512cd");
    const bool v4x = v4 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
    all.push_back({&kernels_avx2, v3});
    all.push_back({&kernels_avx512, v4});
    all.push_back({&kernels_avx512x, v4x});
#endif
    return all;
}

std::atomic<const Kernels *> in_use{nullptr}; // one thread may choose while another computes

} // namespace

std::vector<std::string> built() {
    std::vector<std::string> names;
    for (auto &entry : entries())
        names.push_back(entry.kernels->name);
    return names;
}

std::vector<std::string> available() {
    std::vector<std::string> names;
    for (auto &entry : entries())
        if (entry.here)
            names.push_back(entry.kernels->name);
    return names;
}

const Kernels &kernels() {
    const Kernels *chosen = in_use;
    if (!chosen) {
        use(available().back());
        chosen = in_use;
    }
    return *chosen;
}

bool use(const std::string &name) {
    for (auto &entry : entries())
        if (entry.here && name == entry.kernels->name) {
            in_use = entry.kernels;
            return true;
        }
    return false;
}

} // namespace kvik
