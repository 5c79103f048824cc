// One step's sequences in one group of lanes: where rows are written and read, worked out once.
#pragma once

#include <vector>

#include "attend.h"
#include "choose.h"

namespace kvik {

struct Member {
    const int32_t *pages, *logical; // [lanes][columns], [columns]; held by the caller
    int64_t columns, start, count;
    const int32_t *kept, *kept_rows, *kept_at; // [lanes][kept_columns], [lanes], [lanes][kept_columns * page size]
    int64_t kept_columns;
    const uint16_t *extremes; // [lanes][blocks][2][k.width][TOGETHER]: its queries choose their pages by them; or null
};

struct Rows { // f32, the last axis without gaps; strides in floats
    const float *at;
    int64_t token, lane;
};

struct Options {
    float scale, softcap;
    const float *bias;
    int64_t reach;
};

class Plan {
  public:
    // centre: null, or f32 [lanes][k.width], subtracted from keys before they are encoded; held by the caller.
    Plan(uint8_t *pages, const Form &form, int64_t window, int64_t sinks, const float *centre,
         std::vector<Member> members, Select select)
        : pages_(pages), form_(form), window_(window), sinks_(sinks), centre_(centre), members_(std::move(members)),
          select_(select) {}

    // Rows of lanes first, first + 1, … of every new token.
    void append(int first, int lanes, const Rows &k, const Rows &v) const;
    // q [T][lanes * shared][k.width], q_token floats from one token to the next; out and lse without gaps. Scores, and so
    // lse, are those of keys less their centre. masses: null, or for each member [lanes][slots of kept pages, then of its
    // table], zeroed; lse is needed then.
    void attend(int first, int lanes, int shared, const float *q, int64_t q_token, const Options &options, float *out,
                float *lse, float *const *masses) const;

  private:
    // Members next to one another whose tables begin with the same pages: these are read once for all their queries.
    struct Crowd {
        size_t from, to; // members
        int64_t tiles;   // that all have, and all their queries see whole
    };
    std::vector<Crowd> crowds(int first, int lanes, int64_t most) const;
    int64_t agree(const Member &a, const Member &b, int first, int lanes) const;
    Block block(const Member &member, int lane, int64_t at, int queries) const;
    void mass(const Block &block, const Member &member, float *mass) const; // adds, to places of the member's

    uint8_t *pages_;
    Form form_;
    int64_t window_, sinks_;
    const float *centre_;
    std::vector<Member> members_;
    Select select_;
};

// Moves rows, codes verbatim, between slots (page * page size + place): as if all were read before any is written.
void compact(uint8_t *pages, const Form &form, const int64_t *source, const int64_t *target, int64_t count);

} // namespace kvik
