// Warpgroups that divide the registers of a block, for sm_90a.
#include <cstdint>

extern "C" __global__ void __launch_bounds__(384, 1) roles(uint32_t* out) {
    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    }
    out[threadIdx.x] = threadIdx.x;
}
