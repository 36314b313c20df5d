// The part of the compiler's OpenMP interface that the CPU kernels use, on std::thread: the thread sanitizer sees these
// threads start, end, take their share of a loop and wait for each other, which it does not in the compiler's library.
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace {

// What the threads of one parallel region share.
struct Team {
    explicit Team(unsigned size) : size(size) {}

    void wait() {
        std::unique_lock<std::mutex> lock(mutex);
        const unsigned now = turn;
        if (++waiting == size) {
            waiting = 0;
            ++turn;
            changed.notify_all();
        } else {
            changed.wait(lock, [&] { return turn != now; });
        }
    }

    const unsigned size;
    std::mutex mutex;
    std::condition_variable changed;
    unsigned waiting = 0, turn = 0;

    // The loop that the threads are in, and how many have entered it.
    unsigned entered = 0;
    unsigned long long next = 0, end = 0, step = 0, chunk = 0;
};

thread_local Team* team = nullptr;
thread_local unsigned rank = 0;

template <class Number>
bool take(Number* first, Number* last) {
    std::lock_guard<std::mutex> lock(team->mutex);
    if (team->next >= team->end) return false;
    *first = Number(team->next);
    team->next += team->chunk * team->step;
    *last = Number(team->next < team->end ? team->next : team->end);
    return true;
}

// Loops count upwards here; the first thread to come sets the loop up.
template <class Number>
bool start(Number begin, Number end, Number step, Number chunk, Number* first, Number* last) {
    {
        std::lock_guard<std::mutex> lock(team->mutex);
        if (team->entered++ == 0) {
            team->next = begin;
            team->end = end;
            team->step = step;
            team->chunk = chunk;
        }
        if (team->entered == team->size) team->entered = 0;
    }
    return take(first, last);
}

}  // namespace

extern "C" {

void GOMP_parallel(void (*body)(void*), void* data, unsigned count, unsigned) {
    Team shared(count ? count : 1);
    std::vector<std::thread> threads;
    const auto run = [&](unsigned number) {
        team = &shared;
        rank = number;
        body(data);
        team = nullptr;
    };
    for (unsigned number = 1; number < shared.size; ++number) threads.emplace_back(run, number);
    run(0);
    rank = 0;
    for (std::thread& thread : threads) thread.join();
}

int omp_get_num_threads() { return team ? int(team->size) : 1; }
int omp_get_thread_num() { return int(rank); }

bool GOMP_loop_nonmonotonic_dynamic_start(long begin, long end, long step, long chunk, long* first, long* last) {
    return start(begin, end, step, chunk, first, last);
}
bool GOMP_loop_nonmonotonic_dynamic_next(long* first, long* last) { return take(first, last); }

bool GOMP_loop_ull_nonmonotonic_dynamic_start(
    bool,
    unsigned long long begin,
    unsigned long long end,
    unsigned long long step,
    unsigned long long chunk,
    unsigned long long* first,
    unsigned long long* last
) {
    return start(begin, end, step, chunk, first, last);
}
bool GOMP_loop_ull_nonmonotonic_dynamic_next(unsigned long long* first, unsigned long long* last) {
    return take(first, last);
}

void GOMP_loop_end() { team->wait(); }
void GOMP_loop_end_nowait() {}
void GOMP_barrier() { team->wait(); }
}
