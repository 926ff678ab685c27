// pybind11 over csrc, nothing else. Tensors arrive as addresses with shapes and strides: the module knows no torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "muon_kernels.h"

namespace py = pybind11;
namespace mk = muon_kernels;

namespace {

// (address, batch, rows, cols, batch_stride, row_stride)
using StackTuple = std::array<int64_t, 6>;

mk::Stack stack(const std::optional<StackTuple>& t) {
    if (!t) return {};
    const auto& [address, batch, rows, cols, batch_stride, row_stride] = *t;
    return {reinterpret_cast<uint16_t*>(address), batch, rows, cols, batch_stride, row_stride};
}

template <class T>
T* at(int64_t address) {
    return reinterpret_cast<T*>(address);
}

#ifdef MUON_KERNELS_CUDA
// What CMake knows of the build.
#ifndef MUON_KERNELS_CUDA_ARCHS
#define MUON_KERNELS_CUDA_ARCHS ""
#define MUON_KERNELS_CUDA_VERSION ""
#endif

mk::cuda::Stream stream_at(int64_t stream) { return reinterpret_cast<mk::cuda::Stream>(stream); }

struct CudaProgram {
    std::shared_ptr<const mk::cuda::Program> launches;
};
#endif

// What a verb returns; other threads of Python run meanwhile. Even a launch can take long: where the stream is full.
template <class Verb>
auto without_gil(Verb verb) {
    py::gil_scoped_release release;
    return verb();
}

// MemoryError, with words.
struct OutOfMemory : std::bad_alloc {
    std::string message;
    explicit OutOfMemory(const char* verb)
        : message(std::string(verb) + ": no memory for the kernels' scratch; nothing was written") {}
    const char* what() const noexcept override { return message.c_str(); }
};

void check(mk::Status status, const char* verb) {
    if (status == mk::Status::ok) return;
    if (status == mk::Status::out_of_memory) throw OutOfMemory(verb);
    const char* reason = status == mk::Status::unsupported_isa ? "this processor lacks the instruction set"
                                                               : "operand shapes do not fit each other";
    throw std::invalid_argument(std::string(verb) + ": " + reason);
}

#ifdef MUON_KERNELS_CUDA
// RuntimeError(what, cudaError_t): the backend knows what helps against which error.
void check(mk::cuda::Result result, const char* verb) {
    if (result.status == mk::Status::unsupported_isa) {
        throw std::invalid_argument(std::string(verb) + ": the device's compute capability is below 8.0");
    }
    if (result.status != mk::Status::launch_failed) return check(result.status, verb);
    const std::string what = std::string(verb) + ": " + mk::cuda::error_string(result.error);
    py::set_error(PyExc_RuntimeError, py::make_tuple(what, result.error));
    throw py::error_already_set();
}
#endif

}  // namespace

