// The memory-bound verbs: one pass over gradient, momentum and workspace, one over workspace and parameter.
//
// A matrix is walked along the direction in which the parameter is contiguous. Where that is the direction of the rows
// of x, a line goes straight to x; otherwise sixteen lines are collected and transposed, so that memory is only ever
// read and written in whole cache lines.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "bf16.h"
#include "kernels.h"
#include "transpose.h"

namespace muon_kernels::cpu {
namespace {

// Elements handled at once, in the first-level cache: of a line that goes straight to x, and of one to be transposed,
// which is walked in few pieces because others come between them.
constexpr int64_t kRun = 256, kTransposedRun = 512;
constexpr int64_t kBlockElements = 1 << 16;
constexpr int kLines = 16;  // lines of a transposed block

struct Walk {
    bool along_rows;      // lines are the rows of x
    int64_t lines;        // in the matrix
    int64_t length;       // of a line
    int64_t block_lines;  // handled by one task
};

inline Walk walk(const Stack& x, const MatrixRef* refs) {
    // All matrices of a bucket could differ in layout, but results must not depend on how work is cut: the cut is by
    // elements, the same for both directions up to the rounding to whole lines.
    const bool along_rows = refs->col_stride == 1 || refs->row_stride != 1;
    const int64_t lines = along_rows ? x.rows : x.cols, length = along_rows ? x.cols : x.rows;
    const int64_t wanted = std::max<int64_t>(1, kBlockElements / std::max<int64_t>(length, 1));
    return {along_rows, lines, length, (wanted + kLines - 1) / kLines * kLines};
}

// Whether the rows of a matrix follow one another without a gap, there and in x: then they are one line.
inline bool gapless(const MatrixRef& ref, const Stack& x) {
    return ref.col_stride == 1 && ref.row_stride == x.cols && x.row_stride == x.cols;
}

inline int64_t most_blocks(const Stack& x) {
    const auto blocks = [](int64_t lines, int64_t length) {
        int64_t wanted = std::max<int64_t>(1, kBlockElements / std::max<int64_t>(length, 1));
        int64_t per_block = (wanted + kLines - 1) / kLines * kLines;
        return (lines + per_block - 1) / per_block;
    };
    return std::max(blocks(x.rows, x.cols), blocks(x.cols, x.rows));
}

inline void load_run(const void* base, DType dtype, int64_t offset, int64_t stride, int64_t n, float* out) {
    if (dtype == DType::f32) {
        const float* from = static_cast<const float*>(base) + offset;
        if (stride == 1) {
            for (int64_t i = 0; i < n; ++i) out[i] = from[i];
        } else {
            for (int64_t i = 0; i < n; ++i) out[i] = from[i * stride];
        }
    } else {
        const uint16_t* from = static_cast<const uint16_t*>(base) + offset;
        if (stride == 1) {
            for (int64_t i = 0; i < n; ++i) out[i] = to_float(from[i]);
        } else {
            for (int64_t i = 0; i < n; ++i) out[i] = to_float(from[i * stride]);
        }
    }
}

inline void store_run(void* base, DType dtype, int64_t offset, int64_t stride, int64_t n, const float* in) {
    if (dtype == DType::f32) {
        float* to = static_cast<float*>(base) + offset;
        if (stride == 1) {
            for (int64_t i = 0; i < n; ++i) to[i] = in[i];
        } else {
            for (int64_t i = 0; i < n; ++i) to[i * stride] = in[i];
        }
    } else {
        uint16_t* to = static_cast<uint16_t*>(base) + offset;
        if (stride == 1) {
            for (int64_t i = 0; i < n; ++i) to[i] = to_bf16(in[i]);
        } else {
            for (int64_t i = 0; i < n; ++i) to[i * stride] = to_bf16(in[i]);
        }
    }
}

// Sixteen running sums in double: wide enough to vectorize, always added in the same order.
struct SumOfSquares {
    double lane[16] = {};

    void add(const float* value, int64_t n) {
        int64_t i = 0;
        for (; i + 16 <= n; i += 16) {
            for (int l = 0; l < 16; ++l) lane[l] += static_cast<double>(value[i + l]) * value[i + l];
        }
        for (int l = 0; i + l < n; ++l) lane[l] += static_cast<double>(value[i + l]) * value[i + l];
    }

