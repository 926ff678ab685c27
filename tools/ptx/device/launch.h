// What the host (Python or the stand-in runtime) hands a translated module, and what comes back.
#pragma once

#include <cstdint>

namespace ptx {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using u128 = unsigned __int128;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using f32 = float;
using f64 = double;

struct Range {
    u64 begin, end;
};

// Counters of one PTX line; all but `threads` count requests of whole warps. `bytes` are of global memory.
struct LineProfile {
    u64 threads, requests, bytes, sectors, ideal_sectors, wavefronts, ideal_wavefronts, shared_bytes;
};

// The whole interface between the host (Python or the stand-in runtime) and a translated module; mirrored in module.py.
struct Launch {
    u32 grid[3], block[3];
    u32 cluster;  // blocks of one, neighbours in x
    u32 dynamic_shared, order, asynchrony, resident;
    u32 check_bounds, spin_limit;
    u64 seed;
    const u8* params;
    u64 param_bytes;
    const Range* ranges;
    u64 range_count;
    const u32* blocks;  // those to run, by their place in the grid; null: all
    u64 block_count;
    LineProfile* profile;
    u32 failed, line;
    u32 at_block[3], at_thread[3];
    u32 warning_count, warning_line;
    char message[2048];
    char warning[512];
};

}  // namespace ptx
