// The part of the compiler's OpenMP interface that the CPU kernels use, on std::thread, for the thread sanitizer.
//
// Threads see each other's writes where OpenMP promises it, and nowhere else: at the begin and end of a parallel region
// and at barriers. Taking a share of a loop is a relaxed atomic, which orders nothing.
#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

namespace {

using Counter = unsigned long long;

// What the threads of one parallel region share.
struct Team {
    explicit Team(unsigned size) : size(size) {
        for (std::atomic<Counter>& count : taken) count.store(0, std::memory_order_relaxed);
    }

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
    std::array<std::atomic<Counter>, 1024> taken;  // chunks of each loop of the region

private:
    std::mutex mutex;
    std::condition_variable changed;
    unsigned waiting = 0, turn = 0;
};

thread_local Team* team = nullptr;
thread_local unsigned rank = 0;

// The loop that this thread is in. Every thread is given the same bounds; loops count upwards.
thread_local size_t loop = 0;
thread_local Counter first_index, end_index, stride;

template <class Number>
bool take(Number* first, Number* last) {
    const Counter begin = first_index + stride * team->taken[loop - 1].fetch_add(1, std::memory_order_relaxed);
    if (begin >= end_index) return false;
    *first = Number(begin);
    *last = Number(begin + stride < end_index ? begin + stride : end_index);
    return true;
}

template <class Number>
bool start(Number begin, Number end, Number step, Number chunk, Number* first, Number* last) {
    if (++loop > team->taken.size()) std::abort();
    first_index = Counter(begin);
    end_index = Counter(end);
    stride = Counter(chunk) * Counter(step);
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
        loop = 0;
        body(data);
        team = nullptr;
    };
    for (unsigned number = 1; number < shared.size; ++number) threads.emplace_back(run, number);
    run(0);
    for (std::thread& thread : threads) thread.join();
}

int omp_get_num_threads() { return team ? int(team->size) : 1; }
int omp_get_thread_num() { return int(rank); }

bool GOMP_loop_nonmonotonic_dynamic_start(long begin, long end, long step, long chunk, long* first, long* last) {
    return start(begin, end, step, chunk, first, last);
}
bool GOMP_loop_nonmonotonic_dynamic_next(long* first, long* last) { return take(first, last); }

bool GOMP_loop_ull_nonmonotonic_dynamic_start(
    bool, Counter begin, Counter end, Counter step, Counter chunk, Counter* first, Counter* last
) {
    return start(begin, end, step, chunk, first, last);
}
bool GOMP_loop_ull_nonmonotonic_dynamic_next(Counter* first, Counter* last) { return take(first, last); }

void GOMP_loop_end() { team->wait(); }
void GOMP_loop_end_nowait() {}
void GOMP_barrier() { team->wait(); }
}
