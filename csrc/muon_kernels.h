// The whole C++ interface of muon_kernels. Nothing here knows of torch, Python or pybind11: pointers, shapes, strides
// (always in elements) and a status.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace muon_kernels {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2 };

enum class Status : int32_t { ok = 0, unsupported_isa = 1, invalid_argument = 2, launch_failed = 3, out_of_memory = 4 };

// Where one matrix of a bucket lies. Any strides, so a transposed or sliced parameter is just another MatrixRef.
struct MatrixRef {
    int64_t address;
    int64_t row_stride;
    int64_t col_stride;
};

// A stack of row-major bf16 matrices; the column stride is 1. `data == nullptr` means "absent".
struct Stack {
    uint16_t* data = nullptr;
    int64_t batch = 0;
    int64_t rows = 0;
    int64_t cols = 0;
    int64_t batch_stride = 0;
    int64_t row_stride = 0;
};

// out = scale[i]^(b_transposed ? 2 : 1) * (alpha * a * b + beta * c + gamma * I), for every matrix i of the stacks:
// products of a matrix that stands for scale times itself.
//
// A square operand may be more than the bf16 matrix that is multiplied: `*_diagonal` is what rounding to bf16 took from
// its diagonal, in fp32. A matrix close to a multiple of the identity loses little else, and always in the same
// direction. The corrections cost O(n²).
//
// Without b, on the CPU: out = scale[i] * (alpha * a + beta * c + gamma * I), where out may be a or c.
struct Product {
    Stack a;                            // [batch, m, k]
    const float* a_diagonal = nullptr;  // [batch, m] or absent; m == k
    Stack b;                            // [batch, k, n], or [batch, n, k] if b_transposed, or absent
    bool b_transposed = false;          // a correction of a then takes a to be symmetric and b to be a
    const float* b_diagonal = nullptr;  // [batch, n] or absent; k == n
    Stack c;                            // [batch, m, n] or absent
    const float* c_diagonal = nullptr;  // [batch, m] or absent
    Stack out;                          // [batch, m, n], must not overlap an operand of a product
    float* out_diagonal = nullptr;      // [batch, m] or absent
    bool symmetric = false;  // the caller knows that the result is symmetric: compute one triangle, mirror it
    float alpha = 1.0f;
    float beta = 0.0f;
    float gamma = 0.0f;
    const float* scale = nullptr;  // [batch] or absent (1)

    // An empty b, of no columns or rows, is not an absent one: its product is zero.
    bool has_b() const { return b.rows || b.cols; }
};

// For every matrix i: momentum[i] is updated from grad[i]; the direction goes as bf16 to x[i]; what brings its norm,
// taken in double before the rounding, to 1 / margin goes to scale[i]; that norm to norm[i]. `momentum == nullptr`: the
// direction is the gradient.
//
//   g = grad * grad_scale
//   dampened:    buf += (1 - mu) * (g - buf);   direction = nesterov ? buf + (1 - mu) * (g - buf) : buf
//   un-dampened: buf  = mu * buf + g;           direction = nesterov ? g + mu * buf : buf
//
// A matrix whose norm is outside [2^-30, 2^30] is multiplied in x by a power of two that brings the norm to [1, 2), and
// scale is that of x: products of it can then neither overflow nor vanish, and no bit is lost.
//
// scale = 1 / (margin max(norm, eps)), where eps is relative to the power of two below the norm. torch.optim.Muon
// compares eps with the norm itself, so that tiny gradients give tiny updates; here only an exactly zero matrix meets a
// guard, and the update does not depend on the gradient's scale. Zero gives 0; NaN and infinity give NaN, so that
// nothing they touch looks sound.
struct MomentumUpdate {
    const MatrixRef* grad;      // [x.batch]
    const MatrixRef* momentum;  // [x.batch] or absent
    DType grad_dtype;
    DType momentum_dtype;
    Stack x;       // [batch, m, n]
    float* scale;  // [batch]
    double* norm;  // [batch] or absent
    double eps;
    double margin;
    float grad_scale;  // negative to maximize
    double mu;
    bool nesterov;
    bool dampened;
};

// For every matrix i: param = (1 - lr * weight_decay) * param - lr * ratio[i] * x[i]. See also ApplyOptions.
struct ApplyUpdate {
    const MatrixRef* param;  // [x.batch]
    DType param_dtype;
    Stack x;  // [batch, m, n]
    double lr;
    double weight_decay;
    const double* ratio;  // [batch]
};

// Where the matrices of x lie in whole ones, of which they are parts: the first element of x is (top, left) of the
// whole. If x is `turned`, its rows run along the columns of the whole.
struct Window {
    int64_t top = 0;
    int64_t left = 0;
    int64_t cols = 0;  // of the whole; 0: x has all columns
    bool turned = false;
};

// What goes beyond that formula.
//
// Stochastic rounding adds 16 random bits to what bf16 has no room for, and truncates. They depend on the seed, the
// matrix's number, and the element's row and column in the whole matrix alone: they are the same on every backend, and
// however matrices are cut, ordered and batched. Blocks of 2 x 2 elements of the whole, counted row by row, take turns
// in 64 bits each of SplitMix64's stream (Steele, Lea, Flood 2014) that begins at mixed(seed + number). From the lowest
// on, these are 16 bits each of even row and even column, even and odd, odd and even, odd and odd.
struct ApplyOptions {
    const float* lr = nullptr;            // on the GPU, in place of ApplyUpdate::lr
    const float* weight_decay = nullptr;  // on the GPU, in place of ApplyUpdate::weight_decay
    bool cautious = false;             // decay only where update and parameter have the same sign (update * param >= 0)
    bool stochastic_rounding = false;  // of bf16 parameters
    uint64_t seed = 0;
    const int32_t* number = nullptr;  // [x.batch] on the host, each from 0 to 2^30 - 1; absent: 0, 1, 2, ...
    Window window;
};

