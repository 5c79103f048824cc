#include "choose.h"

#include <algorithm>

#include "dispatch.h"
#include "pool.h"

namespace kvik {
namespace {

constexpr int64_t WORTH = 1024; // pages, times query heads, from where on threads share the work

// The numbers of the chosen pages, in order.
void best_pages(const Choice &choice, const Block &b, int32_t *out) {
    const Span span = choice.span;
    std::vector<float> scores(size_t((span.recent + TOGETHER - 1) / TOGETHER * TOGETHER));
    kernels().attend.bounds(choice.extremes, b.form->k.width, span.recent, b.q, b.shared, scores.data());
    std::vector<int32_t> open(size_t(span.recent - span.sinks));
    for (size_t i = 0; i < open.size(); ++i)
        open[i] = int32_t(span.sinks + int64_t(i));
    std::nth_element(open.begin(), open.begin() + span.free, open.end(), [&](int32_t a, int32_t b) {
        return scores[a] != scores[b] ? scores[a] > scores[b] : a > b; // of equals the later
    });
    std::sort(open.begin(), open.begin() + span.free);
    for (int64_t i = 0; i < span.sinks; ++i)
        out[i] = int32_t(i);
    std::copy_n(open.begin(), span.free, out + span.sinks);
}

} // namespace

std::optional<Span> Select::span(int64_t position, int page_size) const {
    const int64_t all = position / page_size + 1;
    if (all <= pages)
        return std::nullopt;
    const int64_t late = std::max<int64_t>(position - recent + 1, 0) / page_size;
    const int64_t early = std::min((sinks + page_size - 1) / page_size, late);
    return Span{early, late, std::min(std::max<int64_t>(pages - early - (all - late), 0), late - early)};
}

std::vector<int32_t> choose(const std::vector<Choice> &choices, const std::vector<Block *> &blocks) {
    std::vector<int64_t> starts;
    int64_t total = 0, work = 0;
    for (size_t i = 0; i < choices.size(); ++i) {
        starts.push_back(total);
        total += choices[i].count() * (1 + blocks[i]->form->page_size);
        work += choices[i].span.recent * blocks[i]->shared;
    }
    std::vector<int32_t> memory(static_cast<size_t>(total));
    const auto one = [&](int64_t i) {
        Block &b = *blocks[i];
        const Choice &choice = choices[i];
        const int64_t count = choice.count(), size = b.form->page_size;
        int32_t *pages = memory.data() + starts[i], *positions = pages + count;
        best_pages(choice, b, pages);
        for (int64_t c = 0; c < count; ++c) {
            for (int64_t slot = 0; slot < size; ++slot)
                positions[c * size + slot] = int32_t(pages[c] * size + slot);
            pages[c] = b.table[pages[c]];
        }
        b.kept = pages, b.kept_at = positions, b.kept_rows = count * size, b.kept_columns = count;
        b.table += choice.span.recent, b.logical += choice.span.recent, b.columns -= choice.span.recent;
    };
    if (work < WORTH)
        for (size_t i = 0; i < choices.size(); ++i)
            one(int64_t(i));
    else
        parallel(int64_t(choices.size()), [&](int64_t i) { one(i); });
    return memory;
}

} // namespace kvik
