// A stand-in for the CUDA runtime: host code compiled by nvcc links to this instead of cudart, and its launches go to
// the executor. Everything is synchronous. What a device would refuse is refused; what is not here does not link.
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "launch.h"
#include "tensor_map.h"

namespace {

using namespace ptx;

struct Device {
    u32 major = 8, minor = 0, multiprocessors = 108, shared_optin = 163 << 10, shared_multiprocessor = 164 << 10;
    u32 threads_multiprocessor = 2048;
    u32 any_memory = 0;
};

struct Options {
    u32 order = 0, asynchrony = 0, spin_limit = 1000;
    u64 seed = 0;
    const u32* blocks = nullptr;
    u64 block_count = 0;
};

// What Python tells of a kernel; mirrored in standin.py.
struct KernelInfo {
    void (*run)(Launch*);
    u32 param_count;
    const u32* offsets;
    const u32* sizes;
    u32 param_bytes, static_shared, max_threads, required_threads;
    LineProfile* profile;
};

struct LogEntry {
    char kernel[512];
    u32 grid[3], block[3];
    u32 cluster;
    u64 shared;
    s32 error;
    s32 cooperative;
    u32 warnings;
    char warning[512];
};

struct Kernel {
    std::string name;
    u32 dynamic_limit = 0;  // cudaFuncAttributeMaxDynamicSharedMemorySize; 0: not set
    bool known = false;
    KernelInfo info{};
};

// A launch that a graph holds, with its own copy of the parameters, as cudaStreamBeginCapture makes.
struct Node {
    Kernel* kernel;
    dim3 grid, block;
    std::vector<u8> params;
    size_t shared;
    bool cooperative;
    u32 cluster;
};

struct State {
    Device device;
    Options options;
    std::map<const void*, Kernel*> by_host_function;
    std::map<std::string, Kernel> kernels;
    std::map<const void*, std::string> variables;
    std::map<u64, u64> ranges;  // begin to end
    std::vector<LogEntry> log;
    std::vector<Launch> failures;
    std::vector<std::string> failed_kernels;
    cudaError_t last = cudaSuccess;
    std::map<std::string, cudaError_t> fail_next;  // by the function
    bool capturing = false;
    std::vector<Node> graph;
    int (*resolve)(const char* name, KernelInfo*) = nullptr;
    u64 (*variable)(const char* name) = nullptr;
    std::recursive_mutex mutex;
};

// Registration runs before main and before any constructor of this file.
State& state() {
    static State s;
    return s;
}

struct Configuration {
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
};
thread_local std::vector<Configuration> configurations;

cudaError_t set_last(cudaError_t error) {
    if (error != cudaSuccess) state().last = error;
    return error;
}

// What the next call of a function was asked to fail with.
cudaError_t planted(const char* function) {
    const auto found = state().fail_next.extract(function);
    return found ? set_last(found.mapped()) : cudaSuccess;
}

Kernel* find(const void* function) {
    State& s = state();
    auto found = s.by_host_function.find(function);
    if (found != s.by_host_function.end()) return found->second;
    for (auto& [name, kernel] : s.kernels) {
        if (&kernel == function) return &kernel;
    }
    return nullptr;
}

bool known(Kernel& k) {
    State& s = state();
    if (!k.known && s.resolve) k.known = s.resolve(k.name.c_str(), &k.info) == 0;
    return k.known;
}

cudaError_t check(const Kernel& k, dim3 grid, dim3 block, size_t shared) {
    const u64 threads = u64(block.x) * block.y * block.z;
    if (!threads || threads > 1024 || block.x > 1024 || block.y > 1024 || block.z > 64)
        return cudaErrorInvalidConfiguration;
    if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
        return cudaErrorInvalidConfiguration;
    }
    if (k.info.max_threads && threads > k.info.max_threads) return cudaErrorLaunchOutOfResources;
    if (k.info.required_threads && threads != k.info.required_threads) return cudaErrorInvalidValue;
    // Without the attribute static and dynamic shared memory together may have 48 KiB.
    const u32 limit = k.dynamic_limit ? k.dynamic_limit : (48 << 10) - std::min<u32>(48 << 10, k.info.static_shared);
    if (shared > limit) return cudaErrorInvalidValue;
    return cudaSuccess;
}

