// The batched product for compute capability 9.0: tensor copies (TMA) bring tiles to shared memory, wgmma multiplies
// them from there, tensor copies take the result away.
//
// A block stays on its multiprocessor and computes one tile after another. One of its threads produces: it fills a ring
// of NUM_STAGES stages, first with BLOCK_K columns of a and rows of b a step, then with the tiles of the matrices that
// are added to the product, then with the next tile's. Two warpgroups consume; the first never waits for an epilogue.
// Tensor maps know where a matrix ends: what is beyond is zero when loaded, and not stored.
//
// The sum of an element is taken in the same order whatever the tile, so its bits depend on neither batch nor table.
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <utility>

#include "../muon_kernels.h"
#include "product.cuh"
#include "product.h"
#include "ptx_sm90.cuh"

namespace muon_kernels::cuda {
namespace {

// See Added.
struct Addend {
    CUtensorMap map;
    float factor;
    bool by_row, by_col;  // which, of all addends, no more than one is
};

struct Arguments {
    CUtensorMap a, b, out;
    Addend addends[3];
    int addend_count;
    int m, n, k_steps;
    int clusters_m, tiles_n;    // rows of clusters, columns of tiles
    unsigned tiles, all_tiles;  // of a matrix, and of all
    bool symmetric;
    const float *a_diagonal, *b_diagonal, *c_diagonal;
    float* out_diagonal;
    float alpha, beta, gamma;
    const float* scale;
};

// A row of a tile in shared memory is 64 elements, 128 bytes, swizzled: see wgmma_descriptor. All that is loaded and
// stored comes in boxes of such rows, and accumulators in blocks of 64 x 64.
constexpr int BLOCK = 64, BLOCK_BYTES = 2 * BLOCK * BLOCK;
constexpr int BLOCK_K = BLOCK;
constexpr int WARPGROUP = 128, CONSUMERS = 2, THREADS = (1 + CONSUMERS) * WARPGROUP;
// The compiler gives every thread the third of all registers; the producer leaves most of them to the consumers.
constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;
static_assert(WARPGROUP * (PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS) <= 65536);

// PINGPONG: the consumers take turns, a tile each, and one multiplies while the other adds and stores. Otherwise each
// has half the rows of every tile. Either way a consumer has four blocks of accumulators, 128 registers.
//
// CLUSTER: blocks that compute tiles one above the other, in step: each loads its part of their columns of b for all. A
// stage is free once it is in all of them.
template <int BLOCK_M_, int BLOCK_N_, int NUM_STAGES_, bool PINGPONG_, int CLUSTER_>
struct Tile {
    static constexpr int BLOCK_M = BLOCK_M_, BLOCK_N = BLOCK_N_, NUM_STAGES = NUM_STAGES_;
    static constexpr bool PINGPONG = PINGPONG_;
    static constexpr int CLUSTER = CLUSTER_, SHARE_N = BLOCK_N / CLUSTER;  // columns that a block loads
    static_assert(SHARE_N % BLOCK == 0);
    // Where the result is symmetric, rows and columns are cut into squares as high as a cluster.
    static constexpr int SQUARE = CLUSTER * BLOCK_M, SQUARE_TILES_N = SQUARE / BLOCK_N;  // columns of tiles in one
    static_assert(SQUARE % BLOCK_N == 0);
    static constexpr int BLOCKS = 4;
    static_assert(BLOCK_M * BLOCK_N == BLOCKS * BLOCK * BLOCK * (PINGPONG ? 1 : CONSUMERS));
    static constexpr int A_BYTES = 2 * BLOCK_M * BLOCK_K, STAGE_BYTES = 2 * (BLOCK_M + BLOCK_N) * BLOCK_K;
    // A stage holds 128 columns of an addend's tile.
    static constexpr int ADDEND_STEPS = BLOCK_N / 128, ADDEND_BYTES = 2 * BLOCK_M * 128;
    static_assert(BLOCK_M == 128 && BLOCK_N % 128 == 0 && ADDEND_BYTES <= STAGE_BYTES);
    static constexpr int STAGING_BYTES = 2 * BLOCK_BYTES;  // of a consumer: a block and its mirror image
    static constexpr int FULL = NUM_STAGES * STAGE_BYTES + CONSUMERS * STAGING_BYTES, EMPTY = FULL + 8 * NUM_STAGES;
    static constexpr int TURN = EMPTY + 8 * NUM_STAGES, VECTORS = TURN + 8 * CONSUMERS;
    // A consumer's rows, and parts of the diagonals for rows and columns.
    static constexpr int ROWS = PINGPONG ? BLOCK_M : BLOCK, VECTOR_BYTES = 4 * (ROWS + BLOCK_N);
    static constexpr int SHARED_BYTES = VECTORS + CONSUMERS * VECTOR_BYTES;
    static_assert(SHARED_BYTES <= 232448);
    // Warps that free a stage.
    static constexpr int READERS = 4 * (PINGPONG ? 1 : CONSUMERS) * CLUSTER;
    // Tiles that are computed at about the same time share rows and columns, in L2: those of a square region.
    static constexpr int SUPERTILE = 1024 / SQUARE;                        // squares of a side of a symmetric result
    static constexpr int GROUP = (BLOCK_N == 128 ? 1536 : 2048) / SQUARE;  // rows of clusters of another
};

using Pingpong = Tile<128, 128, 6, true, 1>;
using PingpongPair = Tile<128, 128, 6, true, 2>;
using Wide = Tile<128, 256, 4, false, 2>;

// The parts of shared memory.
template <class T>
struct Shared {
    uint32_t base;

