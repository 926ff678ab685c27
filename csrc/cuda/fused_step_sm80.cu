// A whole Muon step of a matrix by one block: the gradient, the momentum and the parameter stream through once or
// twice, and the Newton-Schulz iteration, in its Gram form, never leaves the registers.
//
// Or by several, each with a part of the columns, in two launches: only the first and the last of all products are with
// X. The first launch leaves the parts' R in memory. In the second every block adds them up, iterates as all of them
// do, and updates its own columns.
//
// Warp w owns rows 16w .. 16w + 15 of every M x M matrix. R and Q stay in its registers as accumulators of mma, whose
// layout is that of the next product's left operand; the right operand is the only matrix in shared memory.
//
// Precision. The Gram form multiplies X by a polynomial of R = X Xᵀ, and what rounding does to a small eigenvalue of R
// grows with the square of every `a` that follows. bf16 products would need a visit to X every other step. Here every
// number is a sum of two or three bf16 numbers, and a product is three or six on the tensor cores: 17 or 22 bits carry
// five to seven steps (see FusedStep). Nothing else is rounded: accumulators, R, Q and the result are fp32.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../muon_kernels.h"
#include "device.h"
#include "ptx.cuh"

namespace muon_kernels::cuda {
namespace {

constexpr int kMaxRows = 128;  // R and Q of more do not fit in registers
constexpr int kMaxSteps = 99;  // coefficients.py's limit
constexpr int kWarpRows = 16;  // of mma
constexpr int BLOCK_K = 32;    // columns of X in a tile
constexpr int kUnit = 4;       // consecutive elements that a thread handles at once: 16 bytes of fp32
constexpr int kUnits = 4;      // of a tile, per thread
constexpr int kParameterBytes = 32764;
constexpr int kMaxParts = 65535;  // of a grid's second side

// Of a number, at most. R, Q and their product take 192 registers of 255 where there are 128 rows: no room for more.
template <int M>
constexpr int kTerms = M == 128 ? 2 : 3;

struct Matrix {
    MatrixRef grad, momentum, param;
    double ratio;
};

// What a launch does of a step.
enum class Stage : int32_t { whole, gram, update };

struct Settings {
    Stage stage;
    int rows, cols, steps, terms;
    int part_cols;   // columns of a part, whole tiles; the last part has what is left
    void* partials;  // a Partial for every part of every matrix, unless a stage is the whole step
    DType grad_dtype, momentum_dtype, param_dtype;
    bool has_momentum, nesterov, dampened, cautious;
    float grad_scale, mu, rest;  // rest = 1 - mu
    float eps, margin;
    double lr, weight_decay;
    const float* device_lr;
    const float* device_weight_decay;
    float coefficients[kMaxSteps][3];
};

constexpr int kCapacity = (kParameterBytes - sizeof(Settings)) / sizeof(Matrix) / 4 * 4;

struct Arguments {
    Settings settings;
    Matrix matrices[kCapacity];
};
static_assert(sizeof(Arguments) <= kParameterBytes);

// --- A matrix in global memory, walked in units along the lines of the tile ---

// Tall: X is stored column by column, so the lines of its tiles are columns.
template <int M, bool TALL>
struct Tile {
    static constexpr int kThreads = 2 * M;
    static constexpr int kLines = TALL ? BLOCK_K : M;
    static constexpr int kLength = TALL ? M : BLOCK_K;
    static constexpr int kChunks = kLength / 8;  // of 16 bytes in a line of bf16
    static constexpr int kElements = kLines * kLength;
    // fp32; padded so that neither the fragments of mma nor whole lines meet a bank twice
    static constexpr int kWideStride = kLength + (TALL ? 4 : 8);
    static_assert(kElements == kThreads * kUnits * kUnit);

    // Of unit `u` of this thread.
    static __device__ int line(int u) { return (u * kThreads + threadIdx.x) / (kLength / kUnit); }
    static __device__ int place(int u) { return (u * kThreads + threadIdx.x) % (kLength / kUnit) * kUnit; }
};

struct Span {
    int64_t address;
    int64_t line_stride;
    int64_t stride;
    bool wide;     // fp32
    bool half;     // f16, else bf16
    bool vectors;  // units are contiguous and aligned

