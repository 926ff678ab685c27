// The instructions that sm_90a has beyond ptx.cuh, each behind one function named after it: mbarriers, tensor copies
// and wgmma.
#pragma once

#include <cuda.h>

#include "../muon_kernels.h"
#include "ptx.cuh"

namespace muon_kernels::cuda {

// ---- mbarriers, by their shared address

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Other threads, and copies, see what was initialised.
__device__ __forceinline__ void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and has the phase wait for that many bytes of copies.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Until the phase of that parity is complete. Of a new barrier the phase before the first, of parity 1, is. What any
// block of the cluster did before it arrived has then happened.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{\n.reg .pred complete;\nagain:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 complete, [%0], %1;\n"
        "@!complete bra again;\n}" ::"r"(barrier),
        "r"(parity)
        : "memory"
    );
}

// ---- clusters

// Of a shared address of this block, that of the same place in block `rank` of its cluster.
__device__ __forceinline__ uint32_t mapa(uint32_t address, uint32_t rank) {
    uint32_t mapped;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
    return mapped;
}

// At an mbarrier of any block of the cluster.
__device__ __forceinline__ void mbarrier_arrive_cluster(uint32_t mapped) {
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(mapped) : "memory");
}

// All threads of the cluster that have not left.
__device__ __forceinline__ void barrier_cluster() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// ---- tensor copies of boxes, at (column, row, matrix)

// What threads wrote to shared memory before, copies that follow see.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void load_box(
    uint32_t to, const CUtensorMap* map, int col, int row, int matrix, uint32_t barrier
) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::
            "r"(to),
        "l"(map), "r"(col), "r"(row), "r"(matrix), "r"(barrier)
        : "memory"
    );
}

// To the same place in all blocks of the cluster that `mask` has a bit for, where it counts at their mbarriers.
__device__ __forceinline__ void load_box_multicast(
    uint32_t to, const CUtensorMap* map, int col, int row, int matrix, uint32_t barrier, uint16_t mask
) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(to),
        "l"(map), "r"(col), "r"(row), "r"(matrix), "r"(barrier), "h"(mask)
        : "memory"
    );
}

__device__ __forceinline__ void store_box(const CUtensorMap* map, int col, int row, int matrix, uint32_t from) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%1, %2, %3}], [%4];" ::"l"(map), "r"(col),
                 "r"(row), "r"(matrix), "r"(from)
                 : "memory");
}

__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until at most PENDING of this thread's groups of stores still read shared memory.
template <int PENDING>
__device__ __forceinline__ void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

// ---- threads and registers

__device__ __forceinline__ void bar_sync(unsigned barrier, unsigned threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

template <int REGISTERS>
__device__ __forceinline__ void setmaxnreg_dec() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
__device__ __forceinline__ void setmaxnreg_inc() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// ---- matrices between registers and shared memory; lanes and registers as in ldmatrix_x4

__device__ __forceinline__ void stmatrix_x4(uint32_t row, const uint32_t (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(r[0]), "r"(r[1]),
                 "r"(r[2]), "r"(r[3])
                 : "memory");
}

__device__ __forceinline__ void stmatrix_x4_trans(uint32_t row, const uint32_t (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(r[0]),
                 "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}

__device__ __forceinline__ void stmatrix_x1(uint32_t row, uint32_t r) {
    asm volatile("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%0], {%1};" ::"r"(row), "r"(r) : "memory");
}

__device__ __forceinline__ void stmatrix_x1_trans(uint32_t row, uint32_t r) {
    asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(row), "r"(r) : "memory");
}

// An 8x8 matrix transposed, a lane for a lane.
__device__ __forceinline__ uint32_t movmatrix_trans(uint32_t r) {
    uint32_t transposed;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(r));
    return transposed;
}

// ---- wgmma. A warpgroup's accumulators of 64 rows come in blocks of 64 columns. In c[4j + 2h + e] a thread has
// element (16 w + 8 h + l / 4, 8 j + 2 (l % 4) + e) of the block, where w is its warp's place in the warpgroup and l
// its lane.

// All accumulators of a block, as operands.
#define MUON_BLOCK(c)                                                                                           \
    "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]), "+f"(c[8]), \
        "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]), "+f"(c[16]),  \
        "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]), "+f"(c[24]), \
        "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31])

