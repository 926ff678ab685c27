// The batched product on tensor cores, for compute capability 8.0 and up: cp.async brings tiles to shared memory,
// ldmatrix takes them to registers, mma.sync multiplies.
//
// A block computes one tile of one matrix, in steps that share a ring of NUM_STAGES stages: first BLOCK_K columns of a
// and rows of b a step, then, in the same ring, the tiles of the matrices that are added to the product, so that the
// last ones travel while the product still computes. The sum of an element is taken in the same order whatever the
// tile, so its bits depend on neither batch nor table.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../muon_kernels.h"
#include "product.cuh"
#include "product.h"

namespace muon_kernels::cuda {
namespace {

// See Added.
struct Addend {
    const uint16_t* data;
    int64_t batch_stride;
    int64_t row_stride;
    float factor;
    const float *row, *col;
    int width;  // see Operand
};

struct Operand {
    const uint16_t* data;
    int64_t batch_stride;
    int64_t row_stride;
    int width;  // bytes that every copy of eight elements can be cut into: 16, 8, 4 or 2
};

struct Arguments {
    Operand a, b;
    Addend addends[3];
    int addend_count;
    uint16_t* out;
    int64_t out_batch_stride;
    int64_t out_row_stride;
    int out_width;
    int m, n, k;
    int tiles_m;
    unsigned tiles;  // of a matrix
    bool symmetric;
    const float *a_diagonal, *b_diagonal, *c_diagonal;
    float* out_diagonal;
    float alpha, beta, gamma;
    const float* scale;
};

// Warps share a tile in a grid of WARPS_M x WARPS_N. RESIDENT is how many blocks a multiprocessor is to hold: it caps
// the registers.
template <int BLOCK_M_, int BLOCK_N_, int BLOCK_K_, int NUM_STAGES_, int WARPS_M, int WARPS_N_, int RESIDENT_>
struct Tile {
    static constexpr int BLOCK_M = BLOCK_M_, BLOCK_N = BLOCK_N_, BLOCK_K = BLOCK_K_, NUM_STAGES = NUM_STAGES_;
    static constexpr int WARP_M = BLOCK_M / WARPS_M, WARP_N = BLOCK_N / WARPS_N_, WARPS_N = WARPS_N_;
    static constexpr int WARPS = WARPS_M * WARPS_N, THREADS = 32 * WARPS, RESIDENT = RESIDENT_;
    static constexpr int STAGE_BYTES = 2 * (BLOCK_M + BLOCK_N) * BLOCK_K;
    // A stage holds a whole tile of an addend, or the rows of one row of warps.
    static constexpr int ADDEND_M = 2 * BLOCK_M * BLOCK_N <= STAGE_BYTES ? BLOCK_M : WARP_M;
    static constexpr int ADDEND_STEPS = BLOCK_M / ADDEND_M;
    static constexpr int SHARED_BYTES = std::max(NUM_STAGES * STAGE_BYTES, 2 * BLOCK_M * BLOCK_N);
    static_assert(2 * ADDEND_M * BLOCK_N <= STAGE_BYTES && WARP_M % 16 == 0 && WARP_N % 16 == 0);
};

template <DType DTYPE>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (DTYPE == DType::bf16) {
        mma_m16n8k16_bf16(c, a, b0, b1);
    } else {
        mma_m16n8k16_f16(c, a, b0, b1);
    }
}

// Where the eight elements from 8 * chunk on of a row lie in a tile of COLS columns. Any eight neighbouring rows of one
// chunk, what ldmatrix takes at a time, lie in different banks, and so do neighbouring chunks of a row. Eight rows
// further the same follows: 16 * COLS bytes more; and chunk ^ c is 16 * c bytes xor.
template <int COLS>
__device__ __forceinline__ uint32_t operand_offset(unsigned row, unsigned chunk) {
    static_assert(COLS == 32 || COLS % 64 == 0);
    return row * COLS * 2 + (chunk ^ (COLS == 32 ? row / 2 % 4 : row % 8)) * 16;
}

// The same for the result. There rows 2q and 2q + 1 of every eight in 32 are in different banks as well: the mirrored
// stores take those at a time.
template <int COLS>
__device__ __forceinline__ uint32_t result_offset(unsigned row, unsigned chunk) {
    return row * COLS * 2 + (chunk ^ row % 8 ^ row / 8 % 4 * 2) * 16;
}

__device__ __forceinline__ int clamp(int value, int most) { return min(max(value, 0), most); }

// The first `valid` of eight elements to shared memory, and zeros behind them.
__device__ __forceinline__ void copy_narrow(uint32_t to, const uint16_t* from, int valid, int width) {
    if (width == 8) {
        for (int e = 0; e < 8; e += 4) cp_async_8(to + 2 * e, from + e, 2 * clamp(valid - e, 4));
    } else if (width == 4) {
        for (int e = 0; e < 8; e += 2) cp_async_4(to + 2 * e, from + e, 2 * clamp(valid - e, 2));
    } else {  // no asynchronous copy is that narrow
        uint32_t words[4] = {};
        for (int e = 0; e < 8; ++e) {
            if (e < valid) words[e / 2] |= static_cast<uint32_t>(from[e]) << e % 2 * 16;
        }
        st_shared_v4(to, words);
    }
}

template <bool ALIGNED>
__device__ __forceinline__ void copy_chunk(uint32_t to, const uint16_t* from, int valid, int width) {
    if (ALIGNED || width == 16) {
        cp_async_16(to, from, 2 * valid);
    } else {
        copy_narrow(to, from, valid, width);
    }
}

// How threads share the copy of a tile: each takes the same chunk of every ROW_STEP-th row.
template <int ROWS, int COLS, int THREADS>
struct Share {
    static constexpr unsigned CHUNKS = COLS / 8, ROW_STEP = THREADS / CHUNKS, COUNT = ROWS / ROW_STEP;
    static_assert(THREADS % CHUNKS == 0 && ROWS % ROW_STEP == 0 && ROW_STEP % 8 == 0);  // 8: see operand_offset
    static __device__ __forceinline__ unsigned chunk() { return threadIdx.x % CHUNKS; }
    static __device__ __forceinline__ unsigned row(unsigned i) { return threadIdx.x / CHUNKS + i * ROW_STEP; }
};

// ROWS x COLS elements to a tile of shared memory; what is beyond `rows` and `cols` becomes zero.
template <int ROWS, int COLS, int THREADS, bool ALIGNED>
__device__ __forceinline__ void copy_tile(
    uint32_t to, const uint16_t* from, int64_t row_stride, int rows, int cols, int width
) {
    using S = Share<ROWS, COLS, THREADS>;
    const int chunk = S::chunk(), in_row = clamp(cols - chunk * 8, 8);
#pragma unroll 1
    for (unsigned i = 0; i < S::COUNT; ++i) {
        const int row = S::row(i), valid = row < rows ? in_row : 0;
        copy_chunk<ALIGNED>(to + operand_offset<COLS>(row, chunk), from + row * row_stride + chunk * 8, valid, width);
    }
}

// Copies one tile of an operand after another. A thread keeps its addresses in the first one: to compute them again
// would cost more instructions than the tensor cores leave time for.
template <int ROWS, int COLS, int THREADS, bool ALIGNED>
class OperandCopy {
    using S = Share<ROWS, COLS, THREADS>;
    const uint16_t *tile_, *from_[S::COUNT];
    int64_t row_stride_;
    int rows_, width_;

