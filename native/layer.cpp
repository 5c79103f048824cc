#include "layer.h"

#include <vector>

namespace kvik {

void Layer::run(const Plan &plan, int first_lane, float *x, int64_t rows, const float *angles) const {
    static thread_local std::vector<float> memory; // kept for the next layer
    const int64_t model = o->outputs, three = qkv->outputs, mixed = o->inputs, inner = up->outputs;
    if (int64_t(memory.size()) < rows * (three + mixed + inner))
        memory.resize(size_t(rows * (three + mixed + inner)));
    float *q = memory.data(), *k = q + int64_t(heads) * width, *v = k + int64_t(lanes) * width;
    float *attended = q + rows * three, *middle = attended + rows * mixed;

    product(*qkv, attention_norm, x, model, rows, q, three, false);
    if (angles)
        turn(q, three, rows, heads + lanes, width, angles);
    plan.append(first_lane, lanes, {k, three, width}, {v, three, width});
    plan.attend(first_lane, lanes, heads / lanes, q, three, {scale, 0, nullptr, 0}, attended, nullptr, nullptr);
    product(*o, {RowKind::none, nullptr, nullptr, 0}, attended, mixed, rows, x, model, true);
    product(*up, mlp_norm, x, model, rows, middle, inner, false);
    product(*down, activation, middle, inner, rows, x, model, true);
}

} // namespace kvik