    // A step's place in the ring.
    static __device__ __forceinline__ unsigned slot(unsigned step) { return step % T::NUM_STAGES; }
    static __device__ __forceinline__ unsigned parity(unsigned step) { return step / T::NUM_STAGES % 2; }
    __device__ __forceinline__ uint32_t stage(unsigned step) const { return base + slot(step) * T::STAGE_BYTES; }

    __device__ __forceinline__ uint32_t staging(unsigned consumer) const {
        return base + T::NUM_STAGES * T::STAGE_BYTES + consumer * T::STAGING_BYTES;
    }

    // For a consumer's rows, then for its columns: alpha times the diagonals' elements.
    __device__ __forceinline__ uint32_t of_rows(unsigned consumer) const {
        return base + T::VECTORS + consumer * T::VECTOR_BYTES;
    }
    __device__ __forceinline__ uint32_t of_cols(unsigned consumer) const { return of_rows(consumer) + 4 * T::ROWS; }

    // Barriers: all of a stage has come; nobody reads it any more; it is a consumer's turn to multiply.
    __device__ __forceinline__ uint32_t full(unsigned step) const { return base + T::FULL + 8 * slot(step); }
    __device__ __forceinline__ uint32_t empty(unsigned step) const { return base + T::EMPTY + 8 * slot(step); }
    __device__ __forceinline__ uint32_t turn(unsigned consumer) const { return base + T::TURN + 8 * consumer; }