// Accumulators that threads wrote are read by the wgmmas that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most PENDING groups of this warp are under way.
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps what reads or writes a block from moving across this place.
__device__ __forceinline__ void pin(float (&c)[32]) { asm volatile("" : MUON_BLOCK(c)::"memory"); }

// Where wgmma finds a matrix whose rows of 128 bytes are swizzled as a tensor copy with CU_TENSOR_MAP_SWIZZLE_128B
// leaves them: eight rows of 64 elements follow each other in 1024 bytes. `leading` is the distance of one 64 elements
// of a row from the next, where the matrix is more than 64 wide.
constexpr int DESCRIPTOR_UNIT = 16;  // bytes; those added to a descriptor move its matrix

__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t address, uint32_t leading) {
    const uint64_t swizzle_128 = 1, eight_rows = 1024;
    return address >> 4 | static_cast<uint64_t>(leading >> 4) << 16 | eight_rows >> 4 << 32 | swizzle_128 << 62;
}

// One instruction's text for both types. The accumulators are operands 0 to N / 2 - 1; behind them are the descriptors
// of a and b, whether to add, and whether b is row-major.
#define MUON_64_OPERANDS                                                               \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MUON_64_MORE                                                                               \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define MUON_WGMMA(SHAPE, TYPE, ACCUMULATORS, A, B, ADD, B_ROW_MAJOR)                            \
    "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, " ADD                                    \
    ", 0;\n"                                                                                     \
    "wgmma.mma_async.sync.aligned." SHAPE ".f32." TYPE "." TYPE " {" ACCUMULATORS "}, " A ", " B \
    ", accumulate, 1, 1, 0, " B_ROW_MAJOR ";\n}"
#define MUON_WGMMA_128(TYPE) MUON_WGMMA("m64n128k16", TYPE, MUON_64_OPERANDS, "%64", "%65", "%66", "%67")
#define MUON_WGMMA_256(TYPE) \
    MUON_WGMMA("m64n256k16", TYPE, MUON_64_OPERANDS ", " MUON_64_MORE, "%128", "%129", "%130", "%131")

// c (+)= a b of 16 columns of a, without c if not `add`. Rows of a are in shared memory, and rows of b, or columns of b
// where it is transposed.
template <DType DTYPE, bool B_TRANSPOSED>
__device__ __forceinline__ void wgmma_m64n128k16(float (&c0)[32], float (&c1)[32], uint64_t a, uint64_t b, bool add) {
    const int adds = add;
    constexpr int row_major = B_TRANSPOSED ? 0 : 1;
    if constexpr (DTYPE == DType::bf16) {
        asm volatile(MUON_WGMMA_128("bf16")
                     : MUON_BLOCK(c0), MUON_BLOCK(c1)
                     : "l"(a), "l"(b), "r"(adds), "n"(row_major));
    } else {
        asm volatile(MUON_WGMMA_128("f16")
                     : MUON_BLOCK(c0), MUON_BLOCK(c1)
                     : "l"(a), "l"(b), "r"(adds), "n"(row_major));
    }
}

template <DType DTYPE, bool B_TRANSPOSED>
__device__ __forceinline__ void wgmma_m64n256k16(
    float (&c0)[32], float (&c1)[32], float (&c2)[32], float (&c3)[32], uint64_t a, uint64_t b, bool add
) {
    const int adds = add;
    constexpr int row_major = B_TRANSPOSED ? 0 : 1;
    if constexpr (DTYPE == DType::bf16) {
        asm volatile(MUON_WGMMA_256("bf16")
                     : MUON_BLOCK(c0), MUON_BLOCK(c1), MUON_BLOCK(c2), MUON_BLOCK(c3)
                     : "l"(a), "l"(b), "r"(adds), "n"(row_major));
    } else {
        asm volatile(MUON_WGMMA_256("f16")
                     : MUON_BLOCK(c0), MUON_BLOCK(c1), MUON_BLOCK(c2), MUON_BLOCK(c3)
                     : "l"(a), "l"(b), "r"(adds), "n"(row_major));
    }
}

#undef MUON_WGMMA_256
#undef MUON_WGMMA_128
#undef MUON_WGMMA
#undef MUON_64_MORE
#undef MUON_64_OPERANDS
#undef MUON_BLOCK

}  // namespace muon_kernels::cuda
