// What the memory-bound verbs share: lists of matrices that travel as a kernel's argument, and the way a block walks
// over a tile of one of them.
//
// A tile is walked along the direction in which the parameter is contiguous, so that memory is read and written in
// whole sectors. Where that is the direction of the columns of x, x passes through shared memory (Staged) and is
// contiguous along its rows all the same.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <climits>
#include <cstring>
#include <type_traits>

#include "device.h"
#include "ptx.cuh"

namespace muon_kernels::cuda {

constexpr int TILE = 64;      // rows and columns
constexpr int THREADS = 256;  // of a block, which has one tile
constexpr int PER_THREAD = TILE * TILE / THREADS;
constexpr int BLOCKS_PER_SM = 4;  // half of the threads a multiprocessor can have, each with 128 bytes under way

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Tiles of a matrix, row by row.
inline int64_t tiles(const Stack& x) { return ceil_div(x.rows, TILE) * ceil_div(x.cols, TILE); }

// Whether a tile's place in a matrix, and a block's in a grid, are ints.
inline bool fits(const Stack& x) { return std::max(x.rows, x.cols) <= INT_MAX - TILE && tiles(x) <= INT_MAX; }

// Whether rows of x can be moved 16 bytes at a time.
inline bool aligned(const Stack& x) {
    return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.batch_stride % 8 == 0 && x.row_stride % 8 == 0;
}

// ---- lists of matrices ----

// One of the operands of matrices that lie at equal steps, as the matrices of a 3-D parameter do.
struct Place {
    int64_t address;  // of the first matrix
    int64_t step;     // in bytes
    int64_t row_stride;
    int64_t col_stride;
};

template <int OPERANDS>
struct Run {
    int32_t begin;            // its first matrix, counted from the launch's first one
    uint32_t along_rows : 1;  // the walk's direction
    uint32_t vector : 1;      // all lines of all operands, and of x if they are its rows, consist of aligned vectors
    uint32_t number : 30;     // of its first matrix; the others follow
    double ratio;
    Place place[OPERANDS];
};

constexpr int kArgumentBytes = 32764;      // that a kernel can have, since CUDA 12.1
constexpr int kShortArgumentBytes = 4096;  // that every driver takes
constexpr int kOtherBytes = 256;           // of either, for what is not a list

// A launch copies all of its arguments, used or not, and a graph's node keeps them: hence the short list.
template <int OPERANDS, int BYTES = kArgumentBytes>
struct Runs {
    static constexpr int ARGUMENT_BYTES = BYTES;
    static constexpr int CAPACITY = (BYTES - kOtherBytes) / sizeof(Run<OPERANDS>);
    int32_t count;
    Run<OPERANDS> run[CAPACITY];
};

// The operands of a verb on the host: a list for each (or none), and the size of an element.
template <int OPERANDS>
struct Operands {
    const MatrixRef* refs[OPERANDS];
    int size[OPERANDS];
    const double* ratio;    // or none
    const int32_t* number;  // or none: 0, 1, 2, ...
    int vector;             // elements that are moved at once where that is possible
};

template <int OPERANDS>
Run<OPERANDS> single(const Stack& x, const Operands<OPERANDS>& operands, int64_t matrix) {
    Run<OPERANDS> run{};
    run.ratio = operands.ratio ? operands.ratio[matrix] : 0;
    run.number = operands.number ? operands.number[matrix] : static_cast<uint32_t>(matrix);
    const MatrixRef* walked = nullptr;  // the last operand is the one that is written
    for (const MatrixRef* refs : operands.refs) walked = refs ? refs + matrix : walked;
    run.along_rows = walked->col_stride == 1 || walked->row_stride != 1;
    run.vector = run.along_rows ? x.cols % operands.vector == 0 && aligned(x) : x.rows % operands.vector == 0;
    for (int i = 0; i < OPERANDS; ++i) {
        if (!operands.refs[i]) continue;
        const MatrixRef& m = operands.refs[i][matrix];
        const int64_t along = run.along_rows ? m.col_stride : m.row_stride;
        const int64_t across = run.along_rows ? m.row_stride : m.col_stride;
        run.place[i] = {m.address, 0, m.row_stride, m.col_stride};
        run.vector &=
            along == 1 && across % operands.vector == 0 && m.address % (operands.vector * operands.size[i]) == 0;
    }
    return run;
}

// Whether `next` goes on where `run` of `count` matrices ends; the second matrix of a run sets its step.
template <int OPERANDS>
bool continues(Run<OPERANDS>& run, int count, const Run<OPERANDS>& next) {
    if (run.along_rows != next.along_rows || run.vector != next.vector || run.ratio != next.ratio) return false;
    if (run.number + static_cast<uint32_t>(count) != next.number) return false;
    for (int i = 0; i < OPERANDS; ++i) {
        const Place &a = run.place[i], &b = next.place[i];
        if (a.row_stride != b.row_stride || a.col_stride != b.col_stride) return false;
        if (count > 1 && b.address != a.address + count * a.step) return false;
    }
    for (int i = 0; count == 1 && i < OPERANDS; ++i) run.place[i].step = next.place[i].address - run.place[i].address;
    return true;
}

template <int OPERANDS>
Runs<OPERANDS, kShortArgumentBytes> shortened(const Runs<OPERANDS>& runs) {
    Runs<OPERANDS, kShortArgumentBytes> few;
    few.count = runs.count;
    std::copy_n(runs.run, runs.count, few.run);
    return few;
}

// Calls launch(first, count, runs) for all matrices, with the list of `count` of them, the short one if it holds them:
// as few calls as the size of an argument and of a grid allow.
template <int OPERANDS, class Launch>
Result for_each_launch(const Stack& x, const Operands<OPERANDS>& operands, Launch launch) {
    Runs<OPERANDS> runs;
    const int64_t most = tiles(x) ? INT_MAX / tiles(x) : 0;
    for (int64_t first = 0, count; most && first < x.batch; first += count) {
        runs.count = 0;
        for (count = 0; first + count < x.batch && count < most; ++count) {
            Run<OPERANDS> next = single(x, operands, first + count);
            if (runs.count) {
                Run<OPERANDS>& last = runs.run[runs.count - 1];
                if (continues(last, static_cast<int>(count) - last.begin, next)) continue;
            }
            if (runs.count == Runs<OPERANDS>::CAPACITY) break;
            next.begin = static_cast<int32_t>(count);
            runs.run[runs.count++] = next;
        }
        const bool few = runs.count <= Runs<OPERANDS, kShortArgumentBytes>::CAPACITY;
        const Result result = few ? launch(first, count, shortened(runs)) : launch(first, count, runs);
        if (result.status != Status::ok) return result;
    }
    return kOk;
}

template <int OPERANDS, int BYTES>
__device__ const Run<OPERANDS>& run_of(const Runs<OPERANDS, BYTES>& runs, int matrix) {
    // No run is empty: the run of matrix i is not behind the i-th. If nothing could be joined it is the i-th.
    int low = 0, high = min(matrix, runs.count - 1);
    if (runs.run[high].begin <= matrix) return runs.run[high];
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        (runs.run[middle].begin <= matrix ? low : high) = middle;
    }
    return runs.run[low];
}