u32 blocks_per_multiprocessor(const Kernel& k, u32 threads, size_t shared) {
    const Device& d = state().device;
    const u64 bytes = shared + k.info.static_shared + (d.major >= 8 ? 1024 : 0);
    return std::min<u64>(
        {32, d.threads_multiprocessor / std::max(1u, (threads + 31) / 32 * 32),
         d.shared_multiprocessor / std::max<u64>(1, bytes)}
    );
}

LogEntry entry_of(const Node& node) {
    LogEntry entry{};
    std::snprintf(entry.kernel, sizeof entry.kernel, "%s", node.kernel->name.c_str());
    const u32 g[3] = {node.grid.x, node.grid.y, node.grid.z}, b[3] = {node.block.x, node.block.y, node.block.z};
    std::copy_n(g, 3, entry.grid);
    std::copy_n(b, 3, entry.block);
    entry.shared = node.shared, entry.cooperative = node.cooperative, entry.cluster = node.cluster;
    return entry;
}

cudaError_t execute(const Node& node) {
    State& s = state();
    const Kernel& k = *node.kernel;
    LogEntry entry = entry_of(node);
    std::vector<u8> params(node.params.size() + 64);
    u8* aligned = params.data() + (64 - reinterpret_cast<u64>(params.data()) % 64) % 64;
    std::memcpy(aligned, node.params.data(), node.params.size());
    std::vector<Range> ranges;
    for (auto [begin, end] : s.ranges) ranges.push_back({begin, end});
    Launch l{};
    std::copy_n(entry.grid, 3, l.grid);
    std::copy_n(entry.block, 3, l.block);
    l.cluster = node.cluster;
    l.dynamic_shared = static_cast<u32>(node.shared);
    l.order = s.options.order, l.asynchrony = s.options.asynchrony, l.spin_limit = s.options.spin_limit;
    l.seed = s.options.seed;
    l.blocks = s.options.blocks, l.block_count = s.options.block_count;
    l.resident = node.cooperative ? node.grid.x * node.grid.y * node.grid.z : 1;
    l.check_bounds = !s.device.any_memory;
    l.params = aligned, l.param_bytes = static_cast<u32>(node.params.size());
    l.ranges = ranges.data(), l.range_count = ranges.size();
    l.profile = k.info.profile;
    k.info.run(&l);
    entry.warnings = l.warning_count;
    std::memcpy(entry.warning, l.warning, sizeof entry.warning);
    if (l.failed) {
        entry.error = cudaErrorLaunchFailure;
        s.failures.push_back(l);
        s.failed_kernels.push_back(k.name);
    }
    s.log.push_back(entry);
    return set_last(static_cast<cudaError_t>(entry.error));
}

// Eight blocks are the most of a cluster that every device with clusters takes.
cudaError_t check_cluster(dim3 grid, dim3 cluster) {
    if (cluster.y != 1 || cluster.z != 1) return cudaErrorNotSupported;
    if (cluster.x == 1) return cudaSuccess;
    if (state().device.major < 9) return cudaErrorNotSupported;
    return !cluster.x || cluster.x > 8 || grid.x % cluster.x ? cudaErrorInvalidClusterSize : cudaSuccess;
}