    __device__ __forceinline__ void begin() const {
        for (unsigned step = 0; step < T::NUM_STAGES; ++step) {
            mbarrier_init(full(step), 1);
            mbarrier_init(empty(step), T::READERS);
        }
        for (unsigned consumer = 0; consumer < CONSUMERS; ++consumer) mbarrier_init(turn(consumer), 4);
        fence_mbarrier_init();
        fence_proxy_async();  // copies arrive on them too
    }
};

template <class T>
__device__ __forceinline__ void sync_cluster() {
    if constexpr (T::CLUSTER == 1) {
        __syncthreads();
    } else {
        barrier_cluster();
    }
}

// Of the first element of a tile.
struct Place {
    int row, col, matrix;
};

// Entry `index` of the lower triangle of a grid of `side` x `side`, in supertiles: those of a row of supertiles follow
// each other, and the entries of one, down its columns.
template <int SUPERTILE>
__device__ __forceinline__ void triangular_place(unsigned index, int side, int& row, int& col) {
    triangular_index(index, row, col);  // as many entries lie before a row of supertiles as before its first row
    const int first = row / SUPERTILE * SUPERTILE, height = min(SUPERTILE, side - first);
    const int at = static_cast<int>(index) - first * (first + 1) / 2, before_last = height * first;
    if (at < before_last) {
        const int within = at % (height * SUPERTILE);
        row = first + within % height;
        col = at / (height * SUPERTILE) * SUPERTILE + within / height;
    } else {
        triangular_index(at - before_last, row, col);
        row += first, col += first;
    }
}

// Entry `index` of a grid of rows x cols: down the columns of a group of rows, then the next group.
__device__ __forceinline__ void grouped_place(unsigned index, int group, int rows, int cols, int& row, int& col) {
    const unsigned of_group = group * cols;
    const int first = index / of_group * group, height = min(group, rows - first), within = index % of_group;
    row = first + within % height;
    col = within / height;
}

template <class T>
__device__ __forceinline__ Place place_of(const Arguments& p, unsigned index) {
    const unsigned matrix = index / p.tiles, tile = index % p.tiles, of_cluster = tile / T::CLUSTER;
    int row, col;
    if (p.symmetric) {
        triangular_place<T::SUPERTILE>(of_cluster / T::SQUARE_TILES_N, p.clusters_m, row, col);
        col = col * T::SQUARE_TILES_N + of_cluster % T::SQUARE_TILES_N;
    } else {
        grouped_place(of_cluster, T::GROUP, p.clusters_m, p.tiles_n, row, col);
    }
    row = row * T::CLUSTER + tile % T::CLUSTER;
    return {row * T::BLOCK_M, col * T::BLOCK_N, static_cast<int>(matrix)};
}

// ---- the producer

template <class T, bool B_TRANSPOSED>
__device__ __forceinline__ void load_operands(const Arguments& p, Place at, int k, uint32_t stage, uint32_t full) {
    mbarrier_arrive_expect_tx(full, T::STAGE_BYTES);
    load_box(stage, &p.a, k, at.row, at.matrix, full);
    const int share = blockIdx.x % T::CLUSTER * T::SHARE_N, col = at.col + share;
    const uint32_t b = stage + T::A_BYTES + share * 2 * BLOCK_K;
    const auto load = [&](uint32_t to, int box_col, int box_row) {
        if constexpr (T::CLUSTER == 1) {
            load_box(to, &p.b, box_col, box_row, at.matrix, full);
        } else {
            load_box_multicast(to, &p.b, box_col, box_row, at.matrix, full, (1 << T::CLUSTER) - 1);
        }
    };
    if constexpr (B_TRANSPOSED) {
        load(b, k, col);
    } else {
#pragma unroll
        for (int i = 0; i < T::SHARE_N / BLOCK; ++i) load(b + i * BLOCK_BYTES, col + i * BLOCK, k);
    }
}

// Four blocks of an addend, 128 columns of its tile.
template <class T>
__device__ __forceinline__ void load_addend(const CUtensorMap* map, Place at, uint32_t stage, uint32_t full) {
    mbarrier_arrive_expect_tx(full, T::ADDEND_BYTES);
#pragma unroll
    for (int i = 0; i < 4; ++i)
        load_box(stage + i * BLOCK_BYTES, map, at.col + i % 2 * BLOCK, at.row + i / 2 * BLOCK, at.matrix, full);
}

template <class T, bool B_TRANSPOSED>
__device__ __forceinline__ void produce(const Arguments& p, const Shared<T>& shared) {
    const int steps = p.k_steps + p.addend_count * T::ADDEND_STEPS;
    unsigned now = 0;
    for (unsigned tile = blockIdx.x; tile < p.all_tiles; tile += gridDim.x) {
        const Place at = place_of<T>(p, tile);
        for (int step = 0; step < steps; ++step, ++now) {
            const uint32_t stage = shared.stage(now), full = shared.full(now);
            mbarrier_wait(shared.empty(now), shared.parity(now) ^ 1);
            if (step < p.k_steps) {
                load_operands<T, B_TRANSPOSED>(p, at, step * BLOCK_K, stage, full);
            } else {
                const int of = (step - p.k_steps) / T::ADDEND_STEPS, part = (step - p.k_steps) % T::ADDEND_STEPS;
                load_addend<T>(&p.addends[of].map, {at.row, at.col + part * 128, at.matrix}, stage, full);
            }
        }
    }
}

// ---- consumers

// Where a thread is in its warpgroup.
struct Lane {
    unsigned consumer, warp, lane;

    __device__ __forceinline__ Lane()
        : consumer(threadIdx.x / WARPGROUP - 1), warp(threadIdx.x / 32 % 4), lane(threadIdx.x % 32) {}

