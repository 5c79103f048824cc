// Rows into pages, and attention over pages as they are stored. How a page is laid out: src/kvik/ops/layout.py.
#pragma once

#include <cstdint>
#include <cstring>

namespace kvik {

enum class Kind : int32_t { f32, bf16, f16, i8, i4 };

// One stream of a page. Offsets are bytes from the page's start.
struct Stream {
    Kind kind;
    bool rotated;
    bool mixed;     // granules hold several rows' codes of one channel (v); else 4 bytes of one row (k)
    int width;      // channels
    int code_bytes; // of a row, whole granules
    int groups;     // scales of a row; 0 for the floats
    int64_t codes_at, scales_at;

    int element() const { return !mixed ? 4 : kind == Kind::f32 ? 4 : kind == Kind::bf16 || kind == Kind::f16 ? 2 : 1; }
    int half() const { return (width + 1) / 2; } // a 4-bit byte j holds channels j and j + half
};

// Calls move(place in the row, place in the page, bytes) for each piece of a row's codes.
template <class Move> inline void each_piece(const Stream &s, int page_size, int slot, Move &&move) {
    const int element = s.element(), pieces = s.code_bytes / element, together = 4 / element;
    for (int i = 0; i < pieces; ++i)
        move(i * element,
             s.codes_at + (s.mixed ? (int64_t(slot / together) * pieces + i) * 4 + slot % together * element
                                   : (int64_t(i) * page_size + slot) * 4),
             element);
}

inline void place(const Stream &s, int page_size, uint8_t *page, int slot, const uint8_t *codes, const uint16_t *scales) {
    each_piece(s, page_size, slot, [&](int in, int64_t out, int n) { std::memcpy(page + out, codes + in, n); });
    for (int g = 0; g < s.groups; ++g)
        std::memcpy(page + s.scales_at + 2 * (int64_t(g) * page_size + slot), scales + g, 2);
}

inline void take(const Stream &s, int page_size, const uint8_t *page, int slot, uint8_t *codes, uint16_t *scales) {
    each_piece(s, page_size, slot, [&](int out, int64_t in, int n) { std::memcpy(codes + out, page + in, n); });
    for (int g = 0; g < s.groups; ++g)
        std::memcpy(scales + g, page + s.scales_at + 2 * (int64_t(g) * page_size + slot), 2);
}

struct Form {
    int page_size;
    int64_t page_bytes;
    Stream k, v;
};

// Slots are cut here, whatever the batch. A tile is computed whole by one thread; tiles merge in order.
constexpr int TILE = 256;
constexpr int TOGETHER = 16;   // pages whose keys' extremes lie side by side
constexpr int MAX_WIDTH = 512; // up to here sums of 16-bit times 8-bit products fit 32 bits

// Some consecutive queries of one sequence, and the query heads that share one lane: row m is query m / shared.
struct Block {
    const Form *form;
    const uint8_t *pages;
    const int32_t *table, *logical; // of the lane: `columns` page numbers, and the pages' places in the text
    int64_t columns;
    const int32_t *kept, *kept_at; // pages of the rows that stayed when others left, side by side, and their positions:
    int64_t kept_rows;             // every query sees them, before all others
    int64_t kept_columns;          // pages of the lane that keeps most
    int64_t window, sinks;  // a query at p sees positions up to p that are > p - window or < sinks
    int64_t start;          // position of the first query
    int queries, shared;
    const float *q;         // [queries][shared][k.width], `q_stride` floats from one query to the next
    int64_t q_stride;
    float scale, softcap;   // softcap 0: none
    const float *bias;      // [shared][reach] or null
    int64_t reach;
    float *out, *lse;       // [queries][shared][v.width] and [queries][shared] or null, with strides
    int64_t out_stride, lse_stride;

    // The tiles that some of the queries see: of kept rows, then the first few (sinks), then those from the oldest
    // position on.
    int64_t last() const { return start + queries - 1; }
    int64_t held() const { return columns ? int64_t(logical[0]) * form->page_size / TILE : 0; } // nothing is before it
    int64_t oldest() const { return start - window < 0 ? held() : (start - window + 1) / TILE; }
    int64_t kept_tiles() const { return (kept_rows + TILE - 1) / TILE; }
    int64_t sunk() const {
        const int64_t tiles = (sinks + TILE - 1) / TILE;
        return tiles < oldest() ? tiles : oldest();
    }
    int64_t tiles() const { return kept_tiles() + sunk() + last() / TILE - oldest() + 1; }
    int64_t tile(int64_t i) const { // of positions; i counts from the kept tiles on
        const int64_t after = i - kept_tiles();
        return after < sunk() ? after : oldest() + after - sunk();
    }
    int rows() const { return queries * shared; }
    bool plain() const { return !bias && softcap == 0; }
};

// The tile that the same thread will likely read after a block's: fetched while the last one is computed.
struct Next {
    const Block *block; // null: unknown
    int64_t tile;
};

// Parts of a block's first tiles that were computed together with other rows': [tiles][rows] of them, ours from `first` on.
struct Before {
    const float *parts; // null: there are none
    int64_t tiles, rows, first;
};

struct AttendKernels {
    // Encodes a row of `width` floats; codes and scales go to its slot of a page.
    void (*append)(const Stream &, int page_size, const float *row, uint8_t *page, int slot);
    // All tiles of a block, its results written.
    void (*attend)(const Block &, Next);
    // Only tiles [from, to); each leaves its part at parts + i * part_floats(block).
    void (*attend_tiles)(const Block &, int64_t from, int64_t to, float *parts, Next);
    // Merges the parts of all tiles, in order, and writes the results; those of the first tiles may lie elsewhere.
    void (*merge)(const Block &, const float *parts, Before);
    int64_t (*part_floats)(const Block &);
    // Adds to mass what each slot, of kept pages and then of the table's, received from the rows, whose lse is known.
    void (*mass)(const Block &, float *mass);
    // How large a product with one of a lane's queries a page's keys can have, for each page: `choose.inc`. Room for
    // whole runs of TOGETHER scores.
    void (*bounds)(const uint16_t *extremes, int width, int64_t pages, const float *q, int shared, float *scores);
    // Reads memory and does next to nothing with it: what streaming costs.
    uint64_t (*read)(const uint8_t *from, int64_t bytes);
};

} // namespace kvik