cudaError_t launch(
    const void* function, dim3 grid, dim3 block, void** args, size_t shared, bool cooperative, dim3 cluster = {1, 1, 1}
) {
    State& s = state();
    std::lock_guard lock(s.mutex);
    Kernel* k = find(function);
    if (!k || !known(*k)) return set_last(cudaErrorInvalidDeviceFunction);
    cudaError_t error = planted("cudaLaunchKernel");
    if (!error) error = check(*k, grid, block, shared);
    if (!error) error = check_cluster(grid, cluster);
    const u64 blocks = u64(grid.x) * grid.y * grid.z;
    if (!error && cooperative &&
        blocks > u64(blocks_per_multiprocessor(*k, block.x * block.y * block.z, shared)) * s.device.multiprocessors) {
        error = cudaErrorCooperativeLaunchTooLarge;
    }
    Node node{k, grid, block, std::vector<u8>(k->info.param_bytes), shared, cooperative, cluster.x};
    if (error) {
        s.log.push_back(entry_of(node));
        s.log.back().error = error;
        return set_last(error);
    }
    for (u32 i = 0; i < k->info.param_count; ++i)
        std::memcpy(node.params.data() + k->info.offsets[i], args[i], k->info.sizes[i]);
    if (!s.capturing) return execute(node);
    s.graph.push_back(std::move(node));
    return cudaSuccess;
}

// What waits for the device or changes memory at once; while a graph is captured that is an error, and the graph lost.
cudaError_t waits() {
    State& s = state();
    if (!s.capturing) return s.last;
    s.graph.clear();
    return set_last(cudaErrorStreamCaptureUnsupported);
}

