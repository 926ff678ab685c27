// The one place that asks what the processor can do, and the serial frame of every verb.
#ifdef MUON_KERNELS_X86
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "../muon_kernels.h"
#include "kernels.h"
#include "parallel.h"

namespace muon_kernels::cpu {
namespace {

const Kernels* kernels_for(Isa isa) {
    switch (isa) {
#ifdef MUON_KERNELS_X86
#ifdef MUON_KERNELS_AMX
        case Isa::amx: return &kAmxKernels;
#endif
        case Isa::avx512bf16: return &kAvx512Bf16Kernels;
        case Isa::avx512: return &kAvx512Kernels;
        case Isa::avx2: return &kAvx2Kernels;
#endif
        default: return nullptr;
    }
}

const Kernels* supported_kernels(Isa isa) { return isa_supported(isa) ? kernels_for(isa) : nullptr; }

// Aligned bytes for each of the threads that a call will share its work with, had before any of them writes; null if
// memory runs out. A calling thread keeps them for its next: a product a few microseconds long cannot afford an
// allocation.
struct ThreadScratch {
    char* data;
    int64_t stride;

    ThreadScratch(int64_t bytes, int threads) : stride((bytes + 63) / 64 * 64) {
        struct Free {
            void operator()(void* p) const { std::free(p); }
        };
        thread_local std::unique_ptr<void, Free> block;
        thread_local int64_t size = 0;
        const int64_t wanted = std::max<int64_t>(64, stride * threads);
        if (size < wanted) {
            block.reset();
            block.reset(std::aligned_alloc(64, static_cast<size_t>(wanted)));
            size = block ? wanted : 0;
        }
        data = static_cast<char*>(block.get());
    }

    void* of(int thread) const { return data + thread * stride; }
};

bool same_shape(const Stack& s, int64_t batch, int64_t rows, int64_t cols) {
    return !s.data || (s.batch == batch && s.rows == rows && s.cols == cols && s.row_stride >= s.cols);
}

bool valid(const Product& p) {
    const int64_t batch = p.out.batch, m = p.out.rows, n = p.out.cols, k = p.a.cols;
    return same_shape(p.a, batch, m, k) && same_shape(p.c, batch, m, n) && same_shape(p.out, batch, m, n) &&
           (p.has_b() || k == n) && (p.b_transposed ? same_shape(p.b, batch, n, k) : same_shape(p.b, batch, k, n)) &&
           (!p.symmetric || m == n) && (!p.a_diagonal || m == k) && (!p.b_diagonal || k == n) &&
           (!(p.c_diagonal || p.out_diagonal) || m == n);
}

}  // namespace

namespace {

#ifdef MUON_KERNELS_X86
// Whether the processor has tiles and products of bf16 in them, and the system lets this process use them: a thread's
// tiles are 8 KiB that Linux saves only for who has asked.
bool has_amx() {
    unsigned eax, ebx, ecx, edx;
    constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(edx & kBf16) || !(edx & kTiles)) return false;
#ifdef __linux__
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
    return false;
#endif
}

bool is_intel() {
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid(0, &eax, &ebx, &ecx, &edx) && ebx == signature_INTEL_ebx;
}
#endif

bool detect(Isa isa) {
    if (!kernels_for(isa)) return false;
#ifdef MUON_KERNELS_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (isa == Isa::avx2) return avx2;
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (isa == Isa::avx512) return avx512;
    const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    return bf16 && (isa == Isa::avx512bf16 || has_amx());
#else
    return false;
#endif
}

}  // namespace

bool isa_supported(Isa isa) {
    // Once: a virtual machine's host is asked every time, which takes longer than a small product.
    static const bool supported[] = {detect(Isa::amx), detect(Isa::avx512bf16), detect(Isa::avx512), detect(Isa::avx2)};
    return supported[static_cast<int>(isa)];
}

std::vector<Isa> instruction_sets() {
    std::vector<Isa> order = {Isa::amx, Isa::avx512bf16, Isa::avx512, Isa::avx2};
#ifdef MUON_KERNELS_X86
    // Intel's cores take a product of bf16 pairs every other clock, and two fp32 FMAs in each.
    if (is_intel()) std::swap(order[1], order[2]);
#endif
    order.erase(std::remove_if(order.begin(), order.end(), [](Isa isa) { return !isa_supported(isa); }), order.end());
    return order;
}

namespace {

// See MomentumUpdate.
float reciprocal_norm(double sum_of_squares, double eps, double margin) {
    const double norm = std::sqrt(sum_of_squares);
    if (norm == 0) return 0;
    if (!std::isfinite(norm)) return std::numeric_limits<float>::quiet_NaN();
    int exponent;
    const double mantissa = 2 * std::frexp(norm, &exponent);
    return static_cast<float>(std::ldexp(1 / (std::max(mantissa, eps) * margin), 1 - exponent));
}

// What is left of the momentum update of matrix `i` when x is written.
void normalize(const Kernels& kernels, const MomentumUpdate& u, int64_t i, double sum) {
    if (u.norm) u.norm[i] = std::sqrt(sum);
    if (std::isfinite(sum) && sum != 0 && (sum < 0x1p-60 || sum > 0x1p60)) {
        int exponent;
        std::frexp(std::sqrt(sum), &exponent);
        const double rescaled = kernels.rescale(u.x, i, 1 - exponent);
        // Rounding to bf16 may have doubled or dropped what is below its normal range: then the norm is that of x.
        sum = sum < 0x1p-236 ? rescaled : std::ldexp(sum, 2 * (1 - exponent));
    }
    u.scale[i] = reciprocal_norm(sum, u.eps, u.margin);
}

// Bytes of scratch for any of the products, or -1: operands that do not fit.
int64_t scratch_bytes(const Kernels& kernels, const Product* list, int count) {
    int64_t bytes = 0;
    for (int i = 0; i < count; ++i) {
        if (!valid(list[i]) || list[i].out.batch != list[0].out.batch) return -1;
        bytes = std::max(bytes, kernels.product_scratch_bytes(list[i]));
    }
    return bytes;
}

void products_of_matrix(const Kernels& kernels, const Product* list, int count, int64_t matrix, void* scratch) {
    for (int i = 0; i < count; ++i) {
        const int64_t tasks = kernels.product_tasks(list[i]) / list[i].out.batch;
        for (int64_t t = 0; t < tasks; ++t) kernels.product_task(list[i], matrix * tasks + t, scratch);
    }
}

}  // namespace

