#include "plan.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <stdexcept>

#include "dispatch.h"
#include "pool.h"

namespace kvik {
namespace {

constexpr int ROWS = 96;      // query rows of a block, about: enough to pay for reading a tile, few enough for L2
constexpr int SHARES = 8;     // tasks a thread, at least, so that a slow one does not hold up the others
constexpr int APPENDED = 128; // rows of a task

// A block's tiles, divided over tasks. The last task to end merges them.
struct Work {
    Block block;
    int tasks;     // its own, and those of the crowd that it is in
    int64_t parts; // where its parts begin, in floats; -1: one task, which needs none
    const Member *member;
    int lane;
    int64_t crowd, row; // whose parts of the first tiles it takes, from which row on; -1: none
};

// The rows of a crowd in one lane, over its tiles alone.
struct Together {
    Block block;
    int64_t tiles, parts;
    std::vector<size_t> works; // of its members
};

// Whether a table has pages for all new rows.
bool takes(const Member &member, int page_size) {
    if (!member.count)
        return true;
    const int64_t page = member.start / page_size, more = (member.start + member.count - 1) / page_size - page;
    const int32_t *end = member.logical + member.columns, *at = std::lower_bound(member.logical, end, int32_t(page));
    return more < end - at && at[0] == page && at[more] == page + more; // ascending: those between are there as well
}

} // namespace

Block Plan::block(const Member &member, int lane, int64_t at, int queries) const {
    Block b{};
    b.form = &form_, b.pages = pages_;
    b.table = member.pages + lane * member.columns, b.logical = member.logical, b.columns = member.columns;
    b.window = window_, b.sinks = sinks_;
    if (member.kept) {
        b.kept = member.kept + lane * member.kept_columns, b.kept_rows = member.kept_rows[lane];
        b.kept_columns = member.kept_columns;
        b.kept_at = member.kept_at + lane * member.kept_columns * form_.page_size;
    }
    b.start = member.start + at, b.queries = queries;
    return b;
}

int64_t Plan::agree(const Member &a, const Member &b, int first, int lanes) const {
    const int64_t columns = std::min(a.columns, b.columns);
    int64_t alike = 0;
    while (alike < columns && a.logical[alike] == alike && b.logical[alike] == alike)
        ++alike;
    for (int lane = first; lane < first + lanes; ++lane) {
        const int32_t *x = a.pages + lane * a.columns, *y = b.pages + lane * b.columns;
        alike = std::mismatch(x, x + alike, y).first - x;
    }
    return std::min(alike * form_.page_size, std::min(a.start, b.start)) / TILE;
}

std::vector<Plan::Crowd> Plan::crowds(int first, int lanes, int64_t most) const {
    std::vector<Crowd> found;
    const auto apart = [&](const Member &m) { // it hides rows, or has others in their place
        return m.kept || m.extremes || m.start + m.count > window_ || m.count > most / 4;
    };
    for (size_t from = 0; from < members_.size(); ++from) {
        if (apart(members_[from]))
            continue;
        Crowd crowd{from, from + 1, INT64_MAX};
        int64_t queries = members_[from].count;
        for (; crowd.to < members_.size() && !apart(members_[crowd.to]); ++crowd.to) {
            const int64_t tiles = std::min(crowd.tiles, agree(members_[from], members_[crowd.to], first, lanes));
            queries += members_[crowd.to].count;
            const bool far = crowd.to > from + 1 && 2 * tiles < crowd.tiles; // the others have more in common
            if (tiles < 1 || far || queries > most)
                break;
            crowd.tiles = tiles;
        }
        if (crowd.to - from > 1) {
            found.push_back(crowd);
            from = crowd.to - 1;
        }
    }
    return found;
}

void Plan::append(int first, int lanes, const Rows &k, const Rows &v) const {
    struct Run {
        const Member *member;
        int64_t token, from, to;
    };
    std::vector<Run> runs;
    int64_t token = 0;
    const int64_t each = std::max(1, APPENDED / lanes);
    for (const Member &member : members_) {
        if (!takes(member, form_.page_size))
            throw std::out_of_range("the table has no page for a new row");
        for (int64_t from = 0; from < member.count; from += each)
            runs.push_back({&member, token, from, std::min(from + each, member.count)});
        token += member.count;
    }
    const auto &kernels = kvik::kernels().attend;
    const int size = form_.page_size, width = form_.k.width;
    const auto write = [&](int64_t task) {
        alignas(64) float centred[MAX_WIDTH];
        const Run &run = runs[task];
        const Member &m = *run.member;
        for (int64_t i = run.from; i < run.to; ++i) {
            const int64_t position = m.start + i, page = position / size;
            const int64_t column = std::lower_bound(m.logical, m.logical + m.columns, int32_t(page)) - m.logical;
            for (int lane = 0; lane < lanes; ++lane) {
                uint8_t *to = pages_ + int64_t(m.pages[(first + lane) * m.columns + column]) * form_.page_bytes;
                const int64_t row = run.token + i;
                const float *key = k.at + row * k.token + lane * k.lane;
                if (centre_) {
                    const float *centre = centre_ + int64_t(first + lane) * width;
                    for (int c = 0; c < width; ++c)
                        centred[c] = key[c] - centre[c];
                    key = centred;
                }
                kernels.append(form_.k, size, key, to, int(position % size));
                kernels.append(form_.v, size, v.at + row * v.token + lane * v.lane, to, int(position % size));
            }
        }
    };
    if (token * lanes <= APPENDED / 4)
        for (size_t task = 0; task < runs.size(); ++task)
            write(int64_t(task));
    else
        parallel(int64_t(runs.size()), [&](int64_t task) { write(task); });
}

void Plan::attend(int first, int lanes, int shared, const float *q, int64_t q_token, const Options &options,
                  float *out, float *lse, float *const *masses) const {
    const auto &kernels = kvik::kernels().attend;
    const int64_t heads = int64_t(lanes) * shared, width = form_.v.width;
    std::vector<Work> works;
    std::vector<Choice> choices;
    const int64_t most = std::max(1, ROWS / shared);
    // A bias depends on the query's position, which rows of a crowd don't share.
    const std::vector<Crowd> crowded = options.bias || members_.size() < 2 ? std::vector<Crowd>{} : crowds(first, lanes, most);
    std::vector<Together> together;
    auto crowd = crowded.begin();
    int64_t token = 0, tiles = 0, begun = 0;
    for (size_t number = 0; number < members_.size(); ++number) {
        const Member &member = members_[number];
        if (crowd != crowded.end() && number == crowd->to)
            ++crowd;
        const bool shares = crowd != crowded.end() && number >= crowd->from;
        if (shares && number == crowd->from) {
            begun = token;
            int64_t queries = 0;
            for (size_t i = crowd->from; i < crowd->to; ++i)
                queries += members_[i].count;
            for (int lane = 0; lane < lanes; ++lane) {
                Block b = block(member, first + lane, 0, int(queries));
                b.start = crowd->tiles * TILE; // behind all that is read here
                b.shared = shared, b.scale = options.scale, b.softcap = options.softcap;
                b.q = q + token * q_token + int64_t(lane) * shared * form_.k.width, b.q_stride = q_token;
                together.push_back({b, crowd->tiles, 0, {}});
            }
        }
        // Blocks start at fixed positions: how a text is cut decides nothing but who shares a load.
        const bool chooses = member.extremes && first >= select_.dense;
        const int64_t step = chooses ? 1 : most, blocks = (member.columns + TOGETHER - 1) / TOGETHER;
        for (int64_t at = 0; at < member.count; at += step) {
            const int queries = int(std::min(step, member.count - at));
            const auto span = chooses ? select_.span(member.start + at, form_.page_size) : std::nullopt;
            for (int lane = 0; lane < lanes; ++lane) {
                Block b = block(member, first + lane, at, queries);
                const int64_t row = token + at, head = int64_t(lane) * shared;
                b.shared = shared;
                b.q = q + row * q_token + head * form_.k.width, b.q_stride = q_token;
                b.scale = options.scale, b.softcap = options.softcap;
                b.bias = options.bias ? options.bias + head * options.reach : nullptr, b.reach = options.reach;
                b.out = out + (row * heads + head) * width, b.out_stride = heads * width;
                b.lse = lse ? lse + row * heads + head : nullptr, b.lse_stride = heads;
                if (span)
                    choices.push_back({int64_t(works.size()), *span,
                                       member.extremes + (first + lane) * blocks * 2 * TOGETHER * form_.k.width});
                const int64_t in = shares ? int64_t(together.size()) - lanes + lane : -1;
                if (shares)
                    together[in].works.push_back(works.size());
                works.push_back({b, 1, -1, &member, lane, in, (row - begun) * shared});
            }
        }
        token += member.count;
    }
    std::vector<Block *> open;
    for (const Choice &choice : choices)
        open.push_back(&works[choice.block].block);
    const std::vector<int32_t> chosen = choose(choices, open);
    const auto before = [&](const Work &work) { return work.crowd < 0 ? 0 : together[work.crowd].tiles; };
    for (const Work &work : works)
        tiles += work.block.tiles() - before(work);
    for (const Together &all : together)
        tiles += all.tiles;
    const int64_t wanted = threads() == 1 ? 1 : int64_t(threads()) * SHARES;
    const int64_t share = std::max<int64_t>(1, tiles / wanted);
    struct Task {
        int64_t work, from, to; // work below 0: -1 - the crowd's number
    };
    std::vector<Task> tasks;
    int64_t floats = 0;
    for (size_t t = 0; t < together.size(); ++t) {
        Together &all = together[t];
        const int64_t cuts = threads() == 1 ? 1 : std::min<int64_t>(all.tiles, SHARES);
        all.parts = floats, floats += all.tiles * kernels.part_floats(all.block);
        for (size_t w : all.works)
            works[w].tasks = int(cuts);
        for (int64_t c = 0; c < cuts; ++c)
            tasks.push_back({-1 - int64_t(t), all.tiles * c / cuts, all.tiles * (c + 1) / cuts});
    }
    for (size_t w = 0; w < works.size(); ++w) {
        Work &work = works[w];
        const int64_t skipped = before(work), count = work.block.tiles() - skipped;
        // Who sees nothing has a task as well: it writes zeros.
        const int64_t cuts = threads() == 1 ? 1 : std::max<int64_t>(1, (count + share - 1) / share);
        work.tasks = int(cuts) + (work.crowd < 0 ? 0 : work.tasks);
        if (work.tasks > 1)
            work.parts = floats, floats += work.block.tiles() * kernels.part_floats(work.block);
        for (int64_t c = 0; c < cuts; ++c)
            tasks.push_back({int64_t(w), skipped + count * c / cuts, skipped + count * (c + 1) / cuts});
    }
    const std::unique_ptr<float[]> parts(floats ? new float[size_t(floats)] : nullptr);
    std::vector<std::atomic<int>> left(works.size());
    for (size_t w = 0; w < works.size(); ++w)
        left[w].store(works[w].tasks, std::memory_order_relaxed);
    const auto block_of = [&](const Task &task) {
        return task.work < 0 ? &together[-1 - task.work].block : &works[task.work].block;
    };
    const auto ended = [&](size_t w) {
        const Work &work = works[w];
        if (left[w].fetch_sub(1, std::memory_order_acq_rel) > 1)
            return;
        Before first{nullptr, 0, 0, 0};
        if (work.crowd >= 0) {
            const Together &all = together[work.crowd];
            first = {parts.get() + all.parts, all.tiles, all.block.rows(), work.row};
        }
        kernels.merge(work.block, parts.get() + work.parts, first);
    };
    parallel(int64_t(tasks.size()), [&](int64_t t) {
        const Task &task = tasks[t];
        const size_t after = size_t(t) + threads(); // threads take tasks in turn
        const Next next = after < tasks.size() ? Next{block_of(tasks[after]), tasks[after].from} : Next{nullptr, 0};
        if (task.work < 0) {
            const Together &all = together[-1 - task.work];
            kernels.attend_tiles(all.block, task.from, task.to, parts.get() + all.parts, next);
            for (size_t w : all.works)
                ended(w);
            return;
        }
        const Work &work = works[task.work];
        if (work.parts < 0)
            return kernels.attend(work.block, next);
        kernels.attend_tiles(work.block, task.from, task.to, parts.get() + work.parts, next);
        ended(size_t(task.work));
    });
    if (masses) // lane by lane: each adds up its queries in their order
        parallel(int64_t(members_.size()) * lanes, [&](int64_t task) {
            const Member &member = members_[task / lanes];
            const int64_t slots = (member.kept_columns + member.columns) * form_.page_size, lane = task % lanes;
            for (const Work &work : works)
                if (work.member == &member && work.lane == lane)
                    mass(work.block, member, masses[task / lanes] + lane * slots);
        });
}

void Plan::mass(const Block &block, const Member &member, float *mass) const {
    const auto &kernels = kvik::kernels().attend;
    if (block.logical == member.logical)
        return kernels.mass(block, mass);
    const int64_t size = form_.page_size; // a block that chose: back to where its pages stand in the member's table
    std::vector<float> mine(size_t((block.kept_columns + block.columns) * size));
    kernels.mass(block, mine.data());
    for (int64_t c = 0; c < block.kept_columns + block.columns; ++c) {
        const int64_t page = c < block.kept_columns ? block.kept_at[c * size] / size : block.logical[c - block.kept_columns];
        for (int64_t slot = 0; slot < size; ++slot)
            mass[page * size + slot] += mine[c * size + slot];
    }
}

void compact(uint8_t *pages, const Form &form, const int64_t *source, const int64_t *target, int64_t count) {
    const Stream *streams[] = {&form.k, &form.v};
    const int codes = form.k.code_bytes + form.v.code_bytes, groups = form.k.groups + form.v.groups;
    std::vector<uint8_t> held(size_t(count) * codes);
    std::vector<uint16_t> scales(size_t(count) * groups);
    for (const bool out : {true, false}) // all are read first
        for (int64_t i = 0; i < count; ++i) {
            const int64_t slot = (out ? source : target)[i];
            uint8_t *page = pages + slot / form.page_size * form.page_bytes, *row = held.data() + i * codes;
            uint16_t *scale = scales.data() + i * groups;
            for (const Stream *s : streams) {
                if (out)
                    take(*s, form.page_size, page, int(slot % form.page_size), row, scale);
                else
                    place(*s, form.page_size, page, int(slot % form.page_size), row, scale);
                row += s->code_bytes, scale += s->groups;
            }
        }
}

} // namespace kvik
