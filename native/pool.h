// Threads that share a call's tasks, and sleep between calls.
#pragma once

#include <cstdint>

namespace kvik {

// Runs work(context, task) for every task from 0 to tasks - 1, on the calling thread and the pool's. Which thread runs
// a task must not show in its result: a task writes only what is its own. Calls from several threads follow one another. What a task throws, the caller gets.
void parallel(int64_t tasks, void (*work)(void *context, int64_t task), void *context);

template <class F> void parallel(int64_t tasks, F &&work) {
    parallel(tasks, [](void *context, int64_t task) { (*static_cast<F *>(context))(task); }, &work);
}

// How many threads work, the caller's included. Setting it ends or starts some; 1 = no pool.
int threads();
void set_threads(int count);

// How long an idle thread looks for work before it sleeps. Long enough to bridge the gap between two calls of a step.
void set_spin(int64_t microseconds);
int64_t spin();

} // namespace kvik