    // Of the block's element (row_of(h), col_of(j) + e), which is acc[4j + 2h + e].
    __device__ __forceinline__ int row_of(int h) const { return warp * 16 + h * 8 + lane / 4; }
    __device__ __forceinline__ int col_of(int j) const { return j * 8 + lane % 4 * 2; }
    __device__ __forceinline__ void sync_warpgroup() const { bar_sync(1 + consumer, WARPGROUP); }
    __device__ __forceinline__ bool first() const { return threadIdx.x % WARPGROUP == 0; }
    // One arrival for the warp, once all its lanes are here.
    __device__ __forceinline__ void arrive(uint32_t barrier) const {
        __syncwarp();
        if (lane == 0) mbarrier_arrive(barrier);
    }
    // The same at the barriers in that place of all blocks of the cluster.
    template <int CLUSTER>
    __device__ __forceinline__ void arrive_everywhere(uint32_t barrier) const {
        if constexpr (CLUSTER == 1) return arrive(barrier);
        __syncwarp();
        if (lane < CLUSTER) mbarrier_arrive_cluster(mapa(barrier, lane));
    }
};

// Of the eight elements from 8 * chunk on of a block's row.
__device__ __forceinline__ uint32_t swizzled(unsigned row, unsigned chunk) {
    return row * 2 * BLOCK + (chunk ^ row % 8) * 16;
}

// Of block q in its tile.
template <class T>
__device__ __forceinline__ int row_of_block(int q, unsigned consumer) {
    return T::PINGPONG ? q / 2 * BLOCK : static_cast<int>(consumer) * BLOCK;
}

template <class T>
__device__ __forceinline__ int col_of_block(int q) {
    return T::PINGPONG ? q % 2 * BLOCK : q * BLOCK;
}

using Accumulators = float[4][32];

__device__ __forceinline__ void pin_all(Accumulators& acc) {
#pragma unroll
    for (int q = 0; q < 4; ++q) pin(acc[q]);
}

// Four blocks (+)= 16 columns of a and of b, which their descriptors say.
template <DType DTYPE, class T, bool B_TRANSPOSED>
__device__ __forceinline__ void wgmmas(Accumulators& acc, uint64_t of_a, uint64_t of_b, bool add) {
    if constexpr (T::PINGPONG) {
        const uint64_t of_lower = of_a + BLOCK_BYTES / DESCRIPTOR_UNIT;
        wgmma_m64n128k16<DTYPE, B_TRANSPOSED>(acc[0], acc[1], of_a, of_b, add);
        wgmma_m64n128k16<DTYPE, B_TRANSPOSED>(acc[2], acc[3], of_lower, of_b, add);
    } else {
        wgmma_m64n256k16<DTYPE, B_TRANSPOSED>(acc[0], acc[1], acc[2], acc[3], of_a, of_b, add);
    }
}

// Begins all products of a tile; the last step's are still under way, and its stage is not free, when it returns.
template <DType DTYPE, class T, bool B_TRANSPOSED>
__device__ __forceinline__ void multiply(
    Accumulators& acc, const Shared<T>& shared, const Lane& me, unsigned first, int k_steps
) {
    pin_all(acc);
    for (int step = 0; step < k_steps; ++step) {
        const unsigned now = first + step;
        mbarrier_wait(shared.full(now), shared.parity(now));
        wgmma_fence();
        const uint32_t stage = shared.stage(now);
        const uint64_t a = wgmma_descriptor(stage + (T::PINGPONG ? 0 : me.consumer * BLOCK_BYTES), BLOCK_BYTES);
        const uint64_t b = wgmma_descriptor(stage + T::A_BYTES, BLOCK_BYTES);
#pragma unroll
        for (int k = 0; k < BLOCK_K; k += 16) {
            // To the next columns of a, and of the transposed b or rows of b.
            const uint64_t in_a = 2 * k / DESCRIPTOR_UNIT, in_b = B_TRANSPOSED ? in_a : in_a * BLOCK;
            wgmmas<DTYPE, T, B_TRANSPOSED>(acc, a + in_a, b + in_b, step || k);
        }
        wgmma_commit();
        wgmma_wait<1>();
        if (step) me.arrive_everywhere<T::CLUSTER>(shared.empty(now - 1));
    }
}

// Parts of the diagonals for a tile's rows and columns, which its epilogue multiplies addends by, to shared memory.
template <class T>
__device__ __forceinline__ void load_vectors(
    const Arguments& p, const Shared<T>& shared, const Lane& me, Place at, float alpha
) {
    if (!p.a_diagonal && !p.b_diagonal) return;
    me.sync_warpgroup();  // the last tile's are still read
    const int thread = threadIdx.x % WARPGROUP, row0 = at.row + row_of_block<T>(0, me.consumer);
    const auto element = [&](const float* vector, int i, int size) {
        return vector && i < size ? alpha * vector[static_cast<int64_t>(at.matrix) * size + i] : 0.0f;
    };
    const uint32_t of_rows = shared.of_rows(me.consumer), of_cols = shared.of_cols(me.consumer);
    if (thread < T::ROWS) st_shared_f32(of_rows + 4 * thread, element(p.a_diagonal, row0 + thread, p.m));
    for (int i = thread; i < T::BLOCK_N; i += WARPGROUP)
        st_shared_f32(of_cols + 4 * i, element(p.b_diagonal, at.col + i, p.n));
    me.sync_warpgroup();
}

// One block of a tile, at (row, col) of matrix `matrix`.
template <DType DTYPE>
struct Finish {
    const Arguments& p;
    const Lane& me;
    int row, col, matrix;
    uint32_t of_rows, of_cols;  // this block's part of the vectors
    float alpha, scale;         // alpha is scaled