    __device__ Span(const MatrixRef& ref, DType dtype, bool tall)
        : address(ref.address),
          line_stride(tall ? ref.col_stride : ref.row_stride),
          stride(tall ? ref.row_stride : ref.col_stride),
          wide(dtype == DType::f32),
          half(dtype == DType::f16) {
        vectors = stride == 1 && line_stride % kUnit == 0 && address % (wide ? 16 : 8) == 0;
    }
};

__device__ void widen(float (&x)[kUnit], uint2 bits, bool half) {
    const float2 first = unpack(bits.x, half), second = unpack(bits.y, half);
    x[0] = first.x, x[1] = first.y, x[2] = second.x, x[3] = second.y;
}

// `count` elements, the others zero.
__device__ void load(float (&x)[kUnit], const Span& from, int64_t line, int64_t place, int count) {
    const int64_t offset = line * from.line_stride + place * from.stride;
    const bool whole = from.vectors && count == kUnit;
    if (from.wide) {
        const float* p = reinterpret_cast<const float*>(from.address) + offset;
        if (whole) {
            const float4 v = *reinterpret_cast<const float4*>(p);
            x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
        } else {
#pragma unroll
            for (int i = 0; i < kUnit; ++i) x[i] = i < count ? p[i * from.stride] : 0.0f;
        }
    } else {
        const uint16_t* p = reinterpret_cast<const uint16_t*>(from.address) + offset;
        uint2 bits = {};
        if (whole) {
            bits = *reinterpret_cast<const uint2*>(p);
        } else {
            if (count > 0) bits.x = p[0];
            if (count > 1) bits.x |= p[from.stride] << 16;
            if (count > 2) bits.y = p[2 * from.stride];
            if (count > 3) bits.y |= p[3 * from.stride] << 16;
        }
        widen(x, bits, from.half);
    }
}

// Leaves in x what was stored.
__device__ void store(float (&x)[kUnit], const Span& to, int64_t line, int64_t place, int count) {
    const int64_t offset = line * to.line_stride + place * to.stride;
    const bool whole = to.vectors && count == kUnit;
    if (to.wide) {
        float* p = reinterpret_cast<float*>(to.address) + offset;
        if (whole) {
            *reinterpret_cast<float4*>(p) = make_float4(x[0], x[1], x[2], x[3]);
        } else {
#pragma unroll
            for (int i = 0; i < kUnit; ++i) {
                if (i < count) p[i * to.stride] = x[i];
            }
        }
    } else {
        uint16_t* p = reinterpret_cast<uint16_t*>(to.address) + offset;
        const uint2 bits = {pack(x[0], x[1], to.half), pack(x[2], x[3], to.half)};
        widen(x, bits, to.half);
        if (whole) {
            *reinterpret_cast<uint2*>(p) = bits;
        } else {
            if (count > 0) p[0] = static_cast<uint16_t>(bits.x);
            if (count > 1) p[to.stride] = static_cast<uint16_t>(bits.x >> 16);
            if (count > 2) p[2 * to.stride] = static_cast<uint16_t>(bits.y);
            if (count > 3) p[3 * to.stride] = static_cast<uint16_t>(bits.y >> 16);
        }
    }
}

// torch.lerp, with its two branches: a momentum buffer equals torch.optim.Muon's to the bit.
__device__ float lerp(float from, float to, float weight) {
    return weight < 0.5f ? fmaf(weight, to - from, from) : fmaf(weight - 1.0f, to - from, to);
}

// What a thread reads of a tile of X.
template <int M, bool TALL>
struct Direction {
    using T = Tile<M, TALL>;
    float grad[kUnits][kUnit], momentum[kUnits][kUnit];

    static __device__ int count(const Settings& s, int col, int u) {
        const int line = T::line(u), place = T::place(u);
        const int lines = TALL ? s.cols - col : s.rows, length = TALL ? s.rows : s.cols - col;
        return line < lines ? min(kUnit, length - place) : 0;  // may be negative
    }

    static __device__ int64_t line(int col, int u) { return T::line(u) + (TALL ? col : 0); }
    static __device__ int64_t place(int col, int u) { return T::place(u) + (TALL ? 0 : col); }

    __device__ void load(const Settings& s, const Span& g, const Span& b, int col, bool with_grad) {
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
            const int n = count(s, col, u);
            if (with_grad) cuda::load(grad[u], g, line(col, u), place(col, u), n);
            if (s.has_momentum) cuda::load(momentum[u], b, line(col, u), place(col, u), n);
        }
    }

    // From here on `momentum` is what the buffer holds, after its rounding: the second pass reads the same.
    __device__ void update_momentum(const Settings& s, const Span& b, int col) {
        if (!s.has_momentum) return;
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
#pragma unroll
            for (int i = 0; i < kUnit; ++i) {
                const float g = grad[u][i] * s.grad_scale;
                momentum[u][i] = s.dampened ? lerp(momentum[u][i], g, s.rest) : fmaf(s.mu, momentum[u][i], g);
            }
            cuda::store(momentum[u], b, line(col, u), place(col, u), count(s, col, u));
        }
    }

