// One pass over the parameters of all matrices of a bucket.
#include "elementwise.cuh"

namespace muon_kernels::cuda {
namespace {

struct ApplyArguments {
    Stack x;
    double lr;
    double weight_decay;
    ApplyOptions options;
    int tiles;  // of a matrix
    bool half;  // x is f16
    bool x_aligned;
};

// SplitMix64's output function (Steele, Lea, Flood 2014).
__device__ uint64_t mixed(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

// The random bits of stochastic rounding, see ApplyOptions. A thread, whichever way it walks, has all elements of 2 x 2
// blocks of x.
struct RandomBits {
    static constexpr uint64_t STEP = 0x9e3779b97f4a7c15u;
    uint64_t state;          // of the block that has x's first element
    uint64_t row_of_blocks;  // what a row of blocks adds to it
    int top, left;           // x's first element in its block: 0 or 1
    bool turned;

    // The products of 64 bits are worked out here: an element's place takes 32 bits, for want of registers.
    __device__ RandomBits(const ApplyArguments& u, uint32_t number) {
        const Window& window = u.options.window;
        const uint64_t blocks = ((window.cols ? window.cols : u.x.cols) + 1) / 2;
        state = mixed(u.options.seed + number) + (window.top / 2 * blocks + window.left / 2 + 1) * STEP;
        row_of_blocks = blocks * STEP;
        top = window.top % 2;
        left = window.left % 2;
        turned = window.turned;
    }

    // Whether x begins with a block.
    __device__ bool even() const { return !(top | left); }
    // An element's place, counted from the block that has x's first element.
    __device__ uint32_t row_of(int row, int col) const { return top + (turned ? col : row); }
    __device__ uint32_t col_of(int row, int col) const { return left + (turned ? row : col); }
    // The bits of the block that has an element of x, and the element's among them.
    __device__ uint64_t block(int row, int col) const {
        return mixed(state + row_of(row, col) / 2 * row_of_blocks + col_of(row, col) / 2 * STEP);
    }
    __device__ uint32_t of(uint64_t block, int row, int col) const {
        return block >> (32 * (row_of(row, col) % 2) + 16 * (col_of(row, col) % 2)) & 0xffff;
    }
};

// Up with the probability that makes the mean exact: values that bf16 has stay, as do infinity and NaN.
__device__ __nv_bfloat16 rounded_by(float value, uint32_t random) {
    if (isnan(value)) return __float2bfloat16_rn(value);
    return __ushort_as_bfloat16(static_cast<unsigned short>((__float_as_uint(value) + random) >> 16));
}

// What is the same for all elements of a matrix.
struct Coefficients {
    float decay, step_size;

    __device__ Coefficients(const ApplyArguments& u, double ratio) {
        const double lr = u.options.lr ? *u.options.lr : u.lr;
        const double weight_decay = u.options.weight_decay ? *u.options.weight_decay : u.weight_decay;
        decay = static_cast<float>(1 - lr * weight_decay);
        step_size = static_cast<float>(lr * ratio);
    }
    __device__ float operator()(float param, float update, bool cautious) const {
        // The sign alone: the product of two small numbers would be a zero.
        const bool decays = !cautious || update * copysignf(1.0f, param) >= 0;
        return fmaf(-step_size, update, decays ? __fmul_rn(param, decay) : param);
    }
};

template <class Param, bool STOCHASTIC, int V>
__device__ void apply_tile(const ApplyArguments& u, const Run<1>& run, const Tile& tile, Staged& staged) {
    if (!run.along_rows) {
        staged.read_from(u.x, tile, u.x_aligned);
        __syncthreads();
    }
    const Coefficients coefficients(u, run.ratio);
    const RandomBits random(u, run.number + (tile.matrix - run.begin));
    constexpr int LINES = AT_ONCE<V>;
#pragma unroll 1
    for (int begin = 0; begin < PER_THREAD / V; begin += LINES) {
        const Slice<V, LINES> slice(tile, run.along_rows, begin);
        const Lines<Param, V> params(run, 0, tile, slice);
        Param param[LINES][V] = {};
        float x[LINES][V] = {};
#pragma unroll
        for (int l = 0; l < LINES; ++l) {
            if (slice.has(l)) load(params[l], param[l]);
        }
#pragma unroll
        for (int l = 0; l < LINES; ++l) {
            if (run.along_rows) {
                if (slice.has(l)) load_x(x_at(u.x, tile, slice.row(l, 0), slice.along), u.half, x[l]);
                continue;
            }
#pragma unroll
            for (int v = 0; v < V; ++v) {
                const float2 pair = unpack(staged.at(slice.row(l, v), slice.col(l, v) / 2), u.half);
                x[l][v] = l % 2 ? pair.y : pair.x;
            }
        }
        // Lines come in pairs and vectors begin at even places: one after the other, the blocks of 2 x 2 elements.
#pragma unroll
        for (int i = 0; i < LINES * V; i += V == 1 ? 2 : 4) {
            uint64_t bits = 0;
#pragma unroll
            for (int j = 0; j < (V == 1 ? 2 : 4); ++j) {
                const int l = i / (2 * V) * 2 + j % 2, v = i % (2 * V) / 2 + j / 2;
                const float value = coefficients(static_cast<float>(param[l][v]), x[l][v], u.options.cautious);
                if constexpr (STOCHASTIC) {
                    const int row = tile.row + slice.row(l, v), col = tile.col + slice.col(l, v);
                    if (!random.even() || j == 0) bits = random.block(row, col);
                    param[l][v] = rounded_by(value, random.of(bits, row, col));
                } else {
                    param[l][v] = rounded<Param>(value);
                }
            }
        }
#pragma unroll
        for (int l = 0; l < LINES; ++l) {
            if (slice.has(l)) store(params[l], param[l]);
        }
    }
}

template <class Param, bool STOCHASTIC, int BYTES>
__global__ __launch_bounds__(THREADS, BLOCKS_PER_SM) void apply_kernel(
    const __grid_constant__ ApplyArguments u, const __grid_constant__ Runs<1, BYTES> runs
) {
    static_assert(sizeof(u) + sizeof(runs) <= BYTES, "a kernel's arguments");
    __shared__ Staged staged;
    const Run<1>* run;
    const Tile tile = tile_of_block(u.x, u.tiles, runs, run);
    if (run->vector) {
        apply_tile<Param, STOCHASTIC, VECTOR<Param>>(u, *run, tile, staged);
    } else {
        apply_tile<Param, STOCHASTIC, 1>(u, *run, tile, staged);
    }
}

}  // namespace

int64_t apply_capacity() { return Runs<1>::CAPACITY; }

Result apply_update(const ApplyUpdate& args, const ApplyOptions& options, DType dtype, Stream stream) {
    if (dtype == DType::f32 || !fits(args.x) || (args.x.batch && !(args.param && args.ratio))) return kInvalidArgument;
    if (options.stochastic_rounding && args.param_dtype == DType::f16) return kInvalidArgument;
    const Result device = supported();
    if (device.status != Status::ok || !args.x.batch) return device;
    const int64_t per_matrix = tiles(args.x);

    ApplyArguments u;
    u.lr = args.lr;
    u.weight_decay = args.weight_decay;
    u.options = options;
    u.half = dtype == DType::f16;
    u.tiles = static_cast<int>(per_matrix);
    u.x_aligned = aligned(args.x);
    return with_type(args.param_dtype, [&](auto param) {
        using Param = decltype(param);
        const Operands<1> operands = {{args.param}, {sizeof(Param)}, args.ratio, options.number, VECTOR<Param>};
        return for_each_launch(args.x, operands, [&](int64_t first, int64_t count, const auto& runs) {
            constexpr int BYTES = std::decay_t<decltype(runs)>::ARGUMENT_BYTES;
            auto* kernel = known<apply_kernel<Param, false, BYTES>>();
            if constexpr (std::is_same_v<Param, __nv_bfloat16>) {
                if (options.stochastic_rounding) kernel = known<apply_kernel<Param, true, BYTES>>();
            }
            u.x = args.x;
            u.x.data += first * args.x.batch_stride;
            const auto blocks = static_cast<unsigned>(count * per_matrix);
            kernel<<<blocks, THREADS, 0, static_cast<cudaStream_t>(stream)>>>(u, runs);
            return launched();
        });
    });
}

}  // namespace muon_kernels::cuda
