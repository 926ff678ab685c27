// Products: which kernel runs one, checks, and launches, which a program makes ready once.
#include <algorithm>
#include <climits>
#include <memory>
#include <vector>

#include "../muon_kernels.h"
#include "device.h"
#include "product.h"

namespace muon_kernels::cuda {

AddedMatrices::AddedMatrices(const Product& p) {
    if (p.c.data) add(p.c, p.beta, nullptr, nullptr);
    if (p.a_diagonal) add(p.b_transposed ? p.a : p.b, 0.0f, p.a_diagonal, nullptr);
    if (p.b_diagonal) add(p.a, 0.0f, nullptr, p.b_diagonal);
}

void AddedMatrices::add(const Stack& s, float factor, const float* row, const float* col) {
    for (Added* c = list; c < list + count; ++c) {
        const Stack& m = c->matrix;
        if (m.data != s.data || m.batch_stride != s.batch_stride || m.row_stride != s.row_stride) continue;
        if (row) c->row = row;
        if (col) c->col = col;
        return;
    }
    list[count++] = {s, factor, row, col};
}

struct Program {
    std::vector<Launch> launches;
};

namespace {

constexpr int64_t kSmallestTile = 64;
constexpr unsigned kSharedBytes = 48 << 10;  // what a block has without asking

bool fits(const Stack& s, int64_t batch, int64_t rows, int64_t cols) {
    return s.batch == batch && s.rows == rows && s.cols == cols && s.row_stride >= cols &&
           (s.data || !batch || !rows || !cols);
}

bool valid(const Product& p) {
    const int64_t batch = p.out.batch, m = p.out.rows, n = p.out.cols, k = p.a.cols, most = 1 << 30;
    return batch >= 0 && m >= 0 && n >= 0 && k >= 0 && m <= most && n <= most && k <= most && fits(p.a, batch, m, k) &&
           (p.b_transposed ? fits(p.b, batch, n, k) : fits(p.b, batch, k, n)) &&
           (!p.c.data || fits(p.c, batch, m, n)) && fits(p.out, batch, m, n) && (!p.symmetric || m == n) &&
           (!p.a_diagonal || (m == k && (!p.b_transposed || k == n))) && (!p.b_diagonal || k == n) &&
           (!(p.c_diagonal || p.out_diagonal) || m == n) &&
           ceil_div(m, kSmallestTile) * ceil_div(n, kSmallestTile) <= INT_MAX / std::max<int64_t>(batch, 1);
}

// Which kernel multiplies: that for 9.0, which runs on nothing else, where it may and can.
Launch launch_of(const Product& p, DType dtype, [[maybe_unused]] bool wgmma, const Device& device) {
#ifdef MUON_KERNELS_SM90
    Launch launch;
    const bool can = device.major == 9 && device.minor == 0;
    if (wgmma && can && launch_sm90(p, dtype, device.multiprocessors, launch)) return launch;
#endif
    return launch_sm80(p, dtype, device);
}

cudaError_t run(const Launch& l, cudaStream_t stream) {
    void* parameters[] = {const_cast<uint8_t*>(l.arguments)};
    if (l.cluster == 1) return cudaLaunchKernel(l.kernel, l.blocks, l.threads, parameters, l.shared_bytes, stream);
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = l.cluster, cluster.val.clusterDim.y = 1, cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = l.blocks, config.blockDim = l.threads, config.dynamicSmemBytes = l.shared_bytes;
    config.stream = stream, config.attrs = &cluster, config.numAttrs = 1;
    return cudaLaunchKernelExC(&config, l.kernel, parameters);
}

Result prepare(const Product* list, int count, DType dtype, bool wgmma, Program& program) {
    if (dtype == DType::f32 || !std::all_of(list, list + count, valid)) return kInvalidArgument;
    Device device;
    const Result usable = current(device);
    if (usable.status != Status::ok) return usable;
    for (int i = 0; i < count; ++i) {
        const Product& p = list[i];
        if (!p.out.batch || !p.out.rows || !p.out.cols) continue;
        const Launch launch = launch_of(p, dtype, wgmma, device);
        if (launch.shared_bytes > kSharedBytes) {
            const int bytes = static_cast<int>(launch.shared_bytes);
            const cudaError_t error =
                cudaFuncSetAttribute(launch.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
            if (error) return reported(error);
        }
        program.launches.push_back(launch);
    }
    return kOk;
}

}  // namespace

Result prepare(const Product* list, int count, DType dtype, bool wgmma, std::shared_ptr<const Program>& program) {
    const auto made = std::make_shared<Program>();
    const Result result = prepare(list, count, dtype, wgmma, *made);
    if (result.status == Status::ok) program = made;
    return result;
}

Result run(const Program& program, Stream stream) {
    cudaError_t error = cudaSuccess;
    for (const Launch& launch : program.launches) {
        if (!error) error = run(launch, static_cast<cudaStream_t>(stream));
    }
    return reported(error);
}

Result products(const Product* list, int count, DType dtype, Stream stream) {
    Program program;
    const Result result = prepare(list, count, dtype, true, program);
    return result.status == Status::ok ? run(program, stream) : result;
}

}  // namespace muon_kernels::cuda