    __device__ float at(const Settings& s, int u, int i) const {
        if (s.has_momentum && !s.nesterov) return momentum[u][i];
        const float g = grad[u][i] * s.grad_scale;
        if (!s.has_momentum) return g;
        return s.dampened ? lerp(g, momentum[u][i], s.mu) : fmaf(s.mu, momentum[u][i], g);
    }
};

// The same value, but the compiler does not know: what is derived from it is calculated again and not kept in
// registers, which the iteration has none to spare of.
__device__ uint32_t opaque(uint32_t value) {
    asm volatile("" : "+r"(value));
    return value;
}

__device__ float opaque(float value) {
    asm volatile("" : "+f"(value));
    return value;
}

// --- Numbers as sums of bf16 numbers, in shared memory and in fragments ---

template <int TERMS>
__device__ void split(uint32_t (&terms)[TERMS], float low, float high) {
#pragma unroll
    for (int t = 0; t < TERMS; ++t) {
        terms[t] = cvt_rn_bf16x2(low, high);
        const float2 term = unpack(terms[t], false);
        low -= term.x;
        high -= term.y;
    }
}

// Lines of bf16 in shared memory, their 16-byte chunks permuted so that eight consecutive lines' chunks, ldmatrix's
// rows, lie in different banks.
template <int CHUNKS>
__device__ uint32_t chunk_offset(int line, int chunk) {
    constexpr int kLinesOfBanks = CHUNKS < 8 ? 8 / CHUNKS : 1;
    constexpr int kMask = CHUNKS < 8 ? CHUNKS - 1 : 7;
    return (line * CHUNKS + (chunk ^ (line / kLinesOfBanks & kMask))) * 16;
}

// The four 8x8 matrices of 16 lines and 16 columns. As a left operand with rows as lines, or a right operand with k as
// lines (then transposed), the matrices go down first; else across first.
template <int CHUNKS, bool TRANS>
__device__ void load_fragment(uint32_t (&r)[4], uint32_t base, int lane, int line, int column, bool across) {
    const int second = lane / 8 & 1, third = lane / 16;
    const uint32_t from =
        base +
        chunk_offset<CHUNKS>(line + lane % 8 + 8 * (across ? third : second), column / 8 + (across ? second : third));
    TRANS ? ldmatrix_x4_trans(r, from) : ldmatrix_x4(r, from);
}

template <int M>
using Fragment = uint32_t[kTerms<M>][4];

// Adds to two tiles of eight columns; load(r, t) fetches term t of the right operand. The smallest products come about
// first, and only one term of the right operand occupies registers.
template <int TERMS, typename Load>
__device__ void multiply(float (*c)[4], const uint32_t (&a)[TERMS][4], int terms, Load load) {
#pragma unroll
    for (int t = TERMS - 1; t >= 0; --t) {
        if (t >= terms) continue;
        uint32_t b[4];
        load(b, t);
#pragma unroll
        for (int of_a = TERMS - 1 - t; of_a >= 0; --of_a) {
            if (of_a + t >= terms) continue;
            mma_m16n8k16_bf16(c[0], a[of_a], b[0], b[1]);
            mma_m16n8k16_bf16(c[1], a[of_a], b[2], b[3]);
        }
    }
}

// Tensor cores cut off what they add to an accumulator, so long sums drift: they only add up one tile, and the tiles
// are added in fp32.
__device__ void add(float (&to)[4], const float (&c)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] += c[i];
}

// A warp's 16 rows of an M x M matrix: element i of tile j is in row lane / 4 + 8 (i / 2), column 8 j + 2 (lane % 4) +
// i % 2.
template <int M>
using Rows = float[M / 8][4];

// The diagonal of this thread's part of such a matrix.
struct Diagonal {
    int row_minus_column = static_cast<int>(opaque(threadIdx.x / 32 * kWarpRows + threadIdx.x % 32 / 4)) -
                           static_cast<int>(threadIdx.x % 4 * 2);

    __device__ bool has(int j, int i) const { return row_minus_column + 8 * (i / 2) - i % 2 == 8 * j; }
};

// Columns 16k .. 16k + 15 of x or y.
template <int M>
__device__ void left_operand(Fragment<M>& a, const Rows<M>& x, const Rows<M>& y, bool of_x, int k) {
    uint32_t terms[kTerms<M>];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
        const int j = 2 * k + q / 2, i = q % 2 * 2;
        split(terms, opaque(of_x ? x[j][i] : y[j][i]), opaque(of_x ? x[j][i + 1] : y[j][i + 1]));
#pragma unroll
        for (int t = 0; t < kTerms<M>; ++t) a[t][q] = terms[t];
    }
}