  public:
    // Rows from `rows` on repeat the last one: they only make elements that are not stored.
    __device__ __forceinline__ OperandCopy(const uint16_t* tile, int64_t row_stride, int rows, int width)
        : tile_(tile), row_stride_(row_stride), rows_(rows), width_(width) {
#pragma unroll
        for (unsigned i = 0; i < S::COUNT; ++i) {
            from_[i] = tile + min(static_cast<int>(S::row(i)), rows - 1) * row_stride + S::chunk() * 8;
        }
    }

    // The tile `offset` elements further on, of which there are `rows` and `cols`.
    __device__ __forceinline__ void operator()(uint32_t to, int64_t offset, int rows, int cols) const {
        if (ALIGNED && rows >= ROWS && cols >= COLS) {
#pragma unroll
            for (unsigned i = 0; i < S::COUNT; ++i) {
                const uint32_t at = to + operand_offset<COLS>(S::row(0), S::chunk()) + i * S::ROW_STEP * COLS * 2;
                cp_async_16(at, from_[i] + offset, 16);
            }
        } else {
            copy_tile<ROWS, COLS, THREADS, ALIGNED>(to, tile_ + offset, row_stride_, min(rows, rows_), cols, width_);
        }
    }
};

// The first `valid` of eight elements of a row to global memory.
template <bool ALIGNED>
__device__ __forceinline__ void store(uint16_t* to, const uint32_t (&words)[4], int valid, int width) {
    if ((ALIGNED || width == 16) && valid == 8) {
        *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
        return;
    }
    uint64_t low = words[0] | static_cast<uint64_t>(words[1]) << 32;
    const uint64_t high = words[2] | static_cast<uint64_t>(words[3]) << 32;
#pragma unroll 1
    for (int e = 0; e < valid; ++e) {
        to[e] = static_cast<uint16_t>(low);
        low = e == 3 ? high : low >> 16;
    }
}

// ALIGNED: all matrices can be copied and stored 16 bytes at a time.
template <DType DTYPE, class T, bool B_TRANSPOSED, bool ALIGNED>
__global__ void __launch_bounds__(T::THREADS, T::RESIDENT) product(const __grid_constant__ Arguments p) {
    constexpr int BLOCK_M = T::BLOCK_M, BLOCK_N = T::BLOCK_N, BLOCK_K = T::BLOCK_K, NUM_STAGES = T::NUM_STAGES;
    constexpr int THREADS = T::THREADS, MMAS_M = T::WARP_M / 16, MMAS_N = T::WARP_N / 8;
    extern __shared__ __align__(128) uint8_t memory[];
    const uint32_t shared = shared_address(memory);
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const unsigned warp_row = warp / T::WARPS_N * T::WARP_M, warp_col = warp % T::WARPS_N * T::WARP_N;

    const int64_t matrix = blockIdx.x / p.tiles;
    int tile_m, tile_n;
    if (p.symmetric) {
        triangular_index(blockIdx.x % p.tiles, tile_m, tile_n);
    } else {  // down the columns, which are short where a result is wide: blocks at work share more operands
        tile_m = blockIdx.x % p.tiles % p.tiles_m;
        tile_n = blockIdx.x % p.tiles / p.tiles_m;
    }
    const int row0 = tile_m * BLOCK_M, col0 = tile_n * BLOCK_N;  // of the tile
    const int rows = min(p.m - row0, BLOCK_M), cols = min(p.n - col0, BLOCK_N);
    const uint16_t* a = p.a.data + matrix * p.a.batch_stride + row0 * p.a.row_stride;
    const uint16_t* b = p.b.data + matrix * p.b.batch_stride + (B_TRANSPOSED ? col0 * p.b.row_stride : col0);

    const int k_steps = (p.k + BLOCK_K - 1) / BLOCK_K, steps = k_steps + p.addend_count * T::ADDEND_STEPS;
    const auto stage_of = [&](int step) { return shared + step % NUM_STAGES * T::STAGE_BYTES; };
    const OperandCopy<BLOCK_M, BLOCK_K, THREADS, ALIGNED> copy_a(a, p.a.row_stride, rows, p.a.width);
    constexpr int ROWS_B = B_TRANSPOSED ? BLOCK_N : BLOCK_K, COLS_B = B_TRANSPOSED ? BLOCK_K : BLOCK_N;
    const OperandCopy<ROWS_B, COLS_B, THREADS, ALIGNED> copy_b(
        b, p.b.row_stride, B_TRANSPOSED ? cols : BLOCK_K, p.b.width
    );
    const auto load = [&](int step) {
        const uint32_t stage = stage_of(step);
        if (step < k_steps) {
            const int k0 = step * BLOCK_K;
            copy_a(stage, k0, BLOCK_M, p.k - k0);
            if constexpr (B_TRANSPOSED) {
                copy_b(stage + 2 * BLOCK_M * BLOCK_K, k0, BLOCK_N, p.k - k0);
            } else {
                copy_b(stage + 2 * BLOCK_M * BLOCK_K, k0 * p.b.row_stride, p.k - k0, cols);
            }
        } else if (step < steps) {
            const Addend& c = p.addends[(step - k_steps) / T::ADDEND_STEPS];
            const int first = (step - k_steps) % T::ADDEND_STEPS * T::ADDEND_M;
            const uint16_t* from = c.data + matrix * c.batch_stride + (row0 + first) * c.row_stride + col0;
            copy_tile<T::ADDEND_M, BLOCK_N, THREADS, ALIGNED>(stage, from, c.row_stride, rows - first, cols, c.width);
        }
        cp_async_commit();  // of nothing at the end: the count of groups stays that of steps
    };
    // The stage of `step` is there for all threads, and nobody reads the one before it any more: it is filled again.
    const auto arrive = [&](int step) {
        cp_async_wait<NUM_STAGES - 2>();
        __syncthreads();
        load(step + NUM_STAGES - 1);
    };

    // Of this lane's row of the first fragments.
    const uint32_t lane_a = operand_offset<BLOCK_K>(warp_row + lane % 16, lane / 16);
    const uint32_t lane_b = 2 * BLOCK_M * BLOCK_K +
                            (B_TRANSPOSED ? operand_offset<BLOCK_K>(warp_col + lane / 16 * 8 + lane % 8, lane / 8 % 2)
                                          : operand_offset<BLOCK_N>(lane % 16, warp_col / 8 + lane / 16));
    float acc[MMAS_M][MMAS_N][4] = {};
    for (int step = 0; step < NUM_STAGES - 1; ++step) load(step);
    for (int step = 0; step < k_steps; ++step) {
        arrive(step);
        const uint32_t stage = stage_of(step);
#pragma unroll
        for (int k = 0; k < BLOCK_K; k += 16) {
            uint32_t fragments_a[MMAS_M][4], fragments_b[MMAS_N / 2][4];
#pragma unroll
            for (int i = 0; i < MMAS_M; ++i)
                ldmatrix_x4(fragments_a[i], stage + (lane_a ^ k * 2) + i * 16 * BLOCK_K * 2);
#pragma unroll
            for (int j = 0; j < MMAS_N / 2; ++j) {
                if constexpr (B_TRANSPOSED) {
                    ldmatrix_x4(fragments_b[j], stage + (lane_b ^ k * 2) + j * 16 * BLOCK_K * 2);
                } else {
                    ldmatrix_x4_trans(fragments_b[j], stage + (lane_b ^ j * 32) + k * BLOCK_N * 2);
                }
            }
#pragma unroll
            for (int i = 0; i < MMAS_M; ++i) {
#pragma unroll
                for (int j = 0; j < MMAS_N; ++j) {
                    const uint32_t* fragment_b = fragments_b[j / 2] + j % 2 * 2;
                    mma<DTYPE>(acc[i][j], fragments_a[i], fragment_b[0], fragment_b[1]);
                }
            }
        }
    }

    // From here on a thread has elements (row_of(i, h), col_of(j) + e) of the tile in acc[i][j][2h + e].
    const auto row_of = [&](int i, int h) { return warp_row + i * 16 + h * 8 + lane / 4; };
    const auto col_of = [&](int j) { return warp_col + j * 8 + lane % 4 * 2; };
    const float once = p.scale ? p.scale[matrix] : 1.0f, scale = B_TRANSPOSED ? once * once : once;
    const float alpha = p.alpha * scale;
    const int64_t vector_m = matrix * p.m + row0, vector_n = matrix * p.n + col0;  // of the diagonals
#pragma unroll
    for (int i = 0; i < MMAS_M; ++i) {
#pragma unroll
        for (int j = 0; j < MMAS_N; ++j) {
            for (float& value : acc[i][j]) value *= alpha;
        }
    }
    for (int step = k_steps; step < steps; ++step) {
        arrive(step);
        const uint32_t stage = stage_of(step);
        const Addend& c = p.addends[(step - k_steps) / T::ADDEND_STEPS];
        const int first = (step - k_steps) % T::ADDEND_STEPS * T::ADDEND_M;
        if (static_cast<int>(warp_row / T::ADDEND_M * T::ADDEND_M) != first) continue;  // rows of other warps
        const uint32_t from = stage + operand_offset<BLOCK_N>(warp_row - first + lane % 16, warp_col / 8 + lane / 16);
        float of_row[MMAS_M][2];
#pragma unroll
        for (int i = 0; i < MMAS_M; ++i) {
            for (int h = 0; h < 2; ++h) {
                const int row = row_of(i, h);
                of_row[i][h] = c.factor * scale + (c.row && row < rows ? alpha * c.row[vector_m + row] : 0.0f);
            }
        }
#pragma unroll
        for (int j = 0; j < MMAS_N; j += 2) {
            float of_col[2][2];
            for (int e = 0; e < 4; ++e) {
                const int col = col_of(j + e / 2) + e % 2;
                of_col[e / 2][e % 2] = c.col && col < cols ? alpha * c.col[vector_n + col] : 0.0f;
            }
#pragma unroll
            for (int i = 0; i < MMAS_M; ++i) {
                uint32_t pairs[4];  // in the order of acc[i][j] and acc[i][j + 1]
                ldmatrix_x4(pairs, (from ^ j * 16) + i * 16 * BLOCK_N * 2);
                for (int e = 0; e < 8; ++e) {
                    const float factor = of_row[i][e / 2 % 2] + of_col[e / 4][e % 2];
                    float& value = acc[i][j + e / 4][e % 4];
                    value = fmaf(factor, widen<DTYPE>(pairs[e / 2], e % 2), value);
                }
            }
        }
    }

    if (row0 < col0 + BLOCK_N && col0 < row0 + BLOCK_M) {  // what only elements on the diagonal get
#pragma unroll
        for (int i = 0; i < MMAS_M; ++i) {
            for (int h = 0; h < 2; ++h) {
                const int row = row_of(i, h), nth = row0 + row - col0 - col_of(0);  // element 8j + e of this thread's
                if (row >= rows || nth < 0 || nth >= T::WARP_N || nth % 8 > 1) continue;
                const int64_t at = vector_m + row;
                float more = p.gamma * scale, value = 0.0f;
                if (p.a_diagonal && p.b_diagonal) more += alpha * p.a_diagonal[at] * p.b_diagonal[at];
                if (p.c_diagonal) more += p.beta * scale * p.c_diagonal[at];
#pragma unroll
                for (int e = 0; e < 2 * MMAS_N; ++e)
                    value = nth == e / 2 * 8 + e % 2 ? acc[i][e / 2][2 * h + e % 2] : value;
                value += more;
#pragma unroll
                for (int e = 0; e < 2 * MMAS_N; ++e) {
                    float& element = acc[i][e / 2][2 * h + e % 2];
                    element = nth == e / 2 * 8 + e % 2 ? value : element;
                }
                if (p.out_diagonal) p.out_diagonal[at] = value - widen<DTYPE>(round_pair<DTYPE>(value, 0.0f), 0);
            }
        }
    }

    // The result goes through shared memory: whole rows of it, and of its mirror image, leave in 16-byte stores. A tile
    // on the diagonal is its own mirror image: blocks of 8x8 below the diagonal leave twice, those above it not at all.
    __syncthreads();  // the last stages are still read
    const uint32_t first = shared + result_offset<BLOCK_N>(warp_row + lane / 4, warp_col / 8) + lane % 4 * 4;
#pragma unroll
    for (int i = 0; i < T::WARP_M / 8; ++i) {
#pragma unroll
        for (int j = 0; j < MMAS_N; ++j) {
            const float* pair = acc[i / 2][j] + i % 2 * 2;
            st_shared_b32((first ^ j * 16 ^ i % 4 * 32) + i * 8 * BLOCK_N * 2, round_pair<DTYPE>(pair[0], pair[1]));
        }
    }
    __syncthreads();
    constexpr int CHUNKS = BLOCK_N / 8;
    const bool on_diagonal = p.symmetric && row0 == col0;
    if (on_diagonal) {  // the 8x8 blocks on the diagonal, four at a time
        for (int i = warp * 32; i < BLOCK_M; i += T::WARPS * 32) {
            const uint32_t row = shared + result_offset<BLOCK_N>(i + lane, (i + lane) / 8);
            uint32_t lower[4], upper[4];
            ldmatrix_x4(lower, row);
            ldmatrix_x4_trans(upper, row);
            __syncwarp();  // ldmatrix gathers lanes but does not order their memory
            for (int q = 0; q < 4; ++q) {
                const uint32_t at = shared + result_offset<BLOCK_N>(i + q * 8 + lane / 4, i / 8 + q) + lane % 4 * 4;
                st_shared_b32(at, mirrored(lower[q], upper[q], lane));
            }
        }
        __syncthreads();
    }
    uint16_t* out = p.out + matrix * p.out_batch_stride;
#pragma unroll 4
    for (int i = threadIdx.x; i < BLOCK_M * CHUNKS; i += THREADS) {
        const int row = i / CHUNKS, chunk = i % CHUNKS;
        uint32_t words[4];
        ld_shared_v4(words, shared + result_offset<BLOCK_N>(row, chunk));
        uint16_t* to = out + (row0 + row) * p.out_row_stride + col0 + chunk * 8;
        const bool stored = row < rows && !(on_diagonal && chunk > row / 8);
        store<ALIGNED>(to, words, stored ? clamp(cols - chunk * 8, 8) : 0, p.out_width);
    }
    if constexpr (BLOCK_M == BLOCK_N) {
        if (!p.symmetric) return;
        // Eight columns of 32 rows at a time. Row r of matrix q is row 8 (r / 2) + 2q + r % 2, so that the transposed
        // pairs that a lane gets are eight neighbours of a column.
#pragma unroll 4
        for (int i = warp; i < BLOCK_M / 32 * CHUNKS; i += T::WARPS) {
            const int rows_from = i % (BLOCK_M / 32) * 32, chunk = i / (BLOCK_M / 32);
            const int source = rows_from + lane % 8 / 2 * 8 + lane / 8 * 2 + lane % 2;
            uint32_t words[4];
            ldmatrix_x4_trans(words, shared + result_offset<BLOCK_N>(source, chunk));
            const int row = rows_from + lane % 4 * 8, col = chunk * 8 + lane / 4;
            uint16_t* to = out + (col0 + col) * p.out_row_stride + row0 + row;
            const bool stored = col < cols && !(on_diagonal && row / 8 <= chunk);
            store<ALIGNED>(to, words, stored ? clamp(rows - row, 8) : 0, p.out_width);
        }
    }
}

// 128 x 128 with 64 x 64 a warp is the smallest tile that tensor cores, not shared memory, limit (see kernel), and the
// largest of which registers hold two: while one block waits at its barrier, the other multiplies. The smaller ones
// fill the GPU when there are few tiles, and waste less beyond the edge. All have 48 KiB: what needs no permission, and
// what fits twice where a multiprocessor has 100 (8.6, 8.9, 12.0). Deep blocks of k save the smallest tile barriers.
using Large = Tile<128, 128, 32, 3, 2, 2, 2>;
using Medium = Tile<128, 64, 32, 4, 2, 2, 3>;
using Small = Tile<64, 64, 64, 3, 2, 2, 3>;

struct Kernel {
    int block_m, block_n, threads, shared_bytes;
    int residents;        // blocks that a multiprocessor has registers for
    float shared_clocks;  // of shared memory for one mma
    float fixed_clocks;   // of a tile beside its k: to fill its stages, to read addends and to store
    const void* plain;
    const void* transposed;  // b; null: not built, as no product of the iteration needs it
};

template <DType DTYPE, class T, bool ALIGNED = true>
Kernel kernel() {
    // Shared memory, at 128 bytes a clock, gives the fragments and takes the tiles.
    const float fragments = 4096.0f * (T::WARP_M + T::WARP_N) / (T::WARP_M * T::WARP_N);
    const float tiles = 4096.0f * (T::BLOCK_M + T::BLOCK_N) / (T::BLOCK_M * T::BLOCK_N);
    // Some 3 us at 1.4 GHz for the largest tile and 1.6 us for the smallest: see triton_kernels/configs.py.
    const float fixed = 1700.0f + 2200.0f * (T::BLOCK_M * T::BLOCK_N) / (128 * 128);
    Kernel k{T::BLOCK_M, T::BLOCK_N, T::THREADS, T::SHARED_BYTES, T::RESIDENT, (fragments + tiles) / 128, fixed};
    k.plain = reinterpret_cast<const void*>(known<product<DTYPE, T, false, ALIGNED>>());
    if constexpr (T::BLOCK_M == T::BLOCK_N) {
        k.transposed = reinterpret_cast<const void*>(known<product<DTYPE, T, true, ALIGNED>>());
    }
    return k;
}

int64_t tiles_of(const Kernel& k, const Product& p) {
    const int64_t tiles_m = ceil_div(p.out.rows, k.block_m), tiles_n = ceil_div(p.out.cols, k.block_n);
    return p.symmetric ? tiles_m * (tiles_m + 1) / 2 : tiles_m * tiles_n;
}

// Of a multiprocessor's tensor cores for one mma, 16 x 8 x 16. 8.0 by its data sheet. 9.0: mma.sync has 57 % of wgmma's
// rate (arXiv 2501.12084). 10.0: such a kernel reaches 409 of 2,250 TFLOP/s (learn-cuda 1454f8b). Others take four
// clocks (A10, L40) or eight (GeForce), more than shared memory in any tile.
float mma_clocks(const Device& device) {
    if (device.major == 8 && device.minor == 0) return 2.0f;
    return device.major == 9 ? 1.75f : device.major == 10 ? 2.7f : 4.0f;
}

// Clocks of the multiprocessor that has most tiles, which is the last to be done. While one resident fills or stores,
// the others multiply.
double clocks_of(const Kernel& k, const Product& p, const Device& device) {
    const int64_t tiles = ceil_div(tiles_of(k, p) * p.out.batch, device.multiprocessors);
    const int64_t residents = std::clamp(device.shared_bytes / (k.shared_bytes + 1024), 1, k.residents);
    const double mmas = static_cast<double>(tiles) * k.block_m * k.block_n * p.a.cols / (16 * 8 * 16);
    return mmas * std::max(mma_clocks(device), k.shared_clocks) + ceil_div(tiles, residents) * k.fixed_clocks;
}

// A smaller tile only where it saves more than a count can be wrong by.
template <DType DTYPE>
Kernel choose(const Product& p, bool aligned, const Device& device) {
    if (!aligned) return kernel<DTYPE, Small, false>();
    static const Kernel table[] = {kernel<DTYPE, Large>(), kernel<DTYPE, Medium>(), kernel<DTYPE, Small>()};
    const Kernel* best = nullptr;
    double least = 0;
    for (const Kernel& k : table) {
        if (!(p.b_transposed ? k.transposed : k.plain) || (p.symmetric && k.block_m != k.block_n)) continue;
        const double clocks = clocks_of(k, p, device);
        if (!best || clocks < 0.95 * least) best = &k, least = clocks;
    }
    return *best;
}

// Bytes that rows of a stack may be cut into.
int copy_width(const Stack& s) {
    const int64_t bits = reinterpret_cast<int64_t>(s.data) | 2 * s.row_stride | (s.batch > 1 ? 2 * s.batch_stride : 0);
    return static_cast<int>(std::min<int64_t>(16, bits & -bits));
}

Operand operand(const Stack& s) { return {s.data, s.batch_stride, s.row_stride, copy_width(s)}; }

Arguments arguments(const Product& p) {
    Arguments args{};
    args.a = operand(p.a), args.b = operand(p.b);
    const AddedMatrices added(p);
    for (int i = 0; i < added.count; ++i) {
        const Added& c = added.list[i];
        const Stack& s = c.matrix;
        args.addends[args.addend_count++] = {s.data, s.batch_stride, s.row_stride, c.factor,
                                             c.row,  c.col,          copy_width(s)};
    }
    args.out = p.out.data, args.out_batch_stride = p.out.batch_stride, args.out_row_stride = p.out.row_stride;
    args.out_width = copy_width(p.out);
    args.m = static_cast<int>(p.out.rows), args.n = static_cast<int>(p.out.cols), args.k = static_cast<int>(p.a.cols);
    args.symmetric = p.symmetric;
    args.a_diagonal = p.a_diagonal, args.b_diagonal = p.b_diagonal, args.c_diagonal = p.c_diagonal;
    args.out_diagonal = p.out_diagonal;
    args.alpha = p.alpha, args.beta = p.beta, args.gamma = p.gamma, args.scale = p.scale;
    return args;
}

template <DType DTYPE>
Launch launch(const Product& p, const Device& device) {
    Arguments args = arguments(p);
    bool aligned = args.a.width == 16 && args.b.width == 16 && args.out_width == 16;
    for (int i = 0; i < args.addend_count; ++i) aligned = aligned && args.addends[i].width == 16;
    const Kernel k = choose<DTYPE>(p, aligned, device);
    args.tiles_m = static_cast<int>(ceil_div(p.out.rows, k.block_m));
    args.tiles = static_cast<unsigned>(tiles_of(k, p));
    Launch l{
        p.b_transposed ? k.transposed : k.plain, static_cast<unsigned>(args.tiles * p.out.batch),
        static_cast<unsigned>(k.threads), static_cast<unsigned>(k.shared_bytes)
    };
    static_assert(sizeof args <= sizeof l.arguments);
    std::memcpy(l.arguments, &args, sizeof args);
    return l;
}

}  // namespace

Launch launch_sm80(const Product& p, DType dtype, const Device& device) {
    return dtype == DType::bf16 ? launch<DType::bf16>(p, device) : launch<DType::f16>(p, device);
}

}  // namespace muon_kernels::cuda
