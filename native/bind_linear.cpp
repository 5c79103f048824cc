// What Python sees of linear.h.
#include "bind.h"

#include <stdexcept>

using namespace kvik;

namespace {

template <class T> T *at(uintptr_t address) { return reinterpret_cast<T *>(address); }

constexpr RowFunction as_they_are{RowKind::none, nullptr, nullptr, 0.0f};

} // namespace

void bind_linear(nb::module_ &m) {
    using Release = nb::call_guard<nb::gil_scoped_release>;

    nb::class_<RowFunction>(m, "RowFunction", "What is done to each row by itself: a norm or an activation function.")
        .def_static("rms_norm", [](uintptr_t weight, float eps) {
            return RowFunction{RowKind::rms_norm, at<float>(weight), nullptr, eps};
        })
        .def_static("layer_norm", [](uintptr_t weight, uintptr_t bias, float eps) {
            return RowFunction{RowKind::layer_norm, at<float>(weight), at<float>(bias), eps};
        })
        .def_static("swiglu", [] { return RowFunction{RowKind::swiglu, nullptr, nullptr, 0.0f}; })
        .def_static("gelu", [] { return RowFunction{RowKind::gelu, nullptr, nullptr, 0.0f}; })
        .def("__call__", [](const RowFunction &f, uintptr_t x, int64_t stride, int64_t rows, int64_t width,
                            uintptr_t out) {
            apply(f, at<float>(x), stride, rows, width, at<float>(out));
        }, Release(), "f32 rows of the given stride -> rows of `width` at `out`.");

    nb::class_<Weight>(m, "Weight", "A packed weight; see linear.h. The memory stays the caller's.")
        .def("__init__", [](Weight *self, int bits, uintptr_t codes, uintptr_t grid, uintptr_t bias, float factor,
                            int64_t outputs, int64_t inputs) {
            new (self) Weight{bits, at<uint8_t>(codes), at<uint16_t>(grid), at<float>(bias), factor, outputs, inputs};
        })
        .def("product", [](const Weight &weight, const RowFunction *f, uintptr_t x, int64_t x_stride, int64_t rows,
                           uintptr_t y, int64_t y_stride, bool add) {
            product(weight, f ? *f : as_they_are, at<float>(x), x_stride, rows, at<float>(y), y_stride, add);
        }, nb::arg("function").none(), nb::arg("x"), nb::arg("x_stride"), nb::arg("rows"), nb::arg("y"),
           nb::arg("y_stride"), nb::arg("add"), Release(), "y = f(x) W^T + bias, or y += that.")
        .def("lookup", [](const Weight &weight, uintptr_t outputs, int64_t count, uintptr_t out) {
            for (int64_t i = 0; i < count; ++i)
                if (at<int64_t>(outputs)[i] < 0 || at<int64_t>(outputs)[i] >= weight.outputs)
                    throw std::out_of_range("the weight has no such row");
            lookup(weight, at<int64_t>(outputs), count, at<float>(out));
        }, Release(), "Rows of the weight, as f32.");

    m.def("turn", [](uintptr_t x, int64_t stride, int64_t rows, int64_t heads, int64_t width, uintptr_t table) {
        turn(at<float>(x), stride, rows, heads, width, at<float>(table));
    }, Release(), "Turns neighbouring pairs of channels in place.");
}