CUresult encode_tiled(
    CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address, const cuuint64_t* dims,
    const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave interleave,
    CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill
) {
    static constexpr u32 sizes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
    if (!map || rank < 1 || rank > 5 || u32(type) > 12 || interleave || u32(swizzle) > 3 ||
        reinterpret_cast<u64>(address) % 16) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    TensorMap m{};
    m.magic = kTensorMapMagic, m.rank = rank, m.element = sizes[type], m.swizzle = swizzle, m.nan_fill = fill != 0;
    m.address = reinterpret_cast<u64>(address);
    for (u32 i = 0; i < rank; ++i) {
        if (!dims[i] || !box[i] || box[i] > 256 || !steps[i] || steps[i] > 8) return CUDA_ERROR_INVALID_VALUE;
        if (i && (strides[i - 1] % 16 || strides[i - 1] >= 1ull << 40)) return CUDA_ERROR_INVALID_VALUE;
        m.dim[i] = dims[i], m.box[i] = box[i], m.step[i] = steps[i];
        m.stride[i] = i ? strides[i - 1] : m.element;
    }
    const u32 inner = box[0] * m.element;
    if (inner % 16 || (swizzle && inner > 16u << swizzle)) return CUDA_ERROR_INVALID_VALUE;
    std::memcpy(map, &m, sizeof m);
    return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

// ---- for Python -----------------------------------------------------------------------------------------------------

Device* standin_device() { return &state().device; }
Options* standin_options() { return &state().options; }
void standin_callbacks(int (*resolve)(const char*, KernelInfo*), u64 (*variable)(const char*)) {
    state().resolve = resolve;
    state().variable = variable;
}
void standin_forget() {
    for (auto& [name, kernel] : state().kernels) kernel.known = false;
}
void standin_add_range(u64 begin, u64 end) { state().ranges[begin] = end; }
void standin_clear_ranges() { state().ranges.clear(); }
u64 standin_log_size() { return state().log.size(); }
LogEntry* standin_log(u64 i) { return &state().log[i]; }
u64 standin_failure_count() { return state().failures.size(); }
Launch* standin_failure(u64 i) { return &state().failures[i]; }
const char* standin_failed_kernel(u64 i) { return state().failed_kernels[i].c_str(); }
void standin_clear() {
    State& s = state();
    s.log.clear();
    s.failures.clear();
    s.failed_kernels.clear();
    s.fail_next.clear();
    s.last = cudaSuccess;
}
void standin_fail_next(s32 error, const char* function) {
    state().fail_next[function] = static_cast<cudaError_t>(error);
}
s32 standin_last_error() { return state().last; }
void standin_begin_capture() {
    state().graph.clear();
    state().capturing = true;
}
void standin_end_capture() { state().capturing = false; }
s32 standin_replay() {
    const std::vector<Node> graph = state().graph;
    for (const Node& node : graph) {
        if (const cudaError_t error = execute(node)) return error;
    }
    return graph.empty() ? cudaErrorInvalidValue : cudaSuccess;
}
const char* standin_kernel_name(u64 i) {
    auto& kernels = state().kernels;
    return i < kernels.size() ? std::next(kernels.begin(), i)->first.c_str() : nullptr;
}

// ---- registration
// -----------------------------------------------------------------------------------------------------

void** __cudaRegisterFatBinary(void*) {
    static void* handle;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
void __cudaRegisterFunction(
    void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*
) {
    Kernel& k = state().kernels[name];
    k.name = name;
    state().by_host_function[host] = &k;
}
void __cudaRegisterVar(void**, char* host, char*, const char* name, int, size_t, int, int) {
    state().variables[host] = name;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
    *kernel = reinterpret_cast<cudaKernel_t>(find(host));
    return *kernel ? cudaSuccess : set_last(cudaErrorInvalidDeviceFunction);
}

// ---- launches -------------------------------------------------------------------------------------------------------

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st* stream) {
    configurations.push_back({grid, block, shared, stream});
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    if (configurations.empty()) return set_last(cudaErrorMissingConfiguration);
    const Configuration c = configurations.back();
    configurations.pop_back();
    *grid = c.grid, *block = c.block, *shared = c.shared;
    *static_cast<cudaStream_t*>(stream) = c.stream;
    return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t) {
    return launch(kernel, grid, block, args, shared, false);
}
cudaError_t __cudaLaunchKernel_ptsz(
    cudaKernel_t kernel, dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t
) {
    return launch(kernel, grid, block, args, shared, false);
}
cudaError_t cudaLaunchKernel(const void* f, dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t) {
    return launch(f, grid, block, args, shared, false);
}
cudaError_t cudaLaunchCooperativeKernel(
    const void* f, dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t
) {
    return launch(f, grid, block, args, shared, true);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* f, void** args) {
    bool cooperative = false;
    dim3 cluster(1, 1, 1);
    for (unsigned i = 0; i < c->numAttrs; ++i) {
        const cudaLaunchAttribute& a = c->attrs[i];
        if (a.id == cudaLaunchAttributeCooperative) cooperative = a.val.cooperative;
        if (a.id == cudaLaunchAttributeClusterDimension)
            cluster = dim3(a.val.clusterDim.x, a.val.clusterDim.y, a.val.clusterDim.z);
    }
    return launch(f, c->gridDim, c->blockDim, args, c->dynamicSmemBytes, cooperative, cluster);
}
cudaError_t cudaFuncSetAttribute(const void* f, cudaFuncAttribute attribute, int value) {
    std::lock_guard lock(state().mutex);
    if (const cudaError_t error = planted("cudaFuncSetAttribute")) return error;
    Kernel* k = find(f);
    if (!k || !known(*k)) return set_last(cudaErrorInvalidDeviceFunction);
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value < 0 || u64(value) + k->info.static_shared > state().device.shared_optin)
        return set_last(cudaErrorInvalidValue);
    k->dynamic_limit = static_cast<u32>(value);
    return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void* f) {
    Kernel* k = find(f);
    if (!k || !known(*k)) return set_last(cudaErrorInvalidDeviceFunction);
    const Device& d = state().device;
    *a = {};
    a->sharedSizeBytes = k->info.static_shared;
    a->maxThreadsPerBlock = k->info.max_threads ? static_cast<int>(k->info.max_threads) : 1024;
    a->ptxVersion = a->binaryVersion = static_cast<int>(d.major * 10 + d.minor);
    a->maxDynamicSharedSizeBytes = static_cast<int>(k->dynamic_limit ? k->dynamic_limit : 48 << 10);
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int* n, const void* f, int threads, size_t shared, unsigned
) {
    Kernel* k = find(f);
    if (!k || !known(*k)) return set_last(cudaErrorInvalidDeviceFunction);
    *n = static_cast<int>(blocks_per_multiprocessor(*k, static_cast<u32>(threads), shared));
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void* f, int threads, size_t shared) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(n, f, threads, shared, 0);
}