    // Adds the block of an addend that lies in shared memory at `from`.
    __device__ __forceinline__ void add(float (&acc)[32], const Addend& c, uint32_t from) const {
        const float factor = c.factor * scale;
        float of_row[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) of_row[h] = factor + (c.by_row ? ld_shared_f32(of_rows + 4 * me.row_of(h)) : 0.0f);
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
            uint32_t pairs[4];  // rows 0 and 8 of chunk j, and of the next
            ldmatrix_x4(pairs, from + swizzled(me.warp * 16 + me.lane % 16, j + me.lane / 16));
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float2 of_col = {0.0f, 0.0f};
                if (c.by_col) of_col = ld_shared_f32x2(of_cols + 4 * me.col_of(j + i));
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    float* value = acc + 4 * (j + i) + 2 * h;
                    const uint32_t pair = pairs[2 * i + h];
                    value[0] = fmaf(of_row[h] + of_col.x, widen<DTYPE>(pair, 0), value[0]);
                    value[1] = fmaf(of_row[h] + of_col.y, widen<DTYPE>(pair, 1), value[1]);
                }
            }
        }
    }

    // What only elements on the diagonal get. Of a block on it a warp has two 8x8 blocks on it, one of each h, and a
    // lane of these element e = lane / 4 - 2 (lane % 4), if that is 0 or 1.
    __device__ __forceinline__ void add_diagonal(float (&acc)[32]) const {
        const unsigned e = me.lane / 4 - me.lane % 4 * 2;
        if (row != col || e > 1) return;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int i = row + me.row_of(h);
            if (i >= p.m) continue;
            const int64_t at = static_cast<int64_t>(matrix) * p.m + i;
            float more = p.gamma * scale;
            if (p.a_diagonal && p.b_diagonal) more += alpha * p.a_diagonal[at] * p.b_diagonal[at];
            if (p.c_diagonal) more += p.beta * scale * p.c_diagonal[at];
            uint32_t bits = 0;  // of the sum
#pragma unroll
            for (int n = 0; n < 8; ++n) {
                float& element = acc[(n / 2 * 2 + h) * 4 + 2 * h + n % 2];
                const bool here = me.warp * 2 + e == n;
                element = here ? element + more : element;
                bits |= here ? __float_as_uint(element) : 0;
            }
            const float value = __uint_as_float(bits);
            if (p.out_diagonal) p.out_diagonal[at] = value - widen<DTYPE>(round_pair<DTYPE>(value, 0.0f), 0);
        }
    }

    // The rounded block to `straight`, and transposed to `mirror` if there is one.
    __device__ __forceinline__ void stage(const float (&acc)[32], uint32_t straight, uint32_t mirror) const {
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
            uint32_t pairs[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float* pair = acc + 4 * (j + i / 2) + 2 * (i % 2);
                pairs[i] = round_pair<DTYPE>(pair[0], pair[1]);
            }
            stmatrix_x4(straight + swizzled(me.warp * 16 + me.lane % 16, j + me.lane / 16), pairs);
            if (!mirror) continue;
            const unsigned chunk = me.warp * 2 + me.lane / 8 % 2;
            stmatrix_x4_trans(mirror + swizzled((j + me.lane / 16) * 8 + me.lane % 8, chunk), pairs);
        }
    }

    // The same of a block on the diagonal of a symmetric result, which is its own mirror image: of its 8x8 blocks those
    // below the diagonal go to two places, those above it nowhere.
    __device__ __forceinline__ void stage_symmetric(const float (&acc)[32], uint32_t to) const {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int i = me.warp * 2 + h;
                if (j > i) continue;
                uint32_t pair = round_pair<DTYPE>(acc[4 * j + 2 * h], acc[4 * j + 2 * h + 1]);
                if (j == i) pair = mirrored(pair, movmatrix_trans(pair), me.lane);
                stmatrix_x1(to + swizzled(i * 8 + me.lane % 8, j), pair);
                if (j < i) stmatrix_x1_trans(to + swizzled(j * 8 + me.lane % 8, i), pair);
            }
        }
    }

    // Through shared memory, at `staging`, to the result, and to its mirror image.
    __device__ __forceinline__ void store(const float (&acc)[32], uint32_t staging) const {
        if (row >= p.m || col >= p.n || (p.symmetric && row < col)) return;
        const bool mirror = p.symmetric && row > col;
        if (me.first()) bulk_wait_read<0>();
        me.sync_warpgroup();  // the block before has left
        if (p.symmetric && row == col) {
            stage_symmetric(acc, staging);
        } else {
            stage(acc, staging, mirror ? staging + BLOCK_BYTES : 0);
        }
        fence_proxy_async();
        me.sync_warpgroup();
        if (!me.first()) return;
        store_box(&p.out, col, row, matrix, staging);
        if (mirror) store_box(&p.out, row, col, matrix, staging + BLOCK_BYTES);
        bulk_commit();
    }
};

