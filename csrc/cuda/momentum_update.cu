// One pass over gradient and momentum for all matrices of a bucket, then one small launch for their norms.
//
// An f16 x needs a power of two before it is rounded, and the norm is known only after the pass. The tile's own norm is
// known before: its power of two depends on nothing else and comes in steps of 2^15, half of f16's range. Then nearly
// always all tiles of a matrix have the same one, and the second launch has nothing to move: 14 bytes an element in
// fp32, as for bf16. Reading gradient and momentum a second time would cost 8 to 10 more.
#include "elementwise.cuh"

namespace muon_kernels::cuda {
namespace {

// factor * (difference ? other - grad : other) + (onto_other ? other : grad): all that momentum asks for, without a
// branch for each element.
struct Blend {
    float factor;
    bool difference;
    bool onto_other;
};

struct MomentumArguments {
    Stack x;
    double* partial;  // the sum of squares of each tile
    int tiles;        // of a matrix
    float grad_scale;
    Blend momentum;   // of the gradient with the old momentum
    Blend direction;  // with the new one, if nesterov
    bool nesterov;
    bool has_momentum;
    bool half;  // x is f16
    bool x_aligned;
};

// ---- powers of two ----

// floor(log2(v)) of a positive normal number.
__device__ int exponent(double v) { return ((__double2hiint(v) >> 20) & 0x7ff) - 1023; }

__device__ double power(int e) { return __hiloint2double((e + 1023) << 20, 0); }

// The power of two that a tile, or the largest tile of a matrix, is multiplied by in x: for f16 it brings its norm to
// [1, 2^15), so that nothing overflows and what is at least 2^-14 times a norm keeps all its bits. For bf16 it keeps
// elements that matter out of those below the normal range, which rounding may double or drop: 7e-41 becomes 9e-41.
__device__ int tile_power(double sum_of_squares, bool half) {
    if (!(sum_of_squares > 0) || isinf(sum_of_squares)) return 0;
    if (!half) return sum_of_squares < 0x1p-200 ? 100 : 0;
    const int from_lowest = exponent(sum_of_squares) + 24 + 30 * 64;  // steps begin at norms of 2^-12, positive
    return 12 - 15 * (from_lowest / 30 - 64);
}

// Factors whose product is 2^e: one alone could leave the range of fp32.
struct PowerOfTwo {
    float first, second;

    __device__ explicit PowerOfTwo(int e)
        : first(static_cast<float>(power(e / 2))), second(static_cast<float>(power(e - e / 2))) {}
    __device__ float operator()(float v) const { return v * first * second; }
};

// ---- the pass ----

// One fused multiply-add, as in csrc/cpu; without the intrinsic the compiler could fuse the difference with what comes
// before it.
__device__ float blended(const Blend& b, float grad, float other) {
    return fmaf(b.factor, b.difference ? __fsub_rn(other, grad) : other, b.onto_other ? other : grad);
}

__device__ double add(double a, double b) { return a + b; }
__device__ double larger(double a, double b) { return a > b ? a : b; }
__device__ double smaller(double a, double b) { return a < b ? a : b; }

// Over the lanes of a warp, always in the same order; all have the result.
template <class F>
__device__ double warp_reduce(double value, F combine) {
#pragma unroll
    for (int lanes = 16; lanes; lanes /= 2) value = combine(value, __shfl_xor_sync(~0u, value, lanes));
    return value;
}

// A sum of squares in two floats, with some 45 bits: `low` has what rounding took from `high` (Knuth's sum, and a fused
// multiply-add for the product). Some GPUs have few multipliers for doubles (B300: one for 60 of fp32), and a tile
// would wait for them.
struct SumOfSquares {
    float high = 0, low = 0;