template <int M>
struct Square {
    static constexpr int kTermBytes = M * M * 2;
    uint32_t base;

    __device__ void store(const Rows<M>& x, int terms) const {
        const int thread = static_cast<int>(opaque(threadIdx.x)), lane = thread % 32,
                  row = thread / 32 * kWarpRows + lane / 4;
#pragma unroll
        for (int j = 0; j < M / 8; ++j) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                uint32_t parts[kTerms<M>];
                split(parts, x[j][2 * half], x[j][2 * half + 1]);
                const uint32_t to = base + chunk_offset<M / 8>(row + 8 * half, j) + lane % 4 * 4;
#pragma unroll
                for (int t = 0; t < kTerms<M>; ++t) {
                    if (t < terms) st_shared_b32(to + t * kTermBytes, parts[t]);
                }
            }
        }
    }

    // The same, once nobody reads what was there.
    __device__ void replace(const Rows<M>& x, int terms) const {
        __syncthreads();
        store(x, terms);
        __syncthreads();
    }

    // out = (of_x ? x : y) * this matrix. Every matrix here is symmetric but for its rounding, yet its transpose must
    // not be taken for it: in R Sᵀ Sᵀ the antisymmetric part grows a thousand times faster than in R S S.
    __device__ void right_multiply(Rows<M>& out, const Rows<M>& x, const Rows<M>& y, bool of_x, int terms) const {
#pragma unroll
        for (int j = 0; j < M / 8; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) out[j][i] = 0;
        }
#pragma unroll
        for (int k = 0; k < M / 16; ++k) {
            // Neither may addresses stay in registers nor fragments be loaded ahead: there is no room.
            __syncwarp();
            const int lane = static_cast<int>(opaque(threadIdx.x) % 32);
            Fragment<M> left;
            left_operand<M>(left, x, y, of_x, k);
#pragma unroll
            for (int j = 0; j < M / 8; j += 2) {
                const auto load = [&](uint32_t (&r)[4], int t) {
                    load_fragment<M / 8, true>(r, base + t * kTermBytes, lane, 16 * k, 8 * j, false);
                };
                if constexpr (M == 128) {  // no registers for sums: 24 truncations, a fifth of what two terms round off
                    multiply(&out[j], left, terms, load);
                } else {
                    float sum[2][4] = {};
                    multiply(sum, left, terms, load);
                    add(out[j], sum[0]);
                    add(out[j + 1], sum[1]);
                }
            }
        }
    }
};

template <int M, bool TALL>
struct SharedTile {
    using T = Tile<M, TALL>;
    static constexpr int kTermBytes = T::kElements * 2;
    uint32_t base;

    __device__ void store(const float (&x)[kUnit], int u, int terms) const {
        uint32_t low[kTerms<M>], high[kTerms<M>];
        split(low, x[0], x[1]);
        split(high, x[2], x[3]);
        const int place = T::place(u);
        const uint32_t to = base + chunk_offset<T::kChunks>(T::line(u), place / 8) + place % 8 * 2;
#pragma unroll
        for (int t = 0; t < kTerms<M>; ++t) {
            if (t < terms) st_shared_v2(to + t * kTermBytes, low[t], high[t]);
        }
    }

    // r += this warp's rows of X Xᵀ
    __device__ void add_gram(Rows<M>& r, int terms) const {
        const int row = threadIdx.x / 32 * kWarpRows;
#pragma unroll 1
        for (int k = 0; k < BLOCK_K; k += 16) {
            Fragment<M> left;
#pragma unroll
            for (int t = 0; t < kTerms<M>; ++t) {
                if (t < terms) load(left[t], t, row, k, TALL);
            }
#pragma unroll
            for (int j = 0; j < M / 8; j += 2) {
                float sum[2][4] = {};
                multiply(sum, left, terms, [&](uint32_t (&r)[4], int t) { load(r, t, 8 * j, k, !TALL); });
                add(r[j], sum[0]);
                add(r[j + 1], sum[1]);
            }
        }
    }

    // out = this warp's rows of Q X, two tiles of columns at `col`
    __device__ void left_multiply(float (&out)[2][4], const Fragment<M> (&q)[M / 16], int col, int terms) const {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) out[j][i] = 0;
        }