template <DType DTYPE, class T, bool B_TRANSPOSED>
__device__ __forceinline__ void consume(const Arguments& p, const Shared<T>& shared) {
    const Lane me;
    const int k_steps = p.k_steps, steps = k_steps + p.addend_count * T::ADDEND_STEPS;
    constexpr unsigned TAKING_TURNS = T::PINGPONG ? CONSUMERS : 1;
    const unsigned turn = T::PINGPONG ? me.consumer : 0;
    unsigned now = turn * steps, parity = 0;
    for (unsigned tile = blockIdx.x + turn * gridDim.x; tile < p.all_tiles; tile += TAKING_TURNS * gridDim.x) {
        const Place at = place_of<T>(p, tile);
        const float once = p.scale ? p.scale[at.matrix] : 1.0f, scale = B_TRANSPOSED ? once * once : once;
        const float alpha = p.alpha * scale;
        const auto finish = [&](int q) {
            const int row = row_of_block<T>(q, me.consumer), col = col_of_block<T>(q);
            const uint32_t of_rows = shared.of_rows(me.consumer) + 4 * (row - row_of_block<T>(0, me.consumer));
            const uint32_t of_cols = shared.of_cols(me.consumer) + 4 * col;
            return Finish<DTYPE>{p, me, at.row + row, at.col + col, at.matrix, of_rows, of_cols, alpha, scale};
        };
        load_vectors(p, shared, me, at, alpha);
        Accumulators acc;
        // A consumer must not wait for a stage before the other one has seen all of its own come: by the parity alone
        // it could not tell rounds of the ring apart.
        if (T::PINGPONG) mbarrier_wait(shared.turn(me.consumer), me.consumer == 0 ? parity ^ 1 : parity);
        multiply<DTYPE, T, B_TRANSPOSED>(acc, shared, me, now, k_steps);
        if (T::PINGPONG && steps == k_steps) me.arrive(shared.turn(1 - me.consumer));
        wgmma_wait<0>();
        pin_all(acc);
        me.arrive_everywhere<T::CLUSTER>(shared.empty(now + k_steps - 1));
#pragma unroll
        for (int q = 0; q < 4; ++q) {
#pragma unroll
            for (float& value : acc[q]) value *= alpha;
        }
        for (int step = k_steps; step < steps; ++step) {
            const int of = (step - k_steps) / T::ADDEND_STEPS, part = (step - k_steps) % T::ADDEND_STEPS;
            mbarrier_wait(shared.full(now + step), shared.parity(now + step));
            if (T::PINGPONG && step == steps - 1) me.arrive(shared.turn(1 - me.consumer));
#pragma unroll
            for (int q = 0; q < 4; ++q) {
                if (!T::PINGPONG && q / 2 != part) continue;
                const int block = (T::PINGPONG ? q / 2 : me.consumer) * 2 + q % 2;
                finish(q).add(acc[q], p.addends[of], shared.stage(now + step) + block * BLOCK_BYTES);
            }
            me.arrive_everywhere<T::CLUSTER>(shared.empty(now + step));
        }
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            finish(q).add_diagonal(acc[q]);
            finish(q).store(acc[q], shared.staging(me.consumer));
        }
        now += TAKING_TURNS * steps;
        parity ^= 1;
    }
    if (me.first()) bulk_wait_read<0>();  // shared memory is another block's after this one
}

