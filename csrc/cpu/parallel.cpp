// torch brings an OpenMP runtime whose threads spin for a while after every parallel region. A second pool would fight
// them for the cores, so the same one is used: its entry point is looked up in the process, which costs no link-time
// dependency. Where there is none, plain threads do the work.
#include "parallel.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "../muon_kernels.h"

namespace muon_kernels::cpu {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

GompParallel gomp_parallel() {
    // libgomp's and, for compatibility, LLVM's and Intel's runtimes' entry point of a parallel region
    static const auto entry = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return entry;
}

struct Region {
    std::atomic<int64_t> next{0};
    std::atomic<int> thread{0};
    int64_t tasks;
    void* context;
    void (*task)(void*, int64_t, int);

    void run() {
        const int self = thread.fetch_add(1);
        for (int64_t i; (i = next.fetch_add(1)) < tasks;) task(context, i, self);
    }
};

}  // namespace

const char* thread_runtime() { return gomp_parallel() ? "openmp" : "std::thread"; }

void parallel_for(int threads, int64_t tasks, void* context, void (*task)(void*, int64_t, int)) {
    threads = static_cast<int>(std::min<int64_t>(threads, tasks));
    if (threads <= 1) {
        for (int64_t i = 0; i < tasks; ++i) task(context, i, 0);
        return;
    }
    Region region;
    region.tasks = tasks;
    region.context = context;
    region.task = task;
    if (GompParallel parallel = gomp_parallel()) {
        parallel([](void* r) { static_cast<Region*>(r)->run(); }, &region, static_cast<unsigned>(threads), 0);
        return;
    }
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back([&region] { region.run(); });
    region.run();
    for (std::thread& other : others) other.join();
}

}  // namespace muon_kernels::cpu