// A whole step of `count` matrices: for each the momentum update, the products in order, the parameter update. The
// stacks have a matrix for each thread, a slot, and every matrix passes through the slot of its thread: the workspace
// stays in that processor's cache. The pointer lists of the updates have `count` entries; scale has one a slot.
struct Step {
    int64_t count;
    MomentumUpdate momentum;
    const Product* products;
    int product_count;
    ApplyUpdate apply;
    ApplyOptions options;
};

namespace cpu {

// The instruction sets that kernels exist for.
enum class Isa : int32_t { amx = 0, avx512bf16 = 1, avx512 = 2, avx2 = 3 };

bool isa_supported(Isa isa);  // compiled, and this processor and operating system have it

// Those that are supported, fastest first.
std::vector<Isa> instruction_sets();

// "openmp" when work is shared with the OpenMP threads that the process already has (torch's), else "std::thread".
const char* thread_runtime();

// Runs `count` products in order. All have the same batch, and matrix i of an operand depends on matrices i only: with
// enough matrices for all threads, each takes whole matrices through all products, so that a matrix stays in its cache
// and threads meet once.
//
// Nothing is written with another status than ok.
Status products(Isa isa, const Product* list, int count, int threads);
Status momentum_update(Isa isa, const MomentumUpdate& args, int threads);
Status apply_update(Isa isa, const ApplyUpdate& args, const ApplyOptions& options, int threads);
Status fused_step(Isa isa, const Step& args, int threads);

}  // namespace cpu

// The same verbs on NVIDIA GPUs of compute capability 8.0 and up (csrc/cuda). Matrices, momenta and everything that a
// Stack points to lie on the device; MatrixRef lists and `ratio` lie on the host and travel as kernel arguments.
// Nothing allocates, synchronises or prints: a call puts launches on the stream and returns, so it may be captured in a
// graph.
namespace cuda {

using Stream = void*;  // cudaStream_t

// `error` is a cudaError_t; 0 unless status is launch_failed.
struct Result {
    Status status;
    int32_t error;
};

// Loads all kernels for the current device, so that none is loaded while a graph is captured, which drivers before CUDA
// 12.3 refuse. What cannot be loaded says so when it is launched.
void load_kernels();

// Stacks hold `dtype`, bf16 or f16, with fp32 accumulation. One launch a product.
Result products(const Product* list, int count, DType dtype, Stream stream);

// Products made ready for the current device, to run on it as often as wanted. Operands stay where they are. `wgmma`:
// whether it multiplies where it can, on compute capability 9.0 and what tensor maps describe; products() lets it.
struct Program;
Result prepare(const Product* list, int count, DType dtype, bool wgmma, std::shared_ptr<const Program>& program);
Result run(const Program& program, Stream stream);

// `partial`: momentum_partials(...) doubles on the device, which need no initial value. The sum of squares is added in
// a fixed order: the same bits in every run.
Result momentum_update(const MomentumUpdate& args, DType dtype, double* partial, Stream stream);
int64_t momentum_partials(const MomentumUpdate& args);

Result apply_update(const ApplyUpdate& args, const ApplyOptions& options, DType dtype, Stream stream);

// A whole step in one launch, a block a matrix, where the smaller side is at most 128: X streams through twice, once
// for the momentum and its Gram matrix, once for the update. The iteration itself never leaves the chip. momentum.x,
// momentum.scale and apply.x are not used.
//
// The Gram form runs without a restart, which takes more bits than bf16 has: every number is a sum of `terms` bf16
// numbers. Two hold 17 bits, three 22; how many a schedule needs is for the caller to know. Three are for at most 64
// rows.
//
// With several parts the columns of a matrix are divided into as many, of ceil(ceil(cols / 32) / parts) * 32 columns
// each, the last of what is left, and a step is two launches with a block for every part of every matrix: for few wide
// matrices, which would keep as few multiprocessors busy.
struct FusedStep {
    int64_t count;  // matrices, all rows x cols, rows <= cols
    int64_t rows;
    int64_t cols;
    MomentumUpdate momentum;
    ApplyUpdate apply;
    const float* coefficients;  // [steps, 3], on the host
    int steps;
    int terms;
    int parts;       // 1, or more as long as each has columns
    void* partials;  // count * parts * fused_partial_bytes(rows) on the device, at 32 bytes; not used if parts is 1
};
Result fused_step(const FusedStep& args, const ApplyOptions& options, Stream stream);

// Lists travel as kernel arguments: how many matrices a launch takes, at least. Where matrices follow each other at
// equal steps, as in a 3-D parameter, momentum_update and apply_update take more.
int64_t momentum_capacity();
int64_t apply_capacity();
int64_t fused_capacity();

// What a part of a matrix leaves in memory between the two launches.
int64_t fused_partial_bytes(int64_t rows);

const char* error_string(int32_t error);

}  // namespace cuda
}  // namespace muon_kernels
