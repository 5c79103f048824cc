#include "pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <pthread.h>
#include <sched.h>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

namespace kvik {
namespace {

using Clock = std::chrono::steady_clock;

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// One call's tasks are a round. `gate_` holds the round's number, whether it is open, and how many workers are inside:
// a worker that comes too late finds it closed and goes back to sleep, so that nobody waits for a thread whose core
// another process has taken. Workers start with the first call that has work for them.
class Pool {
  public:
    Pool(int count, int64_t microseconds) : spin(microseconds), count_(count) {}

    void run(int64_t tasks, void (*work)(void *, int64_t), void *context) {
        std::lock_guard calls(calls_);
        if (tasks <= 1 || count_ == 1) {
            for (int64_t task = 0; task < tasks; ++task)
                work(context, task);
            return;
        }
        while (int(workers_.size()) + 1 < count_)
            workers_.emplace_back([this, seen = round_of(gate_.load())] { live(seen); });
        work_ = work, context_ = context, tasks_ = tasks;
        next_.store(0, std::memory_order_relaxed);
        gate_.store((round_of(gate_.load(std::memory_order_relaxed)) + 1) << SHIFT | OPEN, std::memory_order_seq_cst);
        wake();
        take();
        gate_.fetch_and(~OPEN, std::memory_order_acq_rel);
        for (int64_t i = 0; gate_.load(std::memory_order_acquire) & INSIDE; ++i)
            i < 4096 ? pause() : (void)sched_yield();
        if (const std::exception_ptr failure = std::exchange(failure_, nullptr))
            std::rethrow_exception(failure);
    }

    void resize(int count) {
        if (count > int(INSIDE))
            throw std::invalid_argument("so many threads can't be counted");
        std::lock_guard calls(calls_);
        stop_.store(true);
        gate_.fetch_add(uint64_t(1) << SHIFT, std::memory_order_seq_cst);
        wake();
        for (auto &worker : workers_)
            worker.join();
        workers_.clear();
        stop_.store(false);
        count_ = std::max(1, count);
    }

    int size() const { return count_; }
    std::atomic<int64_t> spin; // microseconds

    static int default_threads() {
        cpu_set_t set;
        CPU_ZERO(&set);
        if (sched_getaffinity(0, sizeof set, &set) == 0)
            return std::max(1, CPU_COUNT(&set));
        return int(std::max(1u, std::thread::hardware_concurrency()));
    }

  private:
    static constexpr int SHIFT = 16;
    static constexpr uint64_t OPEN = 1 << 15, INSIDE = OPEN - 1;
    static uint64_t round_of(uint64_t gate) { return gate >> SHIFT; }

    void wake() {
        if (!sleeping_.load(std::memory_order_seq_cst))
            return;
        { std::lock_guard lock(sleep_); } // whoever is about to sleep has looked at the gate by now, or will
        wake_.notify_all();
    }

    void take() {
        for (;;) {
            const int64_t task = next_.fetch_add(1, std::memory_order_relaxed);
            if (task >= tasks_)
                return;
            try {
                work_(context_, task);
            } catch (...) { // the caller gets it once nobody is at work any more; other tasks are left undone
                std::lock_guard lock(sleep_);
                failure_ = std::current_exception();
                next_.store(tasks_, std::memory_order_relaxed);
            }
        }
    }

    void live(uint64_t seen) {
        for (;;) {
            await(seen);
            if (stop_.load())
                return;
            uint64_t gate = gate_.load(std::memory_order_acquire);
            seen = round_of(gate);
            while (gate & OPEN) {
                if (!gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acq_rel))
                    continue;
                seen = round_of(gate);
                take();
                gate_.fetch_sub(1, std::memory_order_release);
                break;
            }
        }
    }

    void await(uint64_t seen) {
        const auto patience = Clock::now() + std::chrono::microseconds(spin.load(std::memory_order_relaxed));
        for (int i = 0; round_of(gate_.load(std::memory_order_acquire)) == seen; ++i) {
            pause();
            if (i % 64 == 63 && Clock::now() > patience) {
                std::unique_lock lock(sleep_);
                sleeping_.fetch_add(1, std::memory_order_seq_cst);
                wake_.wait(lock, [&] { return round_of(gate_.load(std::memory_order_seq_cst)) != seen; });
                sleeping_.fetch_sub(1, std::memory_order_seq_cst);
                return;
            }
        }
    }

    std::mutex calls_, sleep_;
    std::condition_variable wake_;
    std::vector<std::thread> workers_; // those that run: `count_` - 1, or none yet
    std::atomic<int> count_;
    std::exception_ptr failure_; // of this round
    void (*work_)(void *, int64_t) = nullptr;
    void *context_ = nullptr;
    int64_t tasks_ = 0;
    alignas(64) std::atomic<uint64_t> gate_{0}; // on lines of their own: all threads write them
    alignas(64) std::atomic<int64_t> next_{0};
    alignas(64) std::atomic<int> sleeping_{0};
    std::atomic<bool> stop_{false};
};

// After a fork the child has no threads but its own: it gets a new pool with the same settings, and the old one is left
// alone. Most children only become another program: no worker starts before there is work.
Pool *pool_ = nullptr;

Pool &pool() {
    static std::once_flag once;
    std::call_once(once, [] {
        pool_ = new Pool(Pool::default_threads(), 200); // never deleted: threads must not outlive it
        pthread_atfork(nullptr, nullptr, [] { pool_ = new Pool(pool_->size(), pool_->spin); });
    });
    return *pool_;
}

} // namespace

void parallel(int64_t tasks, void (*work)(void *, int64_t), void *context) { pool().run(tasks, work, context); }
int threads() { return pool().size(); }
void set_threads(int count) { pool().resize(count); }
void set_spin(int64_t microseconds) { pool().spin = microseconds; }
int64_t spin() { return pool().spin; }

} // namespace kvik