template <DType DTYPE, class T, bool B_TRANSPOSED>
__global__ void __launch_bounds__(THREADS, 1) product(const __grid_constant__ Arguments p) {
    extern __shared__ __align__(1024) uint8_t memory[];  // as the swizzle has it
    const Shared<T> shared{shared_address(memory)};
    if (threadIdx.x == 0) shared.begin();
    sync_cluster<T>();
    if (threadIdx.x < WARPGROUP) {
        setmaxnreg_dec<PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) produce<T, B_TRANSPOSED>(p, shared);
    } else {
        setmaxnreg_inc<CONSUMER_REGISTERS>();
        consume<DTYPE, T, B_TRANSPOSED>(p, shared);
    }
    // No block leaves while another may bring something to it, or arrive.
    if constexpr (T::CLUSTER > 1) sync_cluster<T>();
}

// ---- the host's part

struct Kernel {
    int block_m, block_n, cluster, share_n, shared_bytes;
    int step_bytes;                  // from L2 for BLOCK_K columns of a tile
    int step_clocks;                 // of tensor cores, or of shared memory where that takes longer
    int tile_clocks;                 // of what nothing hides, a tile
    const void *plain, *transposed;  // b
};

template <DType DTYPE, class T>
Kernel kernel() {
    // Predicted, not measured. Tensor cores take 2048 products a clock. Shared memory gives or takes 128 bytes: 64 rows
    // of a and all of b for a wgmma, and the stage. The epilogue of a wide tile waits for its products, and the next
    // for it.
    const int columns = T::BLOCKS * BLOCK / (T::PINGPONG ? 2 : 1), wgmmas = 2;
    const int tensor = T::BLOCK_M * T::BLOCK_N * BLOCK_K / 2048;
    const int shared = (wgmmas * 2 * (BLOCK + columns) * BLOCK_K + T::STAGE_BYTES) / 128;
    Kernel k{T::BLOCK_M, T::BLOCK_N, T::CLUSTER, T::SHARE_N, T::SHARED_BYTES, 0, 0, 0, nullptr, nullptr};
    k.step_bytes = 2 * (T::BLOCK_M + T::SHARE_N) * BLOCK_K;
    k.step_clocks = std::max(tensor, shared);
    k.tile_clocks = T::PINGPONG ? 0 : 1500;
    k.plain = reinterpret_cast<const void*>(known<product<DTYPE, T, false>>());
    k.transposed = reinterpret_cast<const void*>(known<product<DTYPE, T, true>>());
    return k;
}

int64_t cluster_rows_of(const Kernel& k, const Product& p) { return ceil_div(p.out.rows, k.block_m * k.cluster); }

// Whole clusters of them, and whole squares where the result is symmetric: a tile beyond the edge, or above the
// diagonal, has nothing to store.
int64_t tiles_of(const Kernel& k, const Product& p) {
    const int64_t rows = cluster_rows_of(k, p);
    if (!p.symmetric) return k.cluster * rows * ceil_div(p.out.cols, k.block_n);
    return rows * (rows + 1) / 2 * k.cluster * (k.block_m * k.cluster / k.block_n);
}

// Blocks at work at a time: one a multiprocessor, in whole clusters.
int64_t blocks_of(const Kernel& k, const Product& p, int multiprocessors) {
    return std::min<int64_t>(tiles_of(k, p) * p.out.batch, multiprocessors / k.cluster * k.cluster);
}

// The kernel that takes the fewest clocks, and of several the one that asks L2 for the fewest bytes.
template <DType DTYPE>
Kernel choose(const Product& p, int multiprocessors) {
    constexpr int L2_BYTES = 5120;  // a clock, for all multiprocessors: an A100's
    static const Kernel table[] = {kernel<DTYPE, Pingpong>(), kernel<DTYPE, PingpongPair>(), kernel<DTYPE, Wide>()};
    const int64_t k_steps = ceil_div(p.a.cols, BLOCK_K);
    const auto cost = [&](const Kernel& k) {
        const int64_t tiles = tiles_of(k, p) * p.out.batch, blocks = blocks_of(k, p, multiprocessors);
        if (!blocks) return std::pair(INT64_MAX, INT64_MAX);  // no room for a cluster
        const int64_t step = std::max<int64_t>(k.step_clocks, k.step_bytes * blocks / L2_BYTES);
        return std::pair(ceil_div(tiles, blocks) * (k_steps * step + k.tile_clocks), tiles * k_steps * k.step_bytes);
    };
    const auto cheaper = [&](const Kernel& a, const Kernel& b) { return cost(a) < cost(b); };
    return *std::min_element(std::begin(table), std::end(table), cheaper);
}

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function, without linking to the driver: the module is imported on machines that have none.
Encode find_encode() {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
    if (error) cudaGetLastError();
    return !error && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
}