#pragma unroll
        for (int k = 0; k < M / 16; ++k) {
            float sum[2][4] = {};
            multiply(sum, q[k], terms, [&](uint32_t (&r)[4], int t) {
                const uint32_t from = base + t * kTermBytes;
                TALL ? load_fragment<T::kChunks, false>(r, from, threadIdx.x % 32, col, 16 * k, true)
                     : load_fragment<T::kChunks, true>(r, from, threadIdx.x % 32, 16 * k, col, false);
            });
            add(out[0], sum[0]);
            add(out[1], sum[1]);
        }
    }

  private:
    __device__ void load(uint32_t (&r)[4], int t, int row, int k, bool across) const {
        const uint32_t from = base + t * kTermBytes;
        TALL ? load_fragment<T::kChunks, true>(r, from, threadIdx.x % 32, k, row, across)
             : load_fragment<T::kChunks, false>(r, from, threadIdx.x % 32, row, k, across);
    }
};

// --- The kernel ---

__device__ float power_of_two(int exponent) { return __uint_as_float((exponent + 127) << 23); }  // -126 .. 127

// Of the threads' values, the same for all of them. What a block has in `scratch` is safe until its next barrier.
template <int M, typename Value, typename Combine>
__device__ Value block_reduce(Value value, Value* scratch, Combine combine) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        value = combine(value, __shfl_xor_sync(0xffffffff, value, distance));
    }
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    value = scratch[0];
#pragma unroll
    for (int warp = 1; warp < M / kWarpRows; ++warp) value = combine(value, scratch[warp]);
    return value;
}

// The iteration: R in, Q out.
template <int M>
__device__ void newton_schulz(Rows<M>& R, Rows<M>& Q, const Settings& s, const Square<M>& square) {
    square.store(R, s.terms);
    __syncthreads();
    // In every step S = f(R R), Q S, R S and (R S) S, which share their code: it is most of the kernel's. Only the left
    // operand and the place of the result differ. At first Q = S, and the last step ends with Q.
    const int last = 4 * s.steps - 3;
#pragma unroll 1
    for (int p = 0; p <= last; ++p) {
        if (p == 1) {
            if (last == 1) break;
            ++p;
        }
        const int phase = p % 4;
        Rows<M> product;
        square.right_multiply(product, R, Q, phase != 1, s.terms);
        if (phase == 0) {
            const float* triple = s.coefficients[p / 4];
            const Diagonal diagonal;
#pragma unroll
            for (int j = 0; j < M / 8; ++j) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float a = diagonal.has(j, i) ? triple[0] : 0.0f;
                    product[j][i] = fmaf(triple[2], product[j][i], fmaf(triple[1], R[j][i], a));
                }
            }
        }
        if (phase == 0 || phase == 3) square.replace(product, s.terms);
#pragma unroll
        for (int j = 0; j < M / 8; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                R[j][i] = phase > 1 ? product[j][i] : R[j][i];
                Q[j][i] = phase == 1 || p == 0 ? product[j][i] : Q[j][i];
            }
        }
    }
}

// What a block is about, all of it in constant memory.
struct Operands {
    const Settings& settings;
    const Matrix& matrix;

    int begin, end;  // of the part's columns

    explicit __device__ Operands(const Arguments& args)
        : settings(args.settings),
          matrix(args.matrices[opaque(blockIdx.x)]),
          begin(static_cast<int>(opaque(blockIdx.y)) * settings.part_cols),
          end(begin + min(settings.part_cols, settings.cols - begin)) {}
    template <bool TALL>
    __device__ Span grad() const {
        return {matrix.grad, settings.grad_dtype, TALL};
    }
    template <bool TALL>
    __device__ Span momentum() const {
        return {matrix.momentum, settings.momentum_dtype, TALL};
    }
    template <bool TALL>
    __device__ Span param() const {
        return {matrix.param, settings.param_dtype, TALL};
    }
    __device__ bool tall() const { return matrix.param.row_stride == 1 && matrix.param.col_stride != 1; }
};

// What a part leaves for the second launch: its R, as its threads have it, and the exponent of its X.
template <int M>
struct alignas(32) Partial {
    float4 R[M / 8][2 * M];
    int exponent;
};

template <int M>
__device__ Partial<M>* partials_of_matrix(const Settings& s) {
    return static_cast<Partial<M>*>(s.partials) + blockIdx.x * gridDim.y;
}

template <int M>
__device__ void leave(const Rows<M>& R, int exponent, Partial<M>& to) {
#pragma unroll
    for (int j = 0; j < M / 8; ++j) to.R[j][threadIdx.x] = make_float4(R[j][0], R[j][1], R[j][2], R[j][3]);
    if (threadIdx.x == 0) to.exponent = exponent;
}

