// Queries that choose which pages they read: `ops/quest.py` says which.
#pragma once

#include <optional>
#include <vector>

#include "attend.h"

namespace kvik {

struct Span { // `ops.reads.Span`
    int64_t sinks, recent, free;
};

struct Select { // `ops.reads.Select`
    int64_t pages, sinks, recent, dense;

    std::optional<Span> span(int64_t position, int page_size) const;
};

// One query's choice in one lane.
struct Choice {
    int64_t block; // its number
    Span span;
    const uint16_t *extremes;

    int64_t count() const { return span.sinks + span.free; }
};

// Lets blocks of one query each choose: their kept pages are the chosen ones then, and their tables begin at the recent
// ones. What they chose is in the result, pages and positions, which must outlive them.
std::vector<int32_t> choose(const std::vector<Choice> &choices, const std::vector<Block *> &blocks);

} // namespace kvik