// Types are local to the module: the tests have a second one in the same process.
PYBIND11_MODULE(_C, m) {
    m.doc() = "Native kernels of muon_kernels.";

    py::enum_<mk::DType>(m, "DType", py::module_local())
        .value("f32", mk::DType::f32)
        .value("bf16", mk::DType::bf16)
        .value("f16", mk::DType::f16);

    py::module_ cpu = m.def_submodule("cpu", "Kernels for this processor.");
    py::enum_<mk::cpu::Isa>(cpu, "Isa", py::module_local())
        .value("amx", mk::cpu::Isa::amx)
        .value("avx512bf16", mk::cpu::Isa::avx512bf16)
        .value("avx512", mk::cpu::Isa::avx512)
        .value("avx2", mk::cpu::Isa::avx2);
    cpu.def("instruction_sets", &mk::cpu::instruction_sets);
    cpu.def("thread_runtime", &mk::cpu::thread_runtime);

    py::class_<mk::Product>(m, "Product", py::module_local())
        .def(
            py::init([](const StackTuple& a, int64_t a_diagonal, const std::optional<StackTuple>& b, bool b_transposed,
                        int64_t b_diagonal, const std::optional<StackTuple>& c, int64_t c_diagonal,
                        const StackTuple& out, int64_t out_diagonal, bool symmetric, float alpha, float beta,
                        float gamma, int64_t scale) {
                mk::Product p;
                p.a = stack(a);
                p.a_diagonal = at<const float>(a_diagonal);
                p.b = stack(b);
                p.b_transposed = b_transposed;
                p.b_diagonal = at<const float>(b_diagonal);
                p.c = stack(c);
                p.c_diagonal = at<const float>(c_diagonal);
                p.out = stack(out);
                p.out_diagonal = at<float>(out_diagonal);
                p.symmetric = symmetric;
                p.alpha = alpha;
                p.beta = beta;
                p.gamma = gamma;
                p.scale = at<const float>(scale);
                return p;
            })
        );
    cpu.def("products", [](mk::cpu::Isa isa, int threads, const std::vector<mk::Product>& list) {
        const int count = static_cast<int>(list.size());
        check(without_gil([&] { return mk::cpu::products(isa, list.data(), count, threads); }), "products");
    });
    py::class_<mk::MomentumUpdate>(m, "MomentumUpdate", py::module_local())
        .def(
            py::init([](int64_t grad, mk::DType grad_dtype, int64_t momentum, mk::DType momentum_dtype,
                        const StackTuple& x, int64_t scale, int64_t norm, double eps, double margin, float grad_scale,
                        double mu, bool nesterov, bool dampened) {
                return mk::MomentumUpdate{
                    at<const mk::MatrixRef>(grad),
                    at<const mk::MatrixRef>(momentum),
                    grad_dtype,
                    momentum_dtype,
                    stack(x),
                    at<float>(scale),
                    at<double>(norm),
                    eps,
                    margin,
                    grad_scale,
                    mu,
                    nesterov,
                    dampened
                };
            })
        );
    cpu.def("momentum_update", [](mk::cpu::Isa isa, int threads, const mk::MomentumUpdate& u) {
        check(without_gil([&] { return mk::cpu::momentum_update(isa, u, threads); }), "momentum_update");
    });
    py::class_<mk::ApplyUpdate>(m, "ApplyUpdate", py::module_local())
        .def(
            py::init([](int64_t param, mk::DType param_dtype, const StackTuple& x, double lr, double weight_decay,
                        int64_t ratio) {
                return mk::ApplyUpdate{at<const mk::MatrixRef>(param), param_dtype, stack(x), lr, weight_decay,
                                       at<const double>(ratio)};
            })
        );
    py::class_<mk::ApplyOptions>(m, "ApplyOptions", py::module_local())
        .def(
            py::init([](int64_t lr, int64_t weight_decay, bool cautious, bool stochastic_rounding, uint64_t seed,
                        int64_t number, int64_t top, int64_t left, int64_t cols, bool turned) {
                return mk::ApplyOptions{
                    at<const float>(lr),       at<const float>(weight_decay), cautious, stochastic_rounding, seed,
                    at<const int32_t>(number), {top, left, cols, turned}
                };
            })
        );
    cpu.def(
        "apply_update", [](mk::cpu::Isa isa, int threads, const mk::ApplyUpdate& u, const mk::ApplyOptions& options) {
            check(without_gil([&] { return mk::cpu::apply_update(isa, u, options, threads); }), "apply_update");
        }
    );
    cpu.def(
        "fused_step",
        [](mk::cpu::Isa isa, int threads, int64_t count, const mk::MomentumUpdate& momentum,
           const std::vector<mk::Product>& products, const mk::ApplyUpdate& apply, const mk::ApplyOptions& options) {
            const mk::Step step{count, momentum, products.data(), static_cast<int>(products.size()), apply, options};
            check(without_gil([&] { return mk::cpu::fused_step(isa, step, threads); }), "fused_step");
        }
    );

#ifdef MUON_KERNELS_CUDA
    py::module_ cuda = m.def_submodule("cuda", "Kernels for NVIDIA GPUs.");
    cuda.attr("version") = MUON_KERNELS_CUDA_VERSION;
    cuda.attr("architectures") = MUON_KERNELS_CUDA_ARCHS;
    cuda.def("load_kernels", &mk::cuda::load_kernels, py::call_guard<py::gil_scoped_release>());
#ifdef MUON_KERNELS_SM90
    cuda.attr("wgmma") = true;
#else
    cuda.attr("wgmma") = false;
#endif
    cuda.def("products", [](const std::vector<mk::Product>& list, mk::DType dtype, int64_t stream) {
        const int count = static_cast<int>(list.size());
        const auto run = [&] { return mk::cuda::products(list.data(), count, dtype, stream_at(stream)); };
        check(without_gil(run), "products");
    });
    py::class_<CudaProgram>(cuda, "Program", py::module_local())
        .def(py::init([](const std::vector<mk::Product>& list, mk::DType dtype, bool wgmma) {
            const int count = static_cast<int>(list.size());
            CudaProgram program;
            const auto run = [&] { return mk::cuda::prepare(list.data(), count, dtype, wgmma, program.launches); };
            check(without_gil(run), "products");
            return program;
        }))
        .def("run", [](const CudaProgram& program, int64_t stream) {
            check(without_gil([&] { return mk::cuda::run(*program.launches, stream_at(stream)); }), "products");
        });
    cuda.def("momentum_capacity", &mk::cuda::momentum_capacity);
    cuda.def("apply_capacity", &mk::cuda::apply_capacity);
    cuda.def("fused_capacity", &mk::cuda::fused_capacity);
    cuda.def("fused_partial_bytes", &mk::cuda::fused_partial_bytes);
    cuda.def("momentum_partials", &mk::cuda::momentum_partials);
    cuda.def("momentum_update", [](const mk::MomentumUpdate& u, mk::DType dtype, int64_t partial, int64_t stream) {
        const auto run = [&] { return mk::cuda::momentum_update(u, dtype, at<double>(partial), stream_at(stream)); };
        check(without_gil(run), "momentum_update");
    });
    cuda.def(
        "apply_update", [](const mk::ApplyUpdate& u, const mk::ApplyOptions& options, mk::DType dtype, int64_t stream) {
            const auto run = [&] { return mk::cuda::apply_update(u, options, dtype, stream_at(stream)); };
            check(without_gil(run), "apply_update");
        }
    );
    cuda.def(
        "fused_step", [](int64_t count, int64_t rows, int64_t cols, const mk::MomentumUpdate& momentum,
                         const mk::ApplyUpdate& apply, const std::vector<float>& coefficients, int terms, int parts,
                         int64_t partials, const mk::ApplyOptions& options, int64_t stream) {
            const mk::cuda::FusedStep step{
                count,
                rows,
                cols,
                momentum,
                apply,
                coefficients.data(),
                static_cast<int>(coefficients.size() / 3),
                terms,
                parts,
                at<void>(partials)
            };
            check(without_gil([&] { return mk::cuda::fused_step(step, options, stream_at(stream)); }), "fused_step");
        }
    );
#endif
}