// R of all columns. Every block of a matrix adds in the same order, and so has the same bits.
template <int M>
__device__ void sum(Rows<M>& R, int& exponent, const Partial<M>* partials) {
    __shared__ int maxima[M / kWarpRows];
    const int parts = static_cast<int>(gridDim.y);
    for (int part = threadIdx.x; part < parts; part += 2 * M) exponent = max(exponent, partials[part].exponent);
    exponent = block_reduce<M>(exponent, maxima, [](int a, int b) { return max(a, b); });
#pragma unroll(128 / M)
    for (int part = 0; part < parts; ++part) {
        const float shrink = power_of_two(max(partials[part].exponent - exponent, -126));
#pragma unroll
        for (int j = 0; j < M / 8; ++j) {
            const float4 r = partials[part].R[j][threadIdx.x];
            const float of_part[4] = {r.x, r.y, r.z, r.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) R[j][i] += of_part[i] * shrink * shrink;
        }
    }
}

// The first pass: R = (X 2^-exponent) (X 2^-exponent)ᵀ. X may have any scale: it is taken times the power of two that
// brings its largest element so far to [1, 2).
template <int M, bool TALL>
__device__ void gram(Rows<M>& R, int& exponent, const Operands& on, uint32_t shared) {
    __shared__ uint32_t maxima[M / kWarpRows];
    const Settings& s = on.settings;
    const Span grad = on.grad<TALL>(), momentum = on.momentum<TALL>();
    const SharedTile<M, TALL> tile{shared};
    Direction<M, TALL> x;
    x.load(s, grad, momentum, on.begin, true);
    for (int col = on.begin; col < on.end; col += BLOCK_K) {
        float d[kUnits][kUnit];
        uint32_t largest = 0;
        x.update_momentum(s, momentum, col);
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
#pragma unroll
            for (int i = 0; i < kUnit; ++i) {
                d[u][i] = x.at(s, u, i);
                largest = max(largest, __float_as_uint(fabsf(d[u][i])));
            }
        }
        if (col + BLOCK_K < on.end) x.load(s, grad, momentum, col + BLOCK_K, true);
        // Its barrier is also the one after which the tile may be written over.
        largest = block_reduce<M>(largest, maxima, [](uint32_t a, uint32_t b) { return max(a, b); });
        const int larger = min(static_cast<int>(largest >> 23) - 127, 126);
        if (larger > exponent) {
            const float shrink = power_of_two(max(exponent - larger, -126));
            exponent = larger;
#pragma unroll
            for (int j = 0; j < M / 8; ++j) {
#pragma unroll
                for (int i = 0; i < 4; ++i) R[j][i] = R[j][i] * shrink * shrink;
            }
        }
        const float scale = power_of_two(-exponent);
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
#pragma unroll
            for (int i = 0; i < kUnit; ++i) d[u][i] *= scale;
            tile.store(d[u], u, s.terms);
        }
        __syncthreads();
        tile.add_gram(R, s.terms);
    }
}

// The second pass: the parameter moves by scale Q X 2^-exponent.
template <int M, bool TALL>
__device__ void apply(const Fragment<M> (&q)[M / 16], float scale, int exponent, const Operands& on, uint32_t shared) {
    using T = Tile<M, TALL>;
    using D = Direction<M, TALL>;
    const Settings& s = on.settings;
    const Span grad = on.grad<TALL>(), momentum = on.momentum<TALL>(), param = on.param<TALL>();
    const SharedTile<M, TALL> tile{shared};
    const uint32_t update = shared + kTerms<M> * SharedTile<M, TALL>::kTermBytes;
    const int lane = threadIdx.x % 32, first_row = threadIdx.x / 32 * kWarpRows + lane / 4;
    const double lr = s.device_lr ? *s.device_lr : s.lr;
    const double weight_decay = s.device_weight_decay ? *s.device_weight_decay : s.weight_decay;
    const float decay = static_cast<float>(1 - lr * weight_decay), step_size = static_cast<float>(lr * on.matrix.ratio);
    const bool with_grad = !s.has_momentum || s.nesterov;
    D x;
    x.load(s, grad, momentum, on.begin, with_grad);
    for (int col = on.begin; col < on.end; col += BLOCK_K) {
        __syncthreads();
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
            float d[kUnit];
#pragma unroll
            for (int i = 0; i < kUnit; ++i) d[i] = x.at(s, u, i) * power_of_two(-exponent);
            tile.store(d, u, s.terms);
        }
        if (col + BLOCK_K < on.end) x.load(s, grad, momentum, col + BLOCK_K, with_grad);
        __syncthreads();
#pragma unroll 1
        for (int c = 0; c < BLOCK_K; c += 16) {
            float out[2][4];
            tile.left_multiply(out, q, c, s.terms);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int row = first_row + 8 * half, column = c + 8 * j + lane % 4 * 2;
                    const uint32_t first = __float_as_uint(scale * out[j][2 * half]),
                                   second = __float_as_uint(scale * out[j][2 * half + 1]);
                    if constexpr (TALL) {
                        st_shared_b32(update + (column * T::kWideStride + row) * 4, first);
                        st_shared_b32(update + ((column + 1) * T::kWideStride + row) * 4, second);
                    } else {
                        st_shared_v2(update + (row * T::kWideStride + column) * 4, first, second);
                    }
                }
            }
        }
        __syncthreads();
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
            const int count = D::count(s, col, u);
            uint32_t change_bits[4];
            ld_shared_v4(change_bits, update + (T::line(u) * T::kWideStride + T::place(u)) * 4);
            float p[kUnit];
            load(p, param, D::line(col, u), D::place(col, u), count);
