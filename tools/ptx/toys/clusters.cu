// Small kernels of blocks in clusters, one for each of the instructions that clusters have. Macros plant faults in
// them.
#include <cstdint>

#ifndef SYNC_BEGIN
#define SYNC_BEGIN cluster_sync()
#endif
#ifndef SYNC_END
#define SYNC_END cluster_sync()
#endif
#ifndef MASK
#define MASK all
#endif
#ifndef SKIPPED  // waits at the end
#define SKIPPED 0
#endif
#ifndef WAIT_EMPTY
#define WAIT_EMPTY wait(empty, turn & 1)
#endif

__device__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// nvcc's own names of the instructions.
__device__ void cluster_sync() {
    __cluster_barrier_arrive();
    __cluster_barrier_wait();
}

__device__ uint32_t mapa(uint32_t address, uint32_t rank) {
    uint32_t mapped;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
    return mapped;
}

__device__ void init(uint32_t barrier, uint32_t count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ void arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ void expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ void wait(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    do {
        asm volatile(
            "{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
            "selp.b32 %0, 1, 0, p;\n}"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory"
        );
    } while (!done);
}

// Of every block: its rank, the size of its cluster, its cluster, and how many there are.
extern "C" __global__ void ids(uint32_t* out) {
    uint4 of;
    of.x = __clusterRelativeBlockRank();
    of.y = __clusterSizeInBlocks();
    of.z = __clusterIdx().x;
    of.w = __clusterGridDimInClusters().x;
    if (threadIdx.x == 0) reinterpret_cast<uint4*>(out)[blockIdx.x] = of;
}

// Every block's threads wait until the first thread of every block of the cluster has arrived at that block's mbarrier.
extern "C" __global__ void meet(uint32_t* out, uint32_t rounds) {
    __shared__ __align__(8) uint64_t barrier;
    const uint32_t ctas = __clusterSizeInBlocks(), here = shared_address(&barrier);
    if (threadIdx.x == 0) init(here, ctas);
    SYNC_BEGIN;
    for (uint32_t round = 0; round < rounds; ++round) {
        if (threadIdx.x == 0) {
            for (uint32_t rank = 0; rank < ctas; ++rank) arrive(mapa(here, rank));
        }
        wait(here, round & 1);
        __syncthreads();  // or a thread that is late could miss a round
    }
    out[blockIdx.x * blockDim.x + threadIdx.x] = rounds;
    SYNC_END;
}

// Every block reads its share of a row of 16-byte pieces, a piece a turn, and brings it to all blocks of its cluster;
// every block writes what it got to its own row of `out`. A turn's bytes take the place of the last one's once all
// blocks have read those.
extern "C" __global__ void share(const uint4* in, uint4* out, uint32_t turns) {
    __shared__ __align__(16) uint4 stage[8];
    __shared__ __align__(8) uint64_t barriers[2];
    const uint32_t ctas = __clusterSizeInBlocks(), rank = __clusterRelativeBlockRank();
    const uint32_t full = shared_address(barriers), empty = shared_address(barriers + 1), all = (1u << ctas) - 1;
    if (threadIdx.x == 0) init(full, 1), init(empty, ctas);
    SYNC_BEGIN;
    for (uint32_t turn = 0; turn < turns; ++turn) {
        if (threadIdx.x == 0) {
            expect(full, 16 * ctas);
            asm volatile(
                "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
                " [%0], [%1], 16, [%2], %3;" ::"r"(shared_address(stage + rank)),
                "l"(in + turn * ctas + rank), "r"(full), "h"(static_cast<uint16_t>(MASK))
                : "memory"
            );
        }
        wait(full, turn & 1);
        if (threadIdx.x < ctas) out[(blockIdx.x * turns + turn) * ctas + threadIdx.x] = stage[threadIdx.x];
        __syncwarp();
        if (threadIdx.x == 0) {
            for (uint32_t to = 0; to < ctas; ++to) arrive(mapa(empty, to));
            if (turn + SKIPPED < turns) WAIT_EMPTY;
        }
    }
    SYNC_END;
}

// A mapped address of a block that there is not.
extern "C" __global__ void beyond(uint32_t* out) {
    __shared__ uint32_t word;
    out[0] = mapa(shared_address(&word), __clusterSizeInBlocks());
}

extern "C" __global__ void wait_only() { __cluster_barrier_wait(); }

extern "C" __global__ void arrive_twice() {
    __cluster_barrier_arrive();
    __cluster_barrier_arrive();
}

// The first block's threads leave at once: a barrier waits for those that are left.
extern "C" __global__ void some_leave(uint32_t* out) {
    if (__clusterRelativeBlockRank() == 0) return;
    cluster_sync();
    out[blockIdx.x] = 1;
}
