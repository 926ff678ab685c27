// One pass over the parameters of all matrices of a bucket.
#include "elementwise.cuh"

namespace muon_kernels::cuda {
namespace {

struct ApplyArguments {
    Stack x;
    double lr;
    double weight_decay;
    ApplyOptions options;
    int64_t first;  // matrix of the launch in the bucket
    bool half;      // x is f16
    bool x_vector;  // see vectors()
    Runs<1> runs;
};
static_assert(sizeof(ApplyArguments) <= kArgumentBytes, "a kernel's arguments");

// SplitMix64's output function (Steele, Lea, Flood 2014).
__device__ uint64_t mixed(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

// Sixteen random bits for every element, that depend on nothing else: a 2 x 2 block has 64 of SplitMix64's stream, so
// that a number is used up whichever way a thread walks.
struct RandomBits {
    uint64_t state;  // of the matrix
    int64_t blocks;  // in two rows

    __device__ RandomBits(const ApplyArguments& u, int matrix)
        : blocks((u.x.cols + 1) / 2) {
        const uint64_t before = static_cast<uint64_t>(u.first + matrix) * ((u.x.rows + 1) / 2) * blocks;
        state = mixed(u.options.seed) + before * STEP;
    }
    __device__ uint64_t block(int row, int col) const { return mixed(state + (row / 2 * blocks + col / 2 + 1) * STEP); }
    __device__ static uint32_t of(uint64_t block, int row, int col) { return block >> (32 * (row % 2) + 16 * (col % 2)) & 0xffff; }

    static constexpr uint64_t STEP = 0x9e3779b97f4a7c15u;
};

// Up with the probability that makes the mean exact: values that bf16 has stay, as do infinity and NaN.
__device__ __nv_bfloat16 rounded_by(float value, uint32_t random) {
    if (isnan(value)) return __float2bfloat16_rn(value);
    return __ushort_as_bfloat16(static_cast<unsigned short>((__float_as_uint(value) + random) >> 16));
}

template <class Param, int V>
__device__ void apply_tile(const ApplyArguments& u, const Run<1>& run, const Tile& tile, Staged& staged) {
    const Slice<V> slice(tile, run.along_rows);
    const int index = tile.matrix - run.begin;
    constexpr int LINES = Slice<V>::LINES;
    const auto at = [&](int l) {
        return address<Param, V>(run.place[0], tile, run.along_rows, index, slice.line[l], slice.along);
    };
    float param[LINES][V], x[LINES][V];
#pragma unroll
    for (int l = 0; l < LINES; ++l) load(at(l), slice.count[l], param[l]);
    if (run.along_rows) {
#pragma unroll
        for (int l = 0; l < LINES; ++l) {
            uint32_t words[(V + 1) / 2];
            load_x(x_at(u.x, tile, slice.line[l], slice.along), slice.count[l], u.x_vector, words);
#pragma unroll
            for (int v = 0; v < V; ++v) {
                const float2 pair = unpack(words[v / 2], u.half);
                x[l][v] = v % 2 ? pair.y : pair.x;
            }
        }
    } else {
        staged.read_from(u.x, tile, u.x_vector);
        __syncthreads();
#pragma unroll
        for (int l = 0; l < LINES; l += 2) {
#pragma unroll
            for (int v = 0; v < V; ++v) {
                const float2 pair = unpack(staged.at(slice.along + v, slice.line[l] / 2), u.half);
                x[l][v] = pair.x;
                x[l + 1][v] = pair.y;
            }
        }
    }
    const double lr = u.options.lr ? *u.options.lr : u.lr;
    const double weight_decay = u.options.weight_decay ? *u.options.weight_decay : u.weight_decay;
    const float decay = static_cast<float>(1 - lr * weight_decay), step_size = static_cast<float>(lr * run.ratio);
    const RandomBits random(u, tile.matrix);
#pragma unroll
    for (int l = 0; l < LINES; l += 2) {
        Param stored[2][V];
        uint64_t bits = 0;
#pragma unroll
        for (int v = 0; v < V; ++v) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float old = param[l + i][v], update = x[l + i][v];
                // The sign alone: the product of two small numbers would be a zero.
                const bool decays = !u.options.cautious || update * copysignf(1.0f, old) >= 0;
                const float value = fmaf(-step_size, update, decays ? __fmul_rn(old, decay) : old);
                stored[i][v] = rounded<Param>(value);
                if constexpr (std::is_same_v<Param, __nv_bfloat16>) {
                    if (u.options.stochastic_rounding) {
                        const int line = slice.line[l + i], along = slice.along + v;
                        const int row = tile.row + (run.along_rows ? line : along);
                        const int col = tile.col + (run.along_rows ? along : line);
                        if (i == 0 && (V == 1 || v % 2 == 0)) bits = random.block(row, col);
                        stored[i][v] = rounded_by(value, RandomBits::of(bits, row, col));
                    }
                }
            }
        }
        store(at(l), slice.count[l], stored[0]);
        store(at(l + 1), slice.count[l + 1], stored[1]);
    }
}

template <class Param>
__global__ __launch_bounds__(THREADS, BLOCKS_PER_SM) void apply_kernel(const __grid_constant__ ApplyArguments u) {
    __shared__ Staged staged;
    const Tile tile = tile_of_block(u.x);
    const Run<1>& run = run_of(u.runs, tile.matrix);
    if (run.vector) {
        apply_tile<Param, VECTOR<Param>>(u, run, tile, staged);
    } else {
        apply_tile<Param, 1>(u, run, tile, staged);
    }
}

}  // namespace

Result apply_update(const ApplyUpdate& args, const ApplyOptions& options, DType dtype, Stream stream) {
    if (dtype == DType::f32 || (args.x.batch && !(args.param && args.ratio))) return kInvalidArgument;
    if (options.stochastic_rounding && args.param_dtype == DType::f16) return kInvalidArgument;
    const Result device = supported();
    if (device.status != Status::ok || !args.x.batch) return device;
    const int64_t per_matrix = tiles(args.x);
    if (per_matrix > INT_MAX) return kInvalidArgument;

    ApplyArguments u;
    u.lr = args.lr;
    u.weight_decay = args.weight_decay;
    u.options = options;
    u.half = dtype == DType::f16;
    u.x_vector = vectors(args.x);
    return with_type(args.param_dtype, [&](auto param) {
        using Param = decltype(param);
        const Operands<1> operands = {{args.param}, {sizeof(Param)}, args.ratio, VECTOR<Param>};
        return for_each_launch(args.x, operands, u.runs, [&](int64_t first, int64_t count) {
            u.x = args.x;
            u.x.data += first * args.x.batch_stride;
            u.first = first;
            const auto blocks = static_cast<unsigned>(count * per_matrix);
            apply_kernel<Param><<<blocks, THREADS, 0, static_cast<cudaStream_t>(stream)>>>(u);
            return launched();
        });
    });
}

}  // namespace muon_kernels::cuda
