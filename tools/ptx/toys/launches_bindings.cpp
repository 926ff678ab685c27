#include <pybind11/pybind11.h>

#include <cstdint>

#include "launches.h"

PYBIND11_MODULE(toy_launches, m) {
    m.def("run", [](int64_t y, int64_t x, float a, int n, int shared_bytes, int opt_in) {
        return run(
            {reinterpret_cast<float*>(y), reinterpret_cast<const float*>(x), a, n, shared_bytes, opt_in}, nullptr
        );
    });
    m.def("run_small", [](int64_t y, int threads) { return run_small(reinterpret_cast<float*>(y), threads); });
    m.def("multiprocessors", &multiprocessors);
    m.def("set_scale", &set_scale);
}