#pragma unroll
            for (int i = 0; i < kUnit; ++i) {
                const float change = __uint_as_float(change_bits[i]);
                const bool decays = !s.cautious || change * p[i] >= 0;
                p[i] = fmaf(-step_size, change, decays ? p[i] * decay : p[i]);
            }
            store(p, param, D::line(col, u), D::place(col, u), count);
        }
    }
}

// Of R's trace, the squared norm: what brings the norm to 1 / margin. See MomentumUpdate for eps.
template <int M>
__device__ float reciprocal_norm(const Rows<M>& R, const Settings& s) {
    __shared__ float traces[M / kWarpRows];
    const Diagonal diagonal;
    float trace = 0;
#pragma unroll
    for (int j = 0; j < M / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (diagonal.has(j, i)) trace += R[j][i];
        }
    }
    trace = block_reduce<M>(trace, traces, [](float a, float b) { return a + b; });
    const float norm = sqrtf(trace), power = __uint_as_float(__float_as_uint(norm) & 0x7f800000);
    return norm == 0 ? 0 : 1 / (fmaxf(norm, s.eps * power) * s.margin);
}

// As many as registers allow without spilling.
constexpr int blocks_per_multiprocessor(int m) { return m == 128 ? 1 : m == 64 ? 2 : m == 32 ? 6 : 13; }

template <int M>
__global__ void __launch_bounds__(2 * M, blocks_per_multiprocessor(M)) fused_step_kernel(
    const __grid_constant__ Arguments args
) {
    extern __shared__ uint4 shared[];
    const uint32_t memory = shared_address(shared);
    const Settings& s = args.settings;
    __shared__ struct {
        float scale;
        int exponent;
        uint32_t memory;
    } of_x;  // waits for the second pass here, since the iteration needs every register
    Rows<M> R = {}, Q;
    {
        int exponent = -126;
        const Operands on(args);
        if (s.stage == Stage::update) {
            sum<M>(R, exponent, partials_of_matrix<M>(s));
        } else {
            on.tall() ? gram<M, true>(R, exponent, on, memory) : gram<M, false>(R, exponent, on, memory);
        }
        if (s.stage == Stage::gram) return leave<M>(R, exponent, partials_of_matrix<M>(s)[blockIdx.y]);
        if (threadIdx.x == 0) of_x.exponent = exponent;
    }
    const float scale = reciprocal_norm<M>(R, s);
    if (threadIdx.x == 0) of_x.scale = scale, of_x.memory = memory;
#pragma unroll
    for (int j = 0; j < M / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) R[j][i] *= scale * scale;
    }
    newton_schulz<M>(R, Q, s, Square<M>{memory});
    Fragment<M> q[M / 16];
#pragma unroll
    for (int k = 0; k < M / 16; ++k) left_operand<M>(q[k], Q, Q, true, k);
    const Operands on(args);
    on.tall() ? apply<M, true>(q, of_x.scale, of_x.exponent, on, of_x.memory)
              : apply<M, false>(q, of_x.scale, of_x.exponent, on, of_x.memory);
}

// --- The launch ---

template <int M, bool TALL>
constexpr int tile_bytes() {
    using T = Tile<M, TALL>;
    return kTerms<M> * SharedTile<M, TALL>::kTermBytes + T::kLines * T::kWideStride * 4;
}

