// Register transpositions of 16-bit blocks. AVX2 suffices for all instruction sets: they are a small share
// of any kernel that uses them.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace muon_kernels::cpu {
namespace {

// dst[j][i] = element j of r[i], for sixteen rows of 16-bit words.
inline void transpose_16x16_u16(__m256i (&r)[16], uint16_t* dst, int64_t dst_stride) {
    __m256i t[16];
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm256_unpacklo_epi16(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_epi16(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i) {
        for (int h = 0; h < 2; ++h) {
            r[4 * i + 2 * h] = _mm256_unpacklo_epi32(t[4 * i + h], t[4 * i + 2 + h]);
            r[4 * i + 2 * h + 1] = _mm256_unpackhi_epi32(t[4 * i + h], t[4 * i + 2 + h]);
        }
    }
    for (int i = 0; i < 2; ++i) {
        for (int h = 0; h < 4; ++h) {
            t[8 * i + 2 * h] = _mm256_unpacklo_epi64(r[8 * i + h], r[8 * i + 4 + h]);
            t[8 * i + 2 * h + 1] = _mm256_unpackhi_epi64(r[8 * i + h], r[8 * i + 4 + h]);
        }
    }
    for (int i = 0; i < 8; ++i) {
        __m256i low = _mm256_permute2x128_si256(t[i], t[i + 8], 0x20);
        __m256i high = _mm256_permute2x128_si256(t[i], t[i + 8], 0x31);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + i * dst_stride), low);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + (i + 8) * dst_stride), high);
    }
}

inline void transpose_16x16_u16(const uint16_t* src, int64_t src_stride, uint16_t* dst, int64_t dst_stride) {
    __m256i r[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i * src_stride));
    transpose_16x16_u16(r, dst, dst_stride);
}

// dst[j][i] = element j of r[i], for eight rows of sixteen.
inline void transpose_8x16_u16(const __m256i (&r)[8], uint16_t* dst, int64_t dst_stride) {
    __m256i s[8], t[8];
    for (int i = 0; i < 4; ++i) {
        s[2 * i] = _mm256_unpacklo_epi16(r[2 * i], r[2 * i + 1]);
        s[2 * i + 1] = _mm256_unpackhi_epi16(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
        for (int h = 0; h < 2; ++h) {
            t[4 * i + 2 * h] = _mm256_unpacklo_epi32(s[4 * i + h], s[4 * i + 2 + h]);
            t[4 * i + 2 * h + 1] = _mm256_unpackhi_epi32(s[4 * i + h], s[4 * i + 2 + h]);
        }
    }
    for (int h = 0; h < 4; ++h) {  // both halves of a register hold a column: j and j + 8
        const __m256i columns[2] = {_mm256_unpacklo_epi64(t[h], t[4 + h]), _mm256_unpackhi_epi64(t[h], t[4 + h])};
        for (int i = 0; i < 2; ++i) {
            uint16_t* to = dst + (2 * h + i) * dst_stride;
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(columns[i]));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 8 * dst_stride), _mm256_extracti128_si256(columns[i], 1));
        }
    }
}

// Fewer than sixteen words. memcpy of any number would be a call.
inline void copy_few(uint16_t* to, const uint16_t* from, int64_t count) {
    int64_t i = 0;
    if (count & 8) std::memcpy(to, from, 16), i += 8;
    if (count & 4) std::memcpy(to + i, from + i, 8), i += 4;
    if (count & 2) std::memcpy(to + i, from + i, 4), i += 2;
    if (count & 1) to[i] = from[i];
}

// dst[j][i] = src[i][j] for the first `lines` of LINES lines, zero for the others, and all j < deep <= 16.
template <int LINES>
void transpose_lines(const uint16_t* src, int64_t stride, int64_t lines, int64_t deep, uint16_t (&dst)[16][LINES]) {
    static_assert(LINES == 8 || LINES == 16);
    __m256i r[LINES];
    for (int i = 0; i < LINES; ++i) {
        if (i >= lines) {
            r[i] = _mm256_setzero_si256();
        } else if (deep == 16) {
            r[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i * stride));
        } else {
            uint16_t line[16] = {};
            copy_few(line, src + i * stride, deep);
            r[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line));
        }
    }
    if constexpr (LINES == 8) {
        transpose_8x16_u16(r, dst[0], LINES);
    } else {
        transpose_16x16_u16(r, dst[0], LINES);
    }
}

// a[i][j] = a[j][i] for i < j < size, size <= 16.
inline void mirror_16x16_u16(uint16_t* a, int64_t stride, int64_t size) {
    if (size < 16) {
        for (int64_t j = 1; j < size; ++j) {
            for (int64_t i = 0; i < j; ++i) a[i * stride + j] = a[j * stride + i];
        }
        return;
    }
    alignas(32) uint16_t t[16][16];
    alignas(32) static constexpr int16_t kStep[32] = {0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,
                                                      -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
    transpose_16x16_u16(a, stride, t[0], 16);
    for (int i = 0; i < 16; ++i) {
        __m256i* row = reinterpret_cast<__m256i*>(a + i * stride);
        __m256i above = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kStep + 15 - i));
        __m256i mirrored = _mm256_load_si256(reinterpret_cast<const __m256i*>(t[i]));
        _mm256_storeu_si256(row, _mm256_blendv_epi8(_mm256_loadu_si256(row), mirrored, above));
    }
}

// dst[j][i] = src[i][j] for any rows x cols.
inline void transpose_u16(
    const uint16_t* src, int64_t src_stride, int64_t rows, int64_t cols, uint16_t* dst, int64_t dst_stride
) {
    for (int64_t i = 0; i < rows; i += 16) {
        for (int64_t j = 0; j < cols; j += 16) {
            if (i + 16 <= rows && j + 16 <= cols) {
                transpose_16x16_u16(src + i * src_stride + j, src_stride, dst + j * dst_stride + i, dst_stride);
                continue;
            }
            for (int64_t ii = i; ii < rows && ii < i + 16; ++ii) {
                for (int64_t jj = j; jj < cols && jj < j + 16; ++jj) {
                    dst[jj * dst_stride + ii] = src[ii * src_stride + jj];
                }
            }
        }
    }
}

}  // namespace
}  // namespace muon_kernels::cpu