    double total() const {
        double sum = 0;
        for (int l = 0; l < 16; ++l) sum += lane[l];
        return sum;
    }
};

inline void* pointer(const MatrixRef& ref) { return reinterpret_cast<void*>(ref.address); }

// A run as floats: where it lies if it is that, else a copy in `room`.
inline float* run_of(void* base, DType dtype, int64_t offset, int64_t stride, int64_t n, float* room) {
    if (dtype == DType::f32 && stride == 1) return static_cast<float*>(base) + offset;
    load_run(base, dtype, offset, stride, n, room);
    return room;
}

// One run of `n` elements: updates the momentum and leaves the direction in `direction`.
inline void momentum_run(
    const MomentumUpdate& u, int64_t matrix, int64_t row, int64_t col, bool along_rows, int64_t n,
    float* __restrict direction
) {
    const MatrixRef& g = u.grad[matrix];
    alignas(64) float room[kTransposedRun];
    const float* __restrict grad = run_of(
        pointer(g), u.grad_dtype, row * g.row_stride + col * g.col_stride, along_rows ? g.col_stride : g.row_stride, n,
        room
    );
    const float grad_scale = u.grad_scale;
    if (grad_scale != 1.0f || !u.momentum) {
        for (int64_t i = 0; i < n; ++i) direction[i] = grad[i] * grad_scale;
        if (!u.momentum) return;
        std::memcpy(room, direction, static_cast<size_t>(n) * sizeof(float));
        grad = room;
    }

    const MatrixRef& b = u.momentum[matrix];
    const int64_t offset = row * b.row_stride + col * b.col_stride, stride = along_rows ? b.col_stride : b.row_stride;
    alignas(64) float buffer_room[kTransposedRun];
    float* __restrict buffer = run_of(pointer(b), u.momentum_dtype, offset, stride, n, buffer_room);
    const float mu = static_cast<float>(u.mu), rest = static_cast<float>(1.0 - u.mu);
    if (u.dampened) {
        // torch.lerp's two branches, so that a momentum buffer equals torch.optim.Muon's to the bit
        if (rest < 0.5f) {
            for (int64_t i = 0; i < n; ++i) buffer[i] = __builtin_fmaf(rest, grad[i] - buffer[i], buffer[i]);
        } else {
            for (int64_t i = 0; i < n; ++i) buffer[i] = __builtin_fmaf(rest - 1.0f, grad[i] - buffer[i], grad[i]);
        }
    } else {
        for (int64_t i = 0; i < n; ++i) buffer[i] = __builtin_fmaf(mu, buffer[i], grad[i]);
    }
    if (buffer == buffer_room) store_run(pointer(b), u.momentum_dtype, offset, stride, n, buffer);
    if (!u.nesterov) {
        for (int64_t i = 0; i < n; ++i) direction[i] = buffer[i];
    } else if (!u.dampened) {
        for (int64_t i = 0; i < n; ++i) direction[i] = __builtin_fmaf(mu, buffer[i], grad[i]);
    } else if (mu < 0.5f) {
        for (int64_t i = 0; i < n; ++i) direction[i] = __builtin_fmaf(mu, buffer[i] - grad[i], grad[i]);
    } else {
        for (int64_t i = 0; i < n; ++i) direction[i] = __builtin_fmaf(mu - 1.0f, buffer[i] - grad[i], buffer[i]);
    }
}

inline int64_t momentum_blocks(const MomentumUpdate& u) { return most_blocks(u.x); }

inline void momentum_block(const MomentumUpdate& u, int64_t matrix, int64_t block, double* sum_of_squares) {
    const MatrixRef* refs = u.momentum ? u.momentum + matrix : u.grad + matrix;
    const Walk w = walk(u.x, refs);
    const int64_t begin = block * w.block_lines, end = std::min(begin + w.block_lines, w.lines);
    uint16_t* x = u.x.data + matrix * u.x.batch_stride;
    SumOfSquares sum;
    alignas(64) float direction[kTransposedRun];
    if (w.along_rows) {
        const bool one = gapless(u.grad[matrix], u.x) && (!u.momentum || gapless(u.momentum[matrix], u.x));
        const int64_t step = one ? std::max<int64_t>(end - begin, 1) : 1, length = step * w.length;
        for (int64_t row = begin; row < end; row += step) {
            for (int64_t col = 0; col < length; col += kRun) {
                const int64_t n = std::min(kRun, length - col);
                momentum_run(u, matrix, row, col, true, n, direction);
                sum.add(direction, n);
                store_run(x, DType::bf16, row * u.x.row_stride + col, 1, n, direction);
            }
        }
    } else {
        alignas(64) uint16_t lines[kLines][kTransposedRun];
        for (int64_t col = begin; col < end; col += kLines) {
            const int64_t cols = std::min<int64_t>(kLines, end - col);
            for (int64_t row = 0; row < w.length; row += kTransposedRun) {
                const int64_t n = std::min(kTransposedRun, w.length - row);
                for (int64_t c = 0; c < cols; ++c) {
                    momentum_run(u, matrix, row, col + c, false, n, direction);
                    sum.add(direction, n);
                    store_run(lines[c], DType::bf16, 0, 1, n, direction);
                }
                transpose_u16(lines[0], kTransposedRun, cols, n, x + row * u.x.row_stride + col, u.x.row_stride);
            }
        }
    }
    *sum_of_squares = sum.total();
}

// x[matrix] *= 2^exponent, exactly unless the result leaves bf16's range. Returns the sum of the result's squares.
inline double rescale(const Stack& x, int64_t matrix, int exponent) {
    const float half = __builtin_ldexpf(1.0f, exponent / 2), rest = __builtin_ldexpf(1.0f, exponent - exponent / 2);
    double sum = 0;
    for (int64_t row = 0; row < x.rows; ++row) {
        uint16_t* to = x.data + matrix * x.batch_stride + row * x.row_stride;
        for (int64_t col = 0; col < x.cols; ++col) {
            to[col] = to_bf16(to_float(to[col]) * half * rest);
            sum += static_cast<double>(to_float(to[col])) * to_float(to[col]);
        }
    }
    return sum;
}

// The random bits of stochastic rounding, see ApplyOptions.
struct RandomBits {
    static constexpr uint64_t kStep = 0x9e3779b97f4a7c15u;
    uint64_t state;
    Window window;
    int64_t blocks;  // in two rows of the whole