// ---- a block's tile ----

// Where a block works. The lines of a tile run in the direction of the walk.
struct Tile {
    int matrix, index;  // of the launch, of the matrix
    int row, col;       // of its first element
    int rows, cols;     // inside the matrix, at most TILE
};

__device__ inline Tile tile_at(const Stack& x, int matrix, int row, int col) {
    const int across = static_cast<int>((x.cols + TILE - 1) / TILE);
    return {
        matrix,
        row * across + col,
        row * TILE,
        col * TILE,
        static_cast<int>(min(x.rows - row * TILE, static_cast<int64_t>(TILE))),
        static_cast<int>(min(x.cols - col * TILE, static_cast<int64_t>(TILE)))
    };
}

__device__ inline Tile tile_of(const Stack& x, int matrix, int index) {
    const int across = static_cast<int>((x.cols + TILE - 1) / TILE);
    return tile_at(x, matrix, index / across, index % across);
}

// `tiles` of a matrix; in 32 bits, because a division of 64 is a function call. Neighbouring blocks have neighbouring
// tiles along the walk: together they read whole pages of the memory of the operands, which is most of the traffic.
template <int OPERANDS, int BYTES>
__device__ Tile
tile_of_block(const Stack& x, unsigned tiles, const Runs<OPERANDS, BYTES>& runs, const Run<OPERANDS>*& run) {
    const int matrix = blockIdx.x / tiles, index = blockIdx.x % tiles;
    run = &run_of(runs, matrix);
    if (run->along_rows) return tile_of(x, matrix, index);
    const int down = static_cast<int>((x.rows + TILE - 1) / TILE);
    return tile_at(x, matrix, index % down, index / down);
}

