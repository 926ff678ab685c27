#pragma once

#include <cstdint>

namespace muon_kernels::cpu {

// Calls task(context, i, thread) for every i in [0, tasks), on at most `threads` threads, in order of i.
void parallel_for(int threads, int64_t tasks, void* context, void (*task)(void*, int64_t, int));

template <class F>
void parallel_for(int threads, int64_t tasks, F&& f) {
    parallel_for(threads, tasks, &f, [](void* context, int64_t i, int thread) {
        (*static_cast<F*>(context))(i, thread);
    });
}

}  // namespace muon_kernels::cpu