    static uint64_t mixed(uint64_t z) {
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }

    RandomBits(const Stack& x, const ApplyOptions& options, int64_t matrix) : window(options.window) {
        const int64_t number = options.number ? options.number[matrix] : matrix;
        state = mixed(options.seed + static_cast<uint64_t>(number));
        blocks = ((window.cols ? window.cols : x.cols) + 1) / 2;
    }

    // Those of a run of x. Blocks are written as a whole: up to one element more than n.
    void run(int64_t row, int64_t col, bool along_rows, int64_t n, uint16_t* out) const {
        // Each with a constant of its own, where along_rows is one.
        if (window.turned) {
            of_whole(window.top + col, window.left + row, !along_rows, n, out);
        } else {
            of_whole(window.top + row, window.left + col, along_rows, n, out);
        }
    }

  private:
    void of_whole(int64_t row, int64_t col, bool along_rows, int64_t n, uint16_t* out) const {
        uint64_t block = state + static_cast<uint64_t>(row / 2 * blocks + col / 2 + 1) * kStep;
        const uint64_t step = static_cast<uint64_t>(along_rows ? 1 : blocks) * kStep;
        const int shift = static_cast<int>(along_rows ? 32 * (row % 2) : 16 * (col % 2));
        const int second = along_rows ? 16 : 32;
        if (n && (along_rows ? col : row) % 2) {
            *out++ = static_cast<uint16_t>(mixed(block) >> shift >> second);
            block += step;
            --n;
        }
        for (int64_t i = 0; 2 * i < n; ++i) {
            const uint64_t bits = mixed(block + static_cast<uint64_t>(i) * step) >> shift;
            out[2 * i] = static_cast<uint16_t>(bits);
            out[2 * i + 1] = static_cast<uint16_t>(bits >> second);
        }
    }
};

// Up with the probability that makes the mean exact: values that bf16 has stay, as do infinity and NaN.
inline uint16_t rounded_by(float value, uint16_t random) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : (bits + random) >> 16);
}