// A map of boxes of `box_rows` rows of 64 elements; false if there is none, as of rows that begin at odd addresses.
bool encode(CUtensorMap& map, const Stack& s, DType dtype, int box_rows) {
    static const Encode encode_tiled = find_encode();
    if (!encode_tiled) return false;
    const auto type = dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    // A matrix alone may be any distance from the next.
    const int64_t batch_stride = s.batch > 1 ? s.batch_stride : s.row_stride;
    const cuuint64_t dims[] = {
        static_cast<cuuint64_t>(s.cols), static_cast<cuuint64_t>(s.rows), static_cast<cuuint64_t>(s.batch)
    };
    const cuuint64_t strides[] = {static_cast<cuuint64_t>(2 * s.row_stride), static_cast<cuuint64_t>(2 * batch_stride)};
    const cuuint32_t box[] = {BLOCK, static_cast<cuuint32_t>(box_rows), 1}, steps[] = {1, 1, 1};
    const CUresult result = encode_tiled(
        &map, type, 3, s.data, dims, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE
    );
    return result == CUDA_SUCCESS;
}

bool encode_all(Arguments& args, const Product& p, const Kernel& k, DType dtype) {
    if (!encode(args.a, p.a, dtype, k.block_m) || !encode(args.out, p.out, dtype, BLOCK)) return false;
    if (!encode(args.b, p.b, dtype, p.b_transposed ? k.share_n : BLOCK_K)) return false;
    const AddedMatrices added(p);
    args.addend_count = added.count;
    for (int i = 0; i < added.count; ++i) {
        const Added& c = added.list[i];
        if (!encode(args.addends[i].map, c.matrix, dtype, BLOCK)) return false;
        args.addends[i].factor = c.factor, args.addends[i].by_row = c.row, args.addends[i].by_col = c.col;
    }
    return true;
}

Arguments arguments(const Product& p, const Kernel& k) {
    Arguments args{};
    args.m = static_cast<int>(p.out.rows), args.n = static_cast<int>(p.out.cols);
    args.k_steps = static_cast<int>(ceil_div(p.a.cols, BLOCK_K));
    args.clusters_m = static_cast<int>(cluster_rows_of(k, p));
    args.tiles_n = static_cast<int>(ceil_div(p.out.cols, k.block_n));
    args.tiles = static_cast<unsigned>(tiles_of(k, p));
    args.all_tiles = static_cast<unsigned>(args.tiles * p.out.batch);
    args.symmetric = p.symmetric;
    args.a_diagonal = p.a_diagonal, args.b_diagonal = p.b_diagonal, args.c_diagonal = p.c_diagonal;
    args.out_diagonal = p.out_diagonal;
    args.alpha = p.alpha, args.beta = p.beta, args.gamma = p.gamma, args.scale = p.scale;
    return args;
}

}  // namespace

bool launch_sm90(const Product& p, DType dtype, int multiprocessors, Launch& launch) {
    if (!p.a.cols) return false;  // no map of nothing
    const Kernel k =
        dtype == DType::bf16 ? choose<DType::bf16>(p, multiprocessors) : choose<DType::f16>(p, multiprocessors);
    Arguments args = arguments(p, k);
    if (!encode_all(args, p, k, dtype)) return false;
    launch.kernel = p.b_transposed ? k.transposed : k.plain;
    launch.blocks = static_cast<unsigned>(blocks_of(k, p, multiprocessors));
    launch.cluster = static_cast<unsigned>(k.cluster);
    launch.threads = THREADS, launch.shared_bytes = static_cast<unsigned>(k.shared_bytes);
    static_assert(sizeof args <= sizeof launch.arguments);
    std::memcpy(launch.arguments, &args, sizeof args);
    return true;
}

}  // namespace muon_kernels::cuda
