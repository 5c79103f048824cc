// How the rows and tiles of one call are shared out to the pool's threads. None of it shows in a result.
#include "linear.h"

#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "pool.h"

namespace kvik {
namespace {

constexpr int64_t LIGHT = 16384;      // values of a row function that are not worth waking anybody for
constexpr int64_t BLOCKS_AT_ONCE = 16; // of rows: their codes stay in the second-level cache while tiles pass by
constexpr int64_t TILES_AT_ONCE = 64;  // for one block of rows; so few that threads end together

int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

// Runs work(first, last) over all of 0 … count - 1, in pieces of `each`.
template <class F> void in_pieces(int64_t count, int64_t each, F &&work) {
    if (!count)
        return;
    parallel(parts(count, each), [&](int64_t piece) { work(piece * each, std::min(count, (piece + 1) * each)); });
}

int64_t rows_a_piece(int64_t rows, int64_t width) {
    return rows * width <= LIGHT ? rows : std::max<int64_t>(1, std::min(LIGHT / 2 / width, parts(rows, threads())));
}

// Memory that a calling thread keeps for its next call.
struct Scratch {
    std::vector<int8_t> codes;
    std::vector<GroupOfRow> groups;
};

} // namespace

void apply(const RowFunction &function, const float *x, int64_t stride, int64_t rows, int64_t width, float *out) {
    const auto row = kernels().linear.apply;
    in_pieces(rows, rows_a_piece(rows, width), [&](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; ++r)
            row(function, x + r * stride, width, out + r * width);
    });
}

void product(const Weight &weight, const RowFunction &function, const float *x, int64_t x_stride, int64_t rows,
             float *y, int64_t y_stride, bool add) {
    if (!rows || !weight.outputs)
        return;
    static thread_local Scratch scratch;
    const LinearKernels &kernel = kernels().linear;
    const int64_t width = weight.inputs, groups = weight.groups();
    if (int64_t(scratch.groups.size()) < rows * groups) {
        scratch.codes.resize(size_t(rows * groups * GROUP_INPUTS));
        scratch.groups.resize(size_t(rows * groups));
    }
    const Activations activations{scratch.codes.data(), scratch.groups.data(), rows, groups * GROUP_INPUTS};
    in_pieces(rows, rows_a_piece(rows, width), [&](int64_t first, int64_t last) {
        static thread_local std::vector<float> applied;
        if (function.kind != RowKind::none && int64_t(applied.size()) < width)
            applied.resize(size_t(width));
        for (int64_t r = first; r < last; ++r) {
            const float *row = x + r * x_stride;
            if (function.kind != RowKind::none) {
                kernel.apply(function, row, width, applied.data());
                row = applied.data();
            }
            kernel.quantize(row, width, activations, r);
        }
    });
    const int64_t blocks = parts(rows, BLOCK_ROWS), chunks = parts(blocks, BLOCKS_AT_ONCE), tiles = weight.tiles();
    const int64_t each = std::min(parts(tiles, 4 * threads()), TILES_AT_ONCE / std::min(blocks, BLOCKS_AT_ONCE));
    const int64_t pieces = parts(tiles, each);
    parallel(chunks * pieces, [&](int64_t task) {
        const int64_t block = task / pieces * BLOCKS_AT_ONCE, tile = task % pieces * each;
        kernel.product(weight, activations, block, std::min(BLOCKS_AT_ONCE, blocks - block), tile,
                       std::min(each, tiles - tile), y, y_stride, add);
    });
}

void lookup(const Weight &weight, const int64_t *outputs, int64_t count, float *out) {
    const auto one = kernels().linear.lookup;
    in_pieces(count, rows_a_piece(count, weight.inputs), [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i)
            one(weight, outputs[i], out + i * weight.inputs);
    });
}

void turn(float *x, int64_t stride, int64_t rows, int64_t heads, int64_t width, const float *table) {
    const auto one = kernels().linear.turn;
    in_pieces(rows, rows_a_piece(rows, heads * width), [&](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; ++r)
            one(x + r * stride, heads, width, table + r * width);
    });
}

} // namespace kvik