Status products(Isa isa, const Product* list, int count, int threads) {
    const Kernels* kernels = supported_kernels(isa);
    if (!kernels) return Status::unsupported_isa;
    const int64_t bytes = scratch_bytes(*kernels, list, count), batch = count ? list[0].out.batch : 0;
    if (bytes < 0) return Status::invalid_argument;
    int64_t tasks = 0;  // of the product that has most
    for (int i = 0; i < count; ++i) tasks = std::max(tasks, kernels->product_tasks(list[i]));
    const ThreadScratch scratch(bytes, static_cast<int>(std::min<int64_t>(threads, tasks)));
    if (!scratch.data) return Status::out_of_memory;
    if (batch >= 4 * threads) {
        parallel_for(threads, batch, [&](int64_t matrix, int thread) {
            products_of_matrix(*kernels, list, count, matrix, scratch.of(thread));
        });
        return Status::ok;
    }
    for (int i = 0; batch && i < count; ++i) {
        parallel_for(threads, kernels->product_tasks(list[i]), [&](int64_t task, int thread) {
            kernels->product_task(list[i], task, scratch.of(thread));
        });
    }
    return Status::ok;
}

Status momentum_update(Isa isa, const MomentumUpdate& args, int threads) {
    const Kernels* kernels = supported_kernels(isa);
    if (!kernels) return Status::unsupported_isa;
    const int64_t batch = args.x.batch, blocks = kernels->momentum_blocks(args);
    const ThreadScratch scratch(batch * blocks * static_cast<int64_t>(sizeof(double)), 1);
    if (!scratch.data) return Status::out_of_memory;
    double* partial = static_cast<double*>(scratch.of(0));
    parallel_for(threads, batch * blocks, [&](int64_t task, int) {
        kernels->momentum_block(args, task / blocks, task % blocks, &partial[task]);
    });
    for (int64_t i = 0; i < batch; ++i) {
        double sum = 0;
        for (int64_t block = 0; block < blocks; ++block) sum += partial[i * blocks + block];
        normalize(*kernels, args, i, sum);
    }
    return Status::ok;
}

Status apply_update(Isa isa, const ApplyUpdate& args, const ApplyOptions& options, int threads) {
    const Kernels* kernels = supported_kernels(isa);
    if (!kernels) return Status::unsupported_isa;
    const int64_t blocks = kernels->apply_blocks(args);
    parallel_for(threads, args.x.batch * blocks, [&](int64_t task, int) {
        kernels->apply_block(args, options, task / blocks, task % blocks);
    });
    return Status::ok;
}

Status fused_step(Isa isa, const Step& args, int threads) {
    const Kernels* kernels = supported_kernels(isa);
    if (!kernels) return Status::unsupported_isa;
    const int64_t slots = args.momentum.x.batch, bytes = scratch_bytes(*kernels, args.products, args.product_count);
    if (bytes < 0 || !slots || args.apply.x.batch != slots) return Status::invalid_argument;
    for (int i = 0; i < args.product_count; ++i) {
        if (args.products[i].out.batch != slots) return Status::invalid_argument;
    }
    threads = std::min<int>(threads, static_cast<int>(slots));
    const ThreadScratch scratch(bytes, threads);
    if (!scratch.data) return Status::out_of_memory;
    parallel_for(threads, args.count, [&](int64_t matrix, int slot) {
        MomentumUpdate momentum = args.momentum;
        momentum.grad += matrix;
        if (momentum.momentum) momentum.momentum += matrix;
        momentum.x.data += slot * momentum.x.batch_stride;
        momentum.scale += slot;
        double sum = 0;
        for (int64_t block = 0; block < kernels->momentum_blocks(momentum); ++block) {
            double partial = 0;
            kernels->momentum_block(momentum, 0, block, &partial);
            sum += partial;
        }
        normalize(*kernels, momentum, 0, sum);

        products_of_matrix(*kernels, args.products, args.product_count, slot, scratch.of(slot));

        ApplyUpdate apply = args.apply;
        apply.param += matrix;
        apply.ratio += matrix;
        apply.x.data += slot * apply.x.batch_stride;
        ApplyOptions options = args.options;
        const int32_t number = options.number ? options.number[matrix] : static_cast<int32_t>(matrix);
        options.number = &number;
        for (int64_t block = 0; block < kernels->apply_blocks(apply); ++block) {
            kernels->apply_block(apply, options, 0, block);
        }
    });
    return Status::ok;
}

}  // namespace muon_kernels::cpu