// ---- device
// -----------------------------------------------------------------------------------------------------------

cudaError_t cudaGetDevice(int* device) { return *device = 0, planted("cudaGetDevice"); }
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return device ? set_last(cudaErrorInvalidDevice) : cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    if (const cudaError_t error = planted("cudaDeviceGetAttribute")) return error;
    const Device& d = state().device;
    switch (attribute) {
        case cudaDevAttrComputeCapabilityMajor: *value = d.major; break;
        case cudaDevAttrComputeCapabilityMinor: *value = d.minor; break;
        case cudaDevAttrMultiProcessorCount: *value = d.multiprocessors; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 << 10; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = d.shared_optin; break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = d.shared_multiprocessor; break;
        case cudaDevAttrReservedSharedMemoryPerBlock: *value = 1024; break;
        case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
        case cudaDevAttrMaxThreadsPerMultiProcessor: *value = d.threads_multiprocessor; break;
        case cudaDevAttrMaxBlocksPerMultiprocessor: *value = 32; break;
        case cudaDevAttrWarpSize: *value = 32; break;
        case cudaDevAttrMaxGridDimX: *value = 0x7fffffff; break;
        case cudaDevAttrMaxGridDimY:
        case cudaDevAttrMaxGridDimZ: *value = 65535; break;
        case cudaDevAttrMaxRegistersPerBlock:
        case cudaDevAttrMaxRegistersPerMultiprocessor: *value = 65536; break;
        case cudaDevAttrCooperativeLaunch: *value = 1; break;
        case cudaDevAttrL2CacheSize: *value = 40 << 20; break;
        default: return set_last(cudaErrorInvalidValue);
    }
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
    const Device& d = state().device;
    *p = {};
    std::snprintf(p->name, sizeof p->name, "PTX executor (no device)");
    p->major = d.major, p->minor = d.minor, p->multiProcessorCount = d.multiprocessors, p->warpSize = 32;
    p->sharedMemPerBlock = 48 << 10, p->sharedMemPerBlockOptin = d.shared_optin;
    p->sharedMemPerMultiprocessor = d.shared_multiprocessor, p->reservedSharedMemPerBlock = 1024;
    p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = d.threads_multiprocessor,
    p->maxBlocksPerMultiProcessor = 32;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->maxGridSize[0] = 0x7fffffff, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->totalGlobalMem = 80ull << 30, p->l2CacheSize = 40 << 20, p->cooperativeLaunch = 1;
    return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* v) { return *v = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* v) { return *v = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaGetDriverEntryPointByVersion(
    const char* name, void** f, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* found
) {
    const bool have = !std::strcmp(name, "cuTensorMapEncodeTiled");
    *f = have ? reinterpret_cast<void*>(&encode_tiled) : nullptr;
    if (found) *found = have ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}

// ---- errors, streams, events, memory
// ----------------------------------------------------------------------------------

cudaError_t cudaGetLastError() { return std::exchange(state().last, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return state().last; }
const char* cudaGetErrorName(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "cudaSuccess";
        case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
        case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
        case cudaErrorInvalidDeviceFunction: return "cudaErrorInvalidDeviceFunction";
        case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
        case cudaErrorLaunchOutOfResources: return "cudaErrorLaunchOutOfResources";
        case cudaErrorCooperativeLaunchTooLarge: return "cudaErrorCooperativeLaunchTooLarge";
        case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
        case cudaErrorNotSupported: return "cudaErrorNotSupported";
        default: return "cudaError";
    }
}
const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }

cudaError_t cudaStreamCreate(cudaStream_t* s) { return *s = nullptr, cudaSuccess; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned) { return *s = nullptr, cudaSuccess; }
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return waits(); }
cudaError_t cudaStreamQuery(cudaStream_t) { return waits(); }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* s) {
    return *s = state().capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone, cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return waits(); }
cudaError_t cudaEventCreate(cudaEvent_t* e) { return *e = nullptr, cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) { return *e = nullptr, cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return waits(); }
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }

cudaError_t cudaMalloc(void** p, size_t bytes) {
    if (state().capturing) return waits();
    *p = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    std::memset(*p, 0xff, bytes);
    standin_add_range(reinterpret_cast<u64>(*p), reinterpret_cast<u64>(*p) + bytes);
    return cudaSuccess;
}
cudaError_t cudaFree(void* p) {
    if (state().capturing) return waits();
    state().ranges.erase(reinterpret_cast<u64>(p));
    std::free(p);
    return cudaSuccess;
}
cudaError_t cudaMallocAsync(void** p, size_t bytes, cudaStream_t) { return cudaMalloc(p, bytes); }
cudaError_t cudaFreeAsync(void* p, cudaStream_t) { return cudaFree(p); }
cudaError_t cudaMemset(void* p, int value, size_t bytes) {
    if (state().capturing) return waits();
    return std::memset(p, value, bytes), cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) { return cudaMemset(p, value, bytes); }
cudaError_t cudaMemset2DAsync(void* p, size_t pitch, int value, size_t width, size_t height, cudaStream_t) {
    for (size_t i = 0; i < height; ++i) std::memset(static_cast<char*>(p) + i * pitch, value, width);
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
    if (state().capturing) return waits();
    return std::memmove(to, from, bytes), cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
    return cudaMemcpy(to, from, bytes, kind);
}
cudaError_t cudaMemcpy2DAsync(
    void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height, cudaMemcpyKind,
    cudaStream_t
) {
    for (size_t i = 0; i < height; ++i) {
        std::memcpy(static_cast<char*>(to) + i * to_pitch, static_cast<const char*>(from) + i * from_pitch, width);
    }
    return cudaSuccess;
}
cudaError_t cudaGetSymbolAddress(void** p, const void* symbol) {
    State& s = state();
    auto found = s.variables.find(symbol);
    const u64 address = found == s.variables.end() || !s.variable ? 0 : s.variable(found->second.c_str());
    *p = reinterpret_cast<void*>(address);
    return address ? cudaSuccess : set_last(cudaErrorInvalidSymbol);
}
cudaError_t cudaMemcpyToSymbolAsync(
    const void* symbol, const void* from, size_t bytes, size_t offset, cudaMemcpyKind kind, cudaStream_t
) {
    void* p;
    const cudaError_t error = cudaGetSymbolAddress(&p, symbol);
    return error ? error : cudaMemcpy(static_cast<char*>(p) + offset, from, bytes, kind);
}
cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* from, size_t bytes, size_t offset, cudaMemcpyKind kind) {
    return cudaMemcpyToSymbolAsync(symbol, from, bytes, offset, kind, nullptr);
}
cudaError_t cudaMemcpyFromSymbolAsync(
    void* to, const void* symbol, size_t bytes, size_t offset, cudaMemcpyKind kind, cudaStream_t
) {
    void* p;
    const cudaError_t error = cudaGetSymbolAddress(&p, symbol);
    return error ? error : cudaMemcpy(to, static_cast<char*>(p) + offset, bytes, kind);
}
cudaError_t cudaMemcpyFromSymbol(void* to, const void* symbol, size_t bytes, size_t offset, cudaMemcpyKind kind) {
    return cudaMemcpyFromSymbolAsync(to, symbol, bytes, offset, kind, nullptr);
}

}  // extern "C"