// Lines that a thread reads before it writes: of vectors all; of single elements, whose addresses would take too many
// registers, a few.
template <int V>
constexpr int AT_ONCE = V == 1 ? 4 : PER_THREAD / V;

// A thread has PER_THREAD elements: V consecutive ones of both lines of each of its pairs of lines. Pairs, because two
// neighbouring columns make one word of a row of x. A warp covers TILE elements of 32 * V / TILE lines. A slice is all
// of that or, from the thread's line `begin` on, LINES lines of it.
template <int V, int LINES = PER_THREAD / V>
struct Slice {
    const bool along_rows;
    const int line, along;  // of its first element in the tile
    int lines;              // from there on inside the matrix

    __device__ Slice(const Tile& tile, bool along_rows, int begin = 0)
        : along_rows(along_rows),
          line(2 * (threadIdx.x / (TILE / V)) + offset(begin)),
          along(threadIdx.x % (TILE / V) * V) {
        const bool inside = along < (along_rows ? tile.cols : tile.rows);
        lines = inside ? (along_rows ? tile.rows : tile.cols) - line : 0;
    }
    // The l-th line of the thread, counted from the first.
    __device__ static constexpr int offset(int l) { return l / 2 * 2 * (THREADS * V / TILE) + l % 2; }
    // Whether the V elements of line l are inside the matrix; if the first is, all are.
    __device__ bool has(int l) const { return offset(l) < lines; }
    __device__ int row(int l, int v) const { return along_rows ? line + offset(l) : along + v; }
    __device__ int col(int l, int v) const { return along_rows ? along + v : line + offset(l); }
};

// Where the lines of a slice lie in an operand.
template <class T, int V>
struct Lines {
    T* first;
    int64_t stride;

    template <int OPERANDS, int LINES>
    __device__ Lines(const Run<OPERANDS>& run, int operand, const Tile& tile, const Slice<V, LINES>& slice) {
        const Place& place = run.place[operand];
        const int64_t row = tile.row + slice.row(0, 0), col = tile.col + slice.col(0, 0);
        first = reinterpret_cast<T*>(place.address + (tile.matrix - run.begin) * place.step) + row * place.row_stride +
                col * place.col_stride;
        stride = slice.along_rows ? place.row_stride : place.col_stride;
    }
    __device__ T* operator[](int l) const { return first + Slice<V>::offset(l) * stride; }
};

// Elements that make an access of 16 bytes, of the larger type.
template <class A, class B = A>
constexpr int VECTOR = 16 / (sizeof(A) > sizeof(B) ? sizeof(A) : sizeof(B));

// ---- elements ----

template <int BYTES>
using Word = std::conditional_t<
    BYTES == 16, uint4,
    std::conditional_t<BYTES == 8, uint2, std::conditional_t<BYTES == 4, uint32_t, unsigned short>>>;

// One access. What the parameters' side reads and writes is not needed again soon: it should not drive x out of the
// cache.
template <class T, int V>
__device__ void load(const T* from, T (&to)[V]) {
    const auto word = __ldcs(reinterpret_cast<const Word<V * sizeof(T)>*>(from));
    memcpy(to, &word, sizeof(word));
}

template <class T, int V>
__device__ void store(T* to, const T (&from)[V]) {
    Word<V * sizeof(T)> word;
    memcpy(&word, from, sizeof(word));
    __stcs(reinterpret_cast<Word<V * sizeof(T)>*>(to), word);
}

// Rounded to nearest, ties to even.
template <class T>
__device__ T rounded(float value) {
    if constexpr (std::is_same_v<T, float>)
        return value;
    else if constexpr (std::is_same_v<T, __half>)
        return __float2half_rn(value);
    else
        return __float2bfloat16_rn(value);
}

// ---- x ----

