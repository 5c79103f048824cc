// A whole layer of a transformer that norms before its two parts, in one call:
//
//     x += o · attend(turn(qkv · norm(x)))        x += down · activation(up · norm(x))
//
// It does what the single calls do, in their order, and has their bits: what it saves is the way from one to the next.
#pragma once

#include "linear.h"
#include "plan.h"

namespace kvik {

struct Layer {
    const Weight *qkv, *o, *up, *down; // held by the caller; qkv gives q, k and v side by side
    RowFunction attention_norm, mlp_norm, activation;
    int heads, lanes, width;
    float scale;

    // x [rows][width of the model], without gaps, is changed. angles [rows][width] or null: nothing is turned.
    void run(const Plan &plan, int first_lane, float *x, int64_t rows, const float *angles) const;
};

} // namespace kvik
