// Products with quantised weights, and the functions of single rows around them.
//
// y = x Wᵀ with W[n][k] = scale[n][g] · code[n][k] + zero[n][g] and x[t][k] ≈ s[t][g] · q[t][k], where g = k / 32:
//
//     y[t][n] = Σ over g, in order: (s[t][g] · Σ over g's k: code[n][k] · q[t][k]) · scale[n][g] + zero[n][g] · z[t][g]
//
// with z[t][g] = s[t][g] · Σ q[t][k]. The inner sum is a sum of whole numbers, hence exact; everything else is single
// additions and products of f32 in this order. So a row's bits depend neither on the rows beside it, nor on threads,
// nor on the instruction set.
#pragma once

#include <cstdint>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kvik {

constexpr int64_t GROUP_INPUTS = 32; // inputs that share a scale
constexpr int64_t TILE_OUTPUTS = 16;  // outputs that lie together: 4 inputs of each are 64 bytes
constexpr int64_t BLOCK_ROWS = 8;  // rows that share each load of a weight

// A weight as it is held. Codes lie by tile, group, run of 4 inputs, output, input. With 4 bits, a byte's low half is
// of run i < 4 and its high half of run i + 4. With 8 bits, codes are 0 … 255 for -128 … 127, and zero is 0. Outputs
// and inputs are filled up with zeros to whole tiles and groups.
struct Weight {
    int bits;
    const uint8_t *codes; // [tiles][groups][bits][TILE_OUTPUTS][4]
    const uint16_t *grid; // f16 [tiles][groups][scale, and with 4 bits zero][TILE_OUTPUTS]
    const float *bias;    // [outputs] or null
    float factor;         // a power of two, on all scales and zeros
    int64_t outputs, inputs;
    int64_t tiles() const { return (outputs + TILE_OUTPUTS - 1) / TILE_OUTPUTS; }
    int64_t groups() const { return (inputs + GROUP_INPUTS - 1) / GROUP_INPUTS; }
};

// What a product needs to know of one row's group, beside its codes.
struct GroupOfRow {
    float scale, sum; // s and z
    int32_t offset;   // -128 · Σ q: takes 8-bit codes to their true values
};

// Rows as products take them: blocks of BLOCK_ROWS rows, the last one with what is left. In a block of R rows, codes
// lie by group, run of 4 inputs, row, input, and groups by group, row.
struct Activations {
    int8_t *codes;
    GroupOfRow *groups;
    int64_t rows, width; // width in whole groups: a multiple of GROUP_INPUTS
    int64_t rows_of(int64_t block) const {
        const int64_t left = rows - block * BLOCK_ROWS;
        return left < BLOCK_ROWS ? left : BLOCK_ROWS;
    }
    int8_t *codes_of(int64_t block) const { return codes + block * BLOCK_ROWS * width; }
    GroupOfRow *groups_of(int64_t block) const { return groups + block * BLOCK_ROWS * (width / GROUP_INPUTS); }
};

// What is done to each row on its way in.
enum class RowKind { none, rms_norm, layer_norm, swiglu, gelu };

struct RowFunction {
    RowKind kind;
    const float *weight, *bias; // of norms
    float eps;
};

struct LinearKernels {
    // One row, x → out of `width` values; a swiglu's x has 2 · width. x may be out, except for a swiglu.
    void (*apply)(const RowFunction &function, const float *x, int64_t width, float *out);
    // One row's codes and scales, to its place among the activations.
    void (*quantize)(const float *x, int64_t width, const Activations &to, int64_t row);
    // Some tiles' outputs of some blocks of rows; adds to y or writes it.
    void (*product)(const Weight &weight, const Activations &x, int64_t block, int64_t blocks, int64_t tile,
                    int64_t tiles, float *y, int64_t stride, bool add);
    // One output's weights.
    void (*lookup)(const Weight &weight, int64_t output, float *out);
    // Neighbouring pairs of channels of one row's heads, turned by [width / 2] (cos, sin).
    void (*turn)(float *x, int64_t heads, int64_t width, const float *table);
};

// Calls for whole matrices, over the pool's threads. Strides in floats.
void apply(const RowFunction &function, const float *x, int64_t stride, int64_t rows, int64_t width, float *out);
void product(const Weight &weight, const RowFunction &function, const float *x, int64_t x_stride, int64_t rows,
             float *y, int64_t y_stride, bool add);
void lookup(const Weight &weight, const int64_t *outputs, int64_t count, float *out);
void turn(float *x, int64_t stride, int64_t rows, int64_t heads, int64_t width, const float *table);

} // namespace kvik