__device__ inline uint16_t* x_at(const Stack& x, const Tile& tile, int row, int col) {
    return x.data + tile.matrix * x.batch_stride + (tile.row + row) * x.row_stride + tile.col + col;
}

// V elements of a row of x.
template <int V>
__device__ void load_x(const uint16_t* from, bool half, float (&to)[V]) {
    const auto word = __ldcs(reinterpret_cast<const Word<2 * V>*>(from));
    uint32_t words[(V + 1) / 2] = {};
    memcpy(words, &word, sizeof(word));
#pragma unroll
    for (int v = 0; v < V; ++v) {
        const float2 pair = unpack(words[v / 2], half);
        to[v] = v % 2 ? pair.y : pair.x;
    }
}

template <int V>
__device__ void store_x(uint16_t* to, bool half, const float (&from)[V]) {
    uint32_t words[(V + 1) / 2];
#pragma unroll
    for (int v = 0; v < V; v += 2) words[v / 2] = pack(from[v], v + 1 < V ? from[v + 1] : 0, half);
    Word<2 * V> word;
    memcpy(&word, words, sizeof(word));
    *reinterpret_cast<Word<2 * V>*>(to) = word;
}

// A tile of x in shared memory, a word for two neighbouring columns of a row. On one side a thread has a pair of
// columns and V rows, on the other 16 bytes of a row. Exclusive or with the row keeps the lanes of both in different
// banks (columns: 64 / V lanes apart by V rows, V >= 4, and 32 * V / 64 pairs; rows: eight lanes with 16 bytes each).
struct Staged {
    uint32_t word[TILE * TILE / 2];

    static constexpr int CHUNKS = TILE / 8;  // 16-byte ones of a row

    __device__ static int swizzle(int row) { return row / 4 * 2; }
    __device__ uint32_t& at(int row, int pair) { return word[row * (TILE / 2) + (pair ^ swizzle(row))]; }

    // Four words of a row. An odd row / 4 also exchanges the halves of a chunk.
    __device__ uint4& chunk(int row, int c) {
        return reinterpret_cast<uint4*>(word)[row * CHUNKS + (c ^ swizzle(row) / 4)];
    }
    __device__ static uint4 straightened(const uint4& w, int row) {
        return swizzle(row) & 2 ? uint4{w.z, w.w, w.x, w.y} : w;
    }

    // Calls f(row, column, chunk, elements inside the matrix) for the chunks of a thread.
    template <class F>
    __device__ static void for_each_chunk(const Tile& tile, F f) {
#pragma unroll
        for (int i = threadIdx.x; i < TILE * CHUNKS; i += THREADS) {
            const int row = i / CHUNKS, col = i % CHUNKS * 8;
            if (row < tile.rows && col < tile.cols) f(row, col, min(tile.cols - col, 8));
        }
    }
    __device__ void write_to(const Stack& x, const Tile& tile, bool aligned) {
        for_each_chunk(tile, [&](int row, int col, int count) {
            const uint4 word = straightened(chunk(row, col / 8), row);
            uint16_t* to = x_at(x, tile, row, col);
            if (aligned && count == 8) {
                *reinterpret_cast<uint4*>(to) = word;
            } else {
                uint16_t element[8];
                memcpy(element, &word, sizeof(word));
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    if (i < count) to[i] = element[i];
                }
            }
        });
    }
    __device__ void read_from(const Stack& x, const Tile& tile, bool aligned) {
        for_each_chunk(tile, [&](int row, int col, int count) {
            const uint16_t* from = x_at(x, tile, row, col);
            uint4 word;
            if (aligned && count == 8) {
                word = __ldcs(reinterpret_cast<const uint4*>(from));
            } else {
                uint16_t element[8];
#pragma unroll
                for (int i = 0; i < 8; ++i) element[i] = i < count ? from[i] : 0;
                memcpy(&word, element, sizeof(word));
            }
            chunk(row, col / 8) = straightened(word, row);
        });
    }
};

// ---- dtypes ----

// f(element of the type).
template <class F>
Result with_type(DType dtype, F f) {
    switch (dtype) {
        case DType::f32: return f(float{});
        case DType::bf16: return f(__nv_bfloat16{});
        case DType::f16: return f(__half{});
    }
    return kInvalidArgument;
}

}  // namespace muon_kernels::cuda