// decay where an update has the parameter's sign or is a zero, else 1. By the bits: the product of two small numbers
// would be a zero too, and GCC makes a branch, and no vectors, of a choice.
inline float cautious_decay(float param, uint16_t update, float decay) {
    uint32_t bits, factor, one = 0x3f800000u;
    std::memcpy(&bits, &param, sizeof(bits));
    std::memcpy(&factor, &decay, sizeof(factor));
    const uint32_t change = (static_cast<uint32_t>(update) << 16) ^ (bits & 0x80000000u);
    const uint32_t away = 0u - static_cast<uint32_t>(change > 0x80000000u);
    factor = (one & away) | (factor & ~away);
    std::memcpy(&decay, &factor, sizeof(decay));
    return decay;
}

template <bool CAUTIOUS, bool STOCHASTIC>
inline void apply_run(
    const ApplyUpdate& u, const RandomBits& random, int64_t matrix, int64_t row, int64_t col, bool along_rows,
    int64_t n, const uint16_t* update
) {
    const MatrixRef& p = u.param[matrix];
    const int64_t offset = row * p.row_stride + col * p.col_stride, stride = along_rows ? p.col_stride : p.row_stride;
    const float decay = static_cast<float>(1 - u.lr * u.weight_decay);
    const float step_size = static_cast<float>(u.lr * u.ratio[matrix]);
    alignas(64) float room[kTransposedRun];
    float* __restrict value = run_of(pointer(p), u.param_dtype, offset, stride, n, room);
    for (int64_t i = 0; i < n; ++i) {
        const float factor = CAUTIOUS ? cautious_decay(value[i], update[i], decay) : decay;
        value[i] = __builtin_fmaf(-step_size, to_float(update[i]), value[i] * factor);
    }
    if constexpr (STOCHASTIC) {
        alignas(64) uint16_t bits[kTransposedRun + 1];
        random.run(row, col, along_rows, n, bits);
        uint16_t* to = static_cast<uint16_t*>(pointer(p)) + offset;
        for (int64_t i = 0; i < n; ++i) bits[i] = rounded_by(value[i], bits[i]);
        for (int64_t i = 0; i < n; ++i) to[i * stride] = bits[i];
    } else if (value == room) {
        store_run(pointer(p), u.param_dtype, offset, stride, n, value);
    }
}

inline int64_t apply_blocks(const ApplyUpdate& u) { return most_blocks(u.x); }

template <bool CAUTIOUS, bool STOCHASTIC>
inline void apply_lines(const ApplyUpdate& u, const ApplyOptions& options, int64_t matrix, int64_t block) {
    const RandomBits random(u.x, options, matrix);
    const Walk w = walk(u.x, u.param + matrix);
    const int64_t begin = block * w.block_lines, end = std::min(begin + w.block_lines, w.lines);
    const uint16_t* x = u.x.data + matrix * u.x.batch_stride;
    if (w.along_rows) {
        // Random bits are of a place, which a line of several rows would not have.
        const int64_t step = !STOCHASTIC && gapless(u.param[matrix], u.x) ? std::max<int64_t>(end - begin, 1) : 1;
        const int64_t length = step * w.length;
        for (int64_t row = begin; row < end; row += step) {
            for (int64_t col = 0; col < length; col += kRun) {
                const int64_t n = std::min(kRun, length - col);
                const uint16_t* update = x + row * u.x.row_stride + col;
                apply_run<CAUTIOUS, STOCHASTIC>(u, random, matrix, row, col, true, n, update);
            }
        }
        return;
    }
    alignas(64) uint16_t lines[kLines][kTransposedRun];
    for (int64_t col = begin; col < end; col += kLines) {
        const int64_t cols = std::min<int64_t>(kLines, end - col);
        for (int64_t row = 0; row < w.length; row += kTransposedRun) {
            const int64_t n = std::min(kTransposedRun, w.length - row);
            transpose_u16(x + row * u.x.row_stride + col, u.x.row_stride, n, cols, lines[0], kTransposedRun);
            for (int64_t c = 0; c < cols; ++c) {
                apply_run<CAUTIOUS, STOCHASTIC>(u, random, matrix, row, col + c, false, n, lines[c]);
            }
        }
    }
}

inline void apply_block(const ApplyUpdate& u, const ApplyOptions& options, int64_t matrix, int64_t block) {
    const bool stochastic = options.stochastic_rounding && u.param_dtype == DType::bf16;
    auto* lines = options.cautious ? apply_lines<true, false> : apply_lines<false, false>;
    if (stochastic) lines = options.cautious ? apply_lines<true, true> : apply_lines<false, true>;
    lines(u, options, matrix, block);
}

}  // namespace
}  // namespace muon_kernels::cpu
