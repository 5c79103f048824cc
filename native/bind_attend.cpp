// What Python sees of plan.h and layer.h. A layout comes as integers, in the order of `ops/native.py`.
#include <chrono>
#include <stdexcept>

#include "bind.h"
#include "layer.h"
#include "plan.h"

using Integers = std::vector<int64_t>;

namespace {

template <class T> T *at(int64_t address) { return reinterpret_cast<T *>(address); }

kvik::Stream stream(const Integers &x, size_t i) {
    const auto small = [&](size_t j) { return int(x[i + j]); };
    return {kvik::Kind(x[i]), bool(x[i + 1]), bool(x[i + 2]), small(3), small(4), small(5), x[i + 6], x[i + 7]};
}

void check(bool right, const char *wrong) {
    if (!right)
        throw std::invalid_argument(wrong);
}

kvik::Form form(const Integers &x) {
    check(x.size() == 18, "a layout has 18 integers");
    return {int(x[0]), x[1], stream(x, 2), stream(x, 10)};
}

// What each product of a layer gives is what the next takes.
void check_layer(const kvik::Layer &l) {
    const int64_t model = l.qkv->inputs, heads = int64_t(l.heads) * l.width, lanes = int64_t(l.lanes) * l.width;
    const int64_t takes = l.activation.kind == kvik::RowKind::swiglu ? 2 : 1;
    check(l.lanes > 0 && l.heads % l.lanes == 0 && l.qkv->outputs == heads + 2 * lanes && l.o->inputs == heads &&
              l.o->outputs == model && l.up->inputs == model && l.up->outputs == takes * l.down->inputs &&
              l.down->outputs == model,
          "a layer's products don't fit one another");
}

// Bytes a second, read by all threads: the bound of everything that streams.
double bandwidth(int64_t address, int64_t bytes, int repeats) {
    const int64_t shares = kvik::threads() * 4, each = bytes / shares / 64 * 64;
    std::vector<uint64_t> sums(shares * 8);
    double best = 0;
    for (int r = 0; r < repeats; ++r) {
        const auto start = std::chrono::steady_clock::now();
        kvik::parallel(shares, [&](int64_t share) {
            sums[share * 8] = kvik::kernels().attend.read(at<uint8_t>(address) + share * each, each);
        });
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
        best = std::max(best, double(each * shares) / took.count());
    }
    return best;
}

} // namespace

void bind_attend(nb::module_ &m) {
    nb::class_<kvik::Plan>(m, "Plan")
        .def("__init__",
             [](kvik::Plan *self, int64_t pages, const Integers &layout, int64_t window, int64_t sinks,
                int64_t centre, const Integers &members, const Integers &select) {
                 check(members.size() % 10 == 0 && select.size() == 4, "a member has 10 integers, a choice 4");
                 std::vector<kvik::Member> all;
                 for (size_t i = 0; i < members.size(); i += 10) {
                     const int64_t *m = members.data() + i;
                     all.push_back({at<int32_t>(m[0]), at<int32_t>(m[1]), m[2], m[3], m[4], at<int32_t>(m[5]),
                                    at<int32_t>(m[6]), at<int32_t>(m[7]), m[8], at<uint16_t>(m[9])});
                 }
                 new (self) kvik::Plan(at<uint8_t>(pages), form(layout), window, sinks, at<float>(centre), std::move(all),
                                       {select[0], select[1], select[2], select[3]});
             })
        .def("append",
             [](const kvik::Plan &self, int first, int lanes, int64_t k, int64_t k_token, int64_t k_lane, int64_t v,
                int64_t v_token, int64_t v_lane) {
                 nb::gil_scoped_release free;
                 self.append(first, lanes, {at<float>(k), k_token, k_lane}, {at<float>(v), v_token, v_lane});
             })
        .def("attend", [](const kvik::Plan &self, int first, int lanes, int shared, int64_t q, int64_t q_token,
                          float scale, float softcap, int64_t bias, int64_t reach, int64_t out, int64_t lse,
                          const Integers &masses) {
            nb::gil_scoped_release free;
            std::vector<float *> all;
            for (const int64_t mass : masses)
                all.push_back(at<float>(mass));
            self.attend(first, lanes, shared, at<float>(q), q_token, {scale, softcap, at<float>(bias), reach},
                        at<float>(out), at<float>(lse), all.empty() ? nullptr : all.data());
        });
    nb::class_<kvik::Layer>(m, "Layer", "A layer's weights and functions; see layer.h. They are kept alive.")
        .def("__init__",
             [](kvik::Layer *self, const kvik::Weight &qkv, const kvik::Weight &o, const kvik::Weight &up,
                const kvik::Weight &down, const kvik::RowFunction &attention_norm, const kvik::RowFunction &mlp_norm,
                const kvik::RowFunction &activation, int heads, int lanes, int width, float scale) {
                 const kvik::Layer layer{&qkv, &o, &up, &down, attention_norm, mlp_norm, activation, heads, lanes,
                                         width, scale};
                 check_layer(layer);
                 new (self) kvik::Layer(layer);
             },
             nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>())
        .def("run", [](const kvik::Layer &self, const kvik::Plan &plan, int first, int64_t x, int64_t rows, int64_t angles) {
            nb::gil_scoped_release free;
            self.run(plan, first, at<float>(x), rows, at<float>(angles));
        });
    m.def("compact", [](int64_t pages, const Integers &layout, int64_t source, int64_t target, int64_t count) {
        kvik::compact(at<uint8_t>(pages), form(layout), at<int64_t>(source), at<int64_t>(target), count);
    });
    m.def("bandwidth", &bandwidth, nb::arg("address"), nb::arg("bytes"), nb::arg("repeats"),
          nb::call_guard<nb::gil_scoped_release>(), "Bytes a second that all threads together read; the best of some.");
}
