// What the kernels of a product have in common on the host: what is added to one, and launches made ready to run.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../muon_kernels.h"
#include "device.h"

namespace muon_kernels::cuda {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A launch with its arguments, which may be repeated.
struct Launch {
    const void* kernel;
    unsigned blocks, threads, shared_bytes;
    unsigned cluster = 1;                 // blocks of one
    alignas(64) uint8_t arguments[1280];  // 64: tensor maps among them
};

// Every matrix that is added to a product is one of these: (factor + alpha (row[i] + col[j])) matrix[i][j]. So are the
// corrections diag(a_diagonal) b and a diag(b_diagonal), and a matrix that stands in several places is read once.
struct Added {
    Stack matrix;
    float factor;
    const float* row;  // [batch, m] or absent
    const float* col;  // [batch, n] or absent
};

struct AddedMatrices {
    Added list[3];
    int count = 0;

    explicit AddedMatrices(const Product& p);
    void add(const Stack& matrix, float factor, const float* row, const float* col);
};

// What multiplies p, which has elements, on the current device.
Launch launch_sm80(const Product& p, DType dtype, const Device& device);

// The same for compute capability 9.0; false where no tensor map describes an operand.
bool launch_sm90(const Product& p, DType dtype, int multiprocessors, Launch& launch);

}  // namespace muon_kernels::cuda