template <int M>
Result launch(Arguments& args, int count, int parts, cudaStream_t stream) {
    const int square = args.settings.terms * Square<M>::kTermBytes;
    const int bytes = std::max(square, std::max(tile_bytes<M, false>(), tile_bytes<M, true>()));
    const auto kernel = known<fused_step_kernel<M>>();
    if (bytes > 48 << 10) {
        const Result allowed =
            reported(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
        if (allowed.status != Status::ok) return allowed;
    }
    const auto put = [&](Stage stage) {
        args.settings.stage = stage;
        kernel<<<dim3(count, parts), 2 * M, bytes, stream>>>(args);
        return launched();
    };
    if (parts == 1) return put(Stage::whole);
    const Result first = put(Stage::gram);
    return first.status == Status::ok ? put(Stage::update) : first;
}

// f(a number of rows that there is a kernel for, as a type), the smallest that holds so many.
template <typename F>
auto with_rows(int64_t rows, F f) {
    if (rows <= 16) return f(std::integral_constant<int, 16>{});
    if (rows <= 32) return f(std::integral_constant<int, 32>{});
    if (rows <= 64) return f(std::integral_constant<int, 64>{});
    return f(std::integral_constant<int, 128>{});
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Columns of a part.
int64_t part_cols(const FusedStep& f) { return ceil_div(ceil_div(f.cols, BLOCK_K), f.parts) * BLOCK_K; }

// Whether every part has columns, and a place to leave what it finds in them.
bool divided(const FusedStep& f) {
    return f.parts == 1 || (f.parts > 1 && f.parts <= kMaxParts && (f.parts - 1) * part_cols(f) < f.cols && f.partials);
}

bool supported(const FusedStep& f, const ApplyOptions& options) {
    return divided(f) && f.rows <= f.cols && f.rows <= kMaxRows && f.cols <= INT32_MAX - BLOCK_K && f.steps >= 1 &&
           f.steps <= kMaxSteps && f.terms >= 2 && f.terms <= (f.rows > 64 ? kTerms<128> : kTerms<64>) &&
           !options.stochastic_rounding;
}

}  // namespace

int64_t fused_capacity() { return kCapacity; }

int64_t fused_partial_bytes(int64_t rows) {
    return with_rows(rows, [](auto m) { return static_cast<int64_t>(sizeof(Partial<m>)); });
}

Result fused_step(const FusedStep& f, const ApplyOptions& options, Stream stream) {
    if (!supported(f, options)) return {Status::invalid_argument, 0};
    if (!f.count || !f.rows) return {Status::ok, 0};
    const Result device = supported();
    if (device.status != Status::ok) return device;

    Arguments args;
    Settings& s = args.settings;
    s.rows = static_cast<int>(f.rows);
    s.cols = static_cast<int>(f.cols);
    s.part_cols = static_cast<int>(part_cols(f));
    s.partials = f.partials;
    s.steps = f.steps;
    s.terms = f.terms;
    s.grad_dtype = f.momentum.grad_dtype;
    s.momentum_dtype = f.momentum.momentum_dtype;
    s.param_dtype = f.apply.param_dtype;
    s.has_momentum = f.momentum.momentum != nullptr;
    s.nesterov = f.momentum.nesterov;
    s.dampened = f.momentum.dampened;
    s.cautious = options.cautious;
    s.grad_scale = f.momentum.grad_scale;
    s.mu = static_cast<float>(f.momentum.mu);
    s.rest = static_cast<float>(1.0 - f.momentum.mu);
    s.eps = static_cast<float>(f.momentum.eps);
    s.margin = static_cast<float>(f.momentum.margin);
    s.lr = f.apply.lr;
    s.weight_decay = f.apply.weight_decay;
    s.device_lr = options.lr;
    s.device_weight_decay = options.weight_decay;
    std::copy(f.coefficients, f.coefficients + 3 * f.steps, s.coefficients[0]);
    for (int64_t first = 0; first < f.count; first += kCapacity) {
        const int count = static_cast<int>(std::min<int64_t>(kCapacity, f.count - first));
        for (int i = 0; i < count; ++i) {
            const int64_t from = first + i;
            args.matrices[i] = {
                f.momentum.grad[from], s.has_momentum ? f.momentum.momentum[from] : MatrixRef{}, f.apply.param[from],
                f.apply.ratio[from]
            };
        }
        const Result result = with_rows(f.rows, [&](auto m) {
            return launch<m>(args, count, f.parts, static_cast<cudaStream_t>(stream));
        });
        if (result.status != Status::ok) return result;
    }
    return {Status::ok, 0};
}

}  // namespace muon_kernels::cuda