    __device__ void add(float v) {
        const float square = __fmul_rn(v, v), sum = __fadd_rn(high, square), added = __fsub_rn(sum, high);
        const float lost = __fadd_rn(__fsub_rn(high, __fsub_rn(sum, added)), __fsub_rn(square, added));
        low = __fadd_rn(low, __fadd_rn(lost, fmaf(v, v, -square)));
        high = sum;
    }
    __device__ double value() const { return static_cast<double>(high) + low; }
};

constexpr int WARPS = THREADS / 32;

// Over the threads of a block, always in the same order. `scratch` must not be used before the next barrier.
template <class F>
__device__ double block_reduce(double value, F combine, double (&scratch)[WARPS]) {
    value = warp_reduce(value, combine);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    value = scratch[0];
#pragma unroll
    for (int w = 1; w < WARPS; ++w) value = combine(value, scratch[w]);
    return value;
}

template <class Grad, class Momentum, int V>
__device__ void momentum_tile(const MomentumArguments& u, const Run<2>& run, const Tile& tile, Staged& staged) {
    __shared__ double scratch[WARPS];
    constexpr int LINES = PER_THREAD / V;
    const Slice<V> slice(tile, run.along_rows);
    const Lines<const Grad, V> grads(run, 0, tile, slice);
    const Lines<Momentum, V> momenta(run, 1, tile, slice);
    float direction[LINES][V];
#pragma unroll
    for (int begin = 0; begin < LINES; begin += AT_ONCE<V>) {
        // All reads are under way before the first is needed.
        Grad grad[AT_ONCE<V>][V] = {};
        Momentum momentum[AT_ONCE<V>][V] = {};
#pragma unroll
        for (int l = 0; l < AT_ONCE<V>; ++l) {
            if (slice.has(begin + l)) load(grads[begin + l], grad[l]);
        }
#pragma unroll
        for (int l = 0; l < AT_ONCE<V>; ++l) {
            if (u.has_momentum && slice.has(begin + l)) load(momenta[begin + l], momentum[l]);
        }
#pragma unroll
        for (int l = 0; l < AT_ONCE<V>; ++l) {
#pragma unroll
            for (int v = 0; v < V; ++v) {
                float d = __fmul_rn(static_cast<float>(grad[l][v]), u.grad_scale);
                if (u.has_momentum) {
                    const float updated = blended(u.momentum, d, static_cast<float>(momentum[l][v]));
                    momentum[l][v] = rounded<Momentum>(updated);
                    d = u.nesterov ? blended(u.direction, d, updated) : updated;
                }
                direction[begin + l][v] = d;
            }
            if (u.has_momentum && slice.has(begin + l)) store(momenta[begin + l], momentum[l]);
        }
    }
    // Only now: between the reads its terms take registers that some architectures do not have.
    SumOfSquares squares;
#pragma unroll
    for (int l = 0; l < LINES; ++l) {
#pragma unroll
        for (int v = 0; v < V; ++v) squares.add(direction[l][v]);
    }
    double sum = squares.value();
    // Where squares overflow in fp32, or those that matter vanish, again in double. Seldom, but for zeros.
    if (!(sum > 0x1p-80 && sum < 0x1p120)) {
        sum = 0;
#pragma unroll
        for (int l = 0; l < LINES; ++l) {
#pragma unroll
            for (int v = 0; v < V; ++v) sum += static_cast<double>(direction[l][v]) * direction[l][v];
        }
    }
    sum = block_reduce(sum, add, scratch);
    if (threadIdx.x == 0) u.partial[static_cast<int64_t>(tile.matrix) * u.tiles + tile.index] = sum;
    // Also by one: a branch around the products makes sm_100 and sm_120 spill.
    const PowerOfTwo factor(tile_power(sum, u.half));
#pragma unroll
    for (int l = 0; l < LINES; ++l) {
#pragma unroll
        for (int v = 0; v < V; ++v) direction[l][v] = factor(direction[l][v]);
    }
    if (run.along_rows) {
#pragma unroll
        for (int l = 0; l < LINES; ++l) {
            if (slice.has(l)) store_x(x_at(u.x, tile, slice.row(l, 0), slice.along), u.half, direction[l]);
        }
    } else {
#pragma unroll
        for (int l = 0; l < LINES; l += 2) {
#pragma unroll
            for (int v = 0; v < V; ++v) {
                staged.at(slice.row(l, v), slice.col(l, v) / 2) = pack(direction[l][v], direction[l + 1][v], u.half);
            }
        }
        __syncthreads();
        staged.write_to(u.x, tile, u.x_aligned);
    }
}

template <class Grad, class Momentum, int BYTES>
__global__ __launch_bounds__(THREADS, BLOCKS_PER_SM) void momentum_kernel(
    const __grid_constant__ MomentumArguments u, const __grid_constant__ Runs<2, BYTES> runs
) {
    static_assert(sizeof(u) + sizeof(runs) <= BYTES, "a kernel's arguments");
    __shared__ Staged staged;
    const Run<2>* run;  // of gradients and momenta
    const Tile tile = tile_of_block(u.x, u.tiles, runs, run);
    if (run->vector) {
        momentum_tile<Grad, Momentum, VECTOR<Grad, Momentum>>(u, *run, tile, staged);
    } else {
        momentum_tile<Grad, Momentum, 1>(u, *run, tile, staged);
    }
}

// ---- norms ----

struct NormArguments {
    Stack x;
    const double* partial;
    float* scale;
    double* norm;  // or null
    double eps;
    double margin;
    int tiles;
    int shares;  // blocks for a matrix
    bool half;
};

// See MomentumUpdate.
__device__ float reciprocal_norm(double sum_of_squares, double eps, double margin) {
    const double norm = sqrt(sum_of_squares);
    if (norm == 0) return 0;
    if (!isfinite(norm)) return __int_as_float(0x7fc00000);
    const int e = exponent(norm);
    return static_cast<float>(1 / (fmax(norm * power(-e), eps) * margin) * power(-e));
}

// Each block of a matrix adds all its partial sums, which is less than it costs to wait for another one, and rescales
// its share of the tiles: seldom any.
__global__ __launch_bounds__(THREADS) void norm_kernel(const __grid_constant__ NormArguments u) {
    __shared__ double scratch[3][WARPS];
    const int matrix = blockIdx.x / u.shares, share = blockIdx.x % u.shares;
    const double* partial = u.partial + static_cast<int64_t>(matrix) * u.tiles;
    double sum = 0, smallest = INFINITY, largest = 0;
    for (int i = threadIdx.x; i < u.tiles; i += THREADS) {
        sum += partial[i];
        largest = larger(partial[i], largest);
        if (partial[i] != 0) smallest = smaller(partial[i], smallest);
    }
    sum = block_reduce(sum, add, scratch[0]);
    largest = block_reduce(largest, larger, scratch[1]);
    smallest = block_reduce(smallest, smaller, scratch[2]);

    const bool sound = isfinite(sum) && sum != 0;
    int whole = tile_power(largest, u.half);
    if (sound && !u.half && (sum < 0x1p-60 || sum > 0x1p60)) whole = -exponent(sqrt(sum));
    if (share == 0 && threadIdx.x == 0) {
        if (u.norm) u.norm[matrix] = sqrt(sum);
        u.scale[matrix] = reciprocal_norm(sound ? sum * power(whole) * power(whole) : sum, u.eps, u.margin);
    }
    if (!sound || (tile_power(smallest, u.half) == whole && tile_power(largest, u.half) == whole)) return;

    for (int t = share; t < u.tiles; t += u.shares) {
        const int e = whole - tile_power(partial[t], u.half);
        if (e == 0 || partial[t] == 0) continue;
        const PowerOfTwo factor(e);
        const Tile tile = tile_of(u.x, matrix, t);
        for (int i = threadIdx.x; i < TILE * TILE; i += THREADS) {
            const int row = i / TILE, col = i % TILE;
            if (row >= tile.rows || col >= tile.cols) continue;
            uint16_t* x = x_at(u.x, tile, row, col);
            *x = static_cast<uint16_t>(pack(factor(unpack(*x, u.half).x), 0, u.half));
        }
    }
}

}  // namespace

int64_t momentum_capacity() { return Runs<2>::CAPACITY; }

int64_t momentum_partials(const MomentumUpdate& args) { return args.x.batch * tiles(args.x); }

Result momentum_update(const MomentumUpdate& args, DType dtype, double* partial, Stream stream) {
    if (dtype == DType::f32 || !fits(args.x) || (args.x.batch && !args.grad)) return kInvalidArgument;
    const Result device = supported();
    if (device.status != Status::ok || !args.x.batch) return device;
    const auto on = static_cast<cudaStream_t>(stream);
    const bool half = dtype == DType::f16;
    const int64_t per_matrix = tiles(args.x);

    MomentumArguments u;
    u.grad_scale = args.grad_scale;
    // torch.lerp's two branches where dampened, so that a momentum buffer equals torch.optim.Muon's to the bit.
    const auto mu = static_cast<float>(args.mu), rest = static_cast<float>(1.0 - args.mu);
    u.momentum = u.direction = {mu, false, false};
    if (args.dampened) {
        u.momentum = rest < 0.5f ? Blend{-rest, true, true} : Blend{1.0f - rest, true, false};
        u.direction = mu < 0.5f ? Blend{mu, true, false} : Blend{mu - 1.0f, true, true};
    }
    u.nesterov = args.nesterov;
    u.has_momentum = args.momentum != nullptr;
    u.half = half;
    u.tiles = static_cast<int>(per_matrix);
    u.x_aligned = aligned(args.x);

    const Result pass = with_type(args.grad_dtype, [&](auto grad) {
        return with_type(args.momentum ? args.momentum_dtype : args.grad_dtype, [&](auto momentum) {
            using Grad = decltype(grad);
            using Momentum = decltype(momentum);
            const Operands<2> operands = {
                {args.grad, args.momentum}, {sizeof(Grad), sizeof(Momentum)}, nullptr, nullptr, VECTOR<Grad, Momentum>
            };
            return for_each_launch(args.x, operands, [&](int64_t first, int64_t count, const auto& runs) {
                u.x = args.x;
                u.x.data += first * args.x.batch_stride;
                u.partial = partial + first * per_matrix;
                constexpr int BYTES = std::decay_t<decltype(runs)>::ARGUMENT_BYTES;
                auto* kernel = known<momentum_kernel<Grad, Momentum, BYTES>>();
                kernel<<<static_cast<unsigned>(count * per_matrix), THREADS, 0, on>>>(u, runs);
                return launched();
            });
        });
    });
    if (pass.status != Status::ok) return pass;

    NormArguments n = {args.x, partial, args.scale, args.norm, args.eps, args.margin, static_cast<int>(per_matrix),
                       1,      half};
    n.shares = static_cast<int>(std::clamp<int64_t>(per_matrix / 64, 1, 64));
    const int64_t most = INT_MAX / n.shares;
    for (int64_t first = 0; first < args.x.batch; first += most) {
        const int64_t count = std::min(most, args.x.batch - first);
        known<norm_kernel>()<<<static_cast<unsigned>(count * n.shares), THREADS, 0, on>>>(n);
        const Result result = launched();
        if (result.status != Status::ok) return result;
        n.x.data += count * args.x.batch_stride;
        n.partial += count * per_matrix;
        n.scale += count;
        if (n.norm) n.norm += count;
    }
    return kOk;
}

}  // namespace muon_kernels::cuda
