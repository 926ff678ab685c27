// A block of GPU threads on one CPU thread: every GPU thread is a fiber that runs until it must wait for others. Warp
// collectives and barriers are meeting points. All faults end as a report in Launch, never as a print, exit or signal.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "launch.h"

// What is no template is compiled once, by runtime.cpp, and linked to every kernel.
#ifdef PTX_RUNTIME
#define PTX_INLINE
#else
#define PTX_INLINE inline __attribute__((gnu_inline))
#endif

#ifndef PTX_RACES
#define PTX_RACES 0
#endif
#ifndef PTX_PROFILE
#define PTX_PROFILE 0
#endif

// To the end of async.h, whatever the command line says of kernels.
#pragma GCC optimize("O1")

namespace ptx {

constexpr bool kRaces = PTX_RACES, kProfile = PTX_PROFILE;

// Shared addresses are offsets that start here, as on sm_90: a null or a generic address is then never a valid one.
constexpr u32 kSharedBase = 1024;
constexpr size_t kStackBytes = 256 << 10;
constexpr u32 kFuel = 1 << 14;  // backward branches before a thread that waits for nothing lets others run

enum Order : u32 { kForward, kBackward, kRandomOrder };
enum Asynchrony : u32 { kEarly, kLate, kRandomTime };
enum class Space { generic, global, shared, local, constant };
enum class Kind { read, write, atomic };

struct Thread;
struct Warp;
struct Block;
struct Cluster;
struct Grid;

extern "C" void ptx_switch(void** save, void* load);
asm(R"(
.text
.local ptx_switch
.type ptx_switch, @function
ptx_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size ptx_switch, .-ptx_switch
)");

struct Random {
    u64 state;
    u32 operator()(u32 below) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        return static_cast<u32>((state >> 33) % below);
    }
};

}  // namespace ptx

#include "profile.h"
#include "races.h"

namespace ptx {

// A copy whose bytes may land later than the instruction.
struct Copy {
    u8* to;
    const u8* from;
    u32 bytes, zeros;

    void land() const {
        std::memcpy(to, from, bytes);
        std::memset(to + bytes, 0, zeros);
    }
};

struct Thread {
    void* stack_pointer = nullptr;
    Block* block = nullptr;
    Warp* warp = nullptr;
    u32 tid[3] = {}, index = 0, lane = 0;
    u32 agent = 0;  // among the threads of its cluster
    u32 registers = 0;
    u32 cluster_phase = ~0;  // of the cluster's barrier, which it arrived at and has not waited for; ~0: none
    u32 fuel = kFuel;
    u32 line = 0;            // where it waits
    const char* waits = "";  // for what
    u32 barrier_result = 0;
    u32 tries = 0;               // of mbarriers
    std::vector<Copy> copies;    // cp.async that have not landed, oldest first
    std::vector<size_t> groups;  // for every committed group not waited for: one past its last entry of `copies`
    u32 committed = 0, bulk_committed = 0;
    std::vector<std::function<void()>> bulk;  // bulk stores that have not landed
    std::vector<size_t> bulk_groups;
    u8* stack = nullptr;
    ThreadTrace trace;

    [[noreturn]] void fail(u32 line, const char* format, ...) __attribute__((format(printf, 3, 4)));
    void suspend();
    void wait(u32 line, const char* what) {
        this->line = line, waits = what;
        suspend();
    }
    void spin(u32 line);
    u8* resolve(Space space, u64 address, u32 size, u32 line, Kind kind, const void* data = nullptr);
};

struct Meeting {
    u32 mask, arrived, line;
    const char* what;
    void (*run)(Warp&, u32 mask, void** args);
    void* args[32];
};

struct Warp {
    Block* block = nullptr;
    u32 index = 0;
    u32 lanes = 0;    // that exist
    u32 live = 0;     // that have not exited
    u32 ready = 0;    // that can run
    u32 yielded = 0;  // that can run in the next pass
    std::vector<Meeting> meetings;
    u32 wgmma_committed = 0, wgmma_waited = 0;
    WarpTrace trace;
    Thread& thread(u32 lane);
};

struct Barrier {
    u32 arrived = 0, expected = 0, count = 0;
    std::vector<std::pair<Thread*, u32>> waiting;  // and the line each came from
    Vision vision;
};

struct MBarrier {
    u32 count = 0, pending = 0, phase = 0;
    s64 bytes = 0;
    std::vector<Thread*> waiting;
    Vision vision, done;
    u32 agent = 0;
};

struct Block {
    Grid* grid = nullptr;
    u32 id[3] = {}, linear = 0;
    u8* shared = nullptr;
    u32 shared_bytes = 0;
    u32 dynamic = 0;  // where dynamic shared memory begins
    u32 live = 0;
    u32 free_registers = 0;  // that no thread has
    std::shared_ptr<Cluster> cluster;
    u32 rank = 0;  // in it
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    Barrier barriers[16];
    std::map<u32, MBarrier> mbarriers;
    std::deque<std::function<void()>> in_flight;  // asynchronous operations without a thread that waits for them
    BlockTrace trace;

    void wake(Thread& t);
};

// Blocks that run at the same time and reach each other's shared memory. A block alone is one, too.
struct Cluster {
    std::vector<Block*> blocks;  // by rank
    u32 arrived = 0, phase = 0;  // of its barrier
    std::vector<Thread*> waiting;
    ClusterTrace trace;
};

using Entry = void (*)(Thread&);

struct Grid {
    Launch& launch;
    Entry entry;
    std::vector<Range> ranges;
    Random random;
    void* scheduler = nullptr;  // its stack pointer while a fiber runs
    Thread* current = nullptr;
    Range recent{};
    u32 live_blocks = 0;
    GridTrace trace;
    u64 ticks = 0;
    alignas(16) u8 workspace[64] = {};  // of cooperative groups' grid barrier
    u32 events = 0;                     // anything that could let another thread go on

    bool late() { return launch.asynchrony == kLate || (launch.asynchrony == kRandomTime && random(2)); }
    void warn(u32 line, const char* text) {
        if (!launch.warning_count++) {
            launch.warning_line = line;
            std::snprintf(launch.warning, sizeof launch.warning, "%s", text);
        }
    }
};

inline thread_local Grid* grid_now;

PTX_INLINE Thread& Warp::thread(u32 lane) { return block->threads[index * 32 + lane]; }

PTX_INLINE void Block::wake(Thread& t) {
    t.warp->ready |= 1u << t.lane;
    ++grid->events;
}

PTX_INLINE void Thread::suspend() {
    fuel = kFuel;
    ptx_switch(&stack_pointer, block->grid->scheduler);
}

PTX_INLINE void report(Launch& launch, const Thread& t, u32 line, const char* text) {
    if (launch.failed) return;
    launch.failed = 1, launch.line = line;
    std::copy_n(t.block->id, 3, launch.at_block);
    std::copy_n(t.tid, 3, launch.at_thread);
    std::snprintf(launch.message, sizeof launch.message, "%s", text);
}

PTX_INLINE void Thread::fail(u32 line, const char* format, ...) {
    char text[2048];
    va_list args;
    va_start(args, format);
    std::vsnprintf(text, sizeof text, format, args);
    va_end(args);
    report(block->grid->launch, *this, line, text);
    for (;;) suspend();  // the scheduler sees the failure and abandons all fibers
}

PTX_INLINE void Thread::spin(u32 line) {
    this->line = line, waits = "nothing (it loops)";
    warp->yielded |= 1u << lane;
    suspend();
}

// A backward branch. Also tells the profiler which accesses of the lanes of a warp belong together.
PTX_INLINE void back(Thread& t, u32 line) {
    if constexpr (kProfile) ++t.trace.trips;
    if (!--t.fuel) t.spin(line);
}

// ---- checks (glue between the parts above and races.h, profile.h) -------------------------------------------------

PTX_INLINE u32 new_agent(Block& b, std::string name) {
    Cluster& c = *b.cluster;
    if (c.blocks.size() > 1) name += " of CTA " + std::to_string(b.rank);
    c.trace.agents.push_back(std::move(name));
    return static_cast<u32>(c.blocks.size() * b.threads.size() + c.trace.agents.size() - 1);
}

PTX_INLINE u32 async_agent(Thread& t) {
    u32& agent = t.trace.async_agent;
    if (!agent) agent = new_agent(*t.block, "cp.async of thread " + std::to_string(t.index));
    return agent;
}

PTX_INLINE std::string agent_name(const Block& b, u32 agent) {
    const size_t ctas = b.cluster->blocks.size(), threads = b.threads.size();
    if (agent >= ctas * threads) return b.cluster->trace.agents[agent - ctas * threads];
    const std::string thread = "thread " + std::to_string(agent % threads);
    return ctas == 1 ? thread : thread + " of CTA " + std::to_string(agent / threads);
}

PTX_INLINE void begin_races(Block& b) {
    b.trace.shadow = std::make_unique<Shadow>(SIZE_MAX);
    b.trace.vision.see(b.linear, 1);
    for (Thread& t : b.threads) t.trace.vision.see(t.agent, 1);
}

// Publishes what `t` knows; what it does from now on is later.
PTX_INLINE void release_to(Thread& t, Vision& to) {
    to.join(t.trace.vision);
    ++t.trace.vision.seen[t.agent];
}

PTX_INLINE void join_warp(Warp& w, u32 lanes) {
    Vision all;
    for (u32 m = lanes; m; m &= m - 1) release_to(w.thread(std::countr_zero(m)), all);
    for (u32 m = lanes; m; m &= m - 1) w.thread(std::countr_zero(m)).trace.vision.join(all);
}

PTX_INLINE void judge(
    Thread& t, const Conflict& c, u32 line, Kind kind, const char* space, const std::string& who,
    const std::string& other
) {
    static constexpr const char* kinds[] = {"reads", "writes", "updates"};
    if (!c.kind) return;
    char text[512];
    std::snprintf(
        text, sizeof text, "race on %s memory: %s %s what %s %s at line %u, and nothing orders the two%s", space,
        who.c_str(), kinds[static_cast<int>(kind)], other.c_str(), c.other_wrote ? "wrote" : "read", c.line,
        c.kind == Conflict::same_value ? " (the same value)"
        : c.kind == Conflict::unfenced ? " but barriers: fence.proxy.async is missing"
                                       : ""
    );
    if (c.kind == Conflict::same_value) return t.block->grid->warn(line, text);
    t.fail(line, "%s", text);
}

// Of the shared memory of `b`, which is the thread's block or another one of its cluster.
PTX_INLINE void shared_access_as(
    Thread& t, Block& b, u32 agent, u32 clock, bool async, u32 offset, u32 size, u32 line, Kind kind, const void* data
) {
    const bool same = data && !std::memcmp(b.shared + offset, data, size);
    const Conflict c = b.trace.shadow->access(agent, clock, t.trace.vision, offset, size, line, kind, async, same);
    judge(t, c, line, kind, "shared", agent_name(b, agent), agent_name(b, c.agent));
}

PTX_INLINE void shared_access(Thread& t, u32 offset, u32 size, u32 line, Kind kind, const void* data) {
    if (kind == Kind::atomic) {
        Vision& at = t.block->trace.released[offset];
        t.trace.vision.join(at);
        release_to(t, at);
    }
    if (t.trace.as_async)
        return shared_access_as(t, *t.block, t.trace.as_async, t.committed + 1, false, offset, size, line, kind, data);
    shared_access_as(t, *t.block, t.agent, t.trace.vision.seen[t.agent], false, offset, size, line, kind, data);
}

PTX_INLINE void global_access(Thread& t, u64 address, u32 size, u32 line, Kind kind, const void* data) {
    Block& b = *t.block;
    GridTrace& g = b.grid->trace;
    if (kind == Kind::atomic) {
        Vision& at = g.released[address];
        b.trace.vision.join(at);
        at.join(b.trace.vision);
        b.trace.vision.see(b.linear, ++b.trace.clock);
    }
    const bool same = data && !std::memcmp(reinterpret_cast<void*>(address), data, size);
    const Conflict c = g.shadow.access(b.linear, b.trace.clock, b.trace.vision, address, size, line, kind, false, same);
    judge(t, c, line, kind, "global", "block " + std::to_string(b.linear), "block " + std::to_string(c.agent));
}

PTX_INLINE void profile_access(Thread& t, bool shared, u64 address, u32 size, u32 line) {
    const u64 when = u64(t.trace.syncs) << 32 | t.trace.trips;
    t.warp->trace.requests.add(t.block->grid->launch.profile, t.lane, t.warp->lanes, line, when, shared, address, size);
}

PTX_INLINE void finish_profile(Block& b) {
    for (Warp& w : b.warps) w.trace.requests.finish(b.grid->launch.profile);
}

// ---- memory -------------------------------------------------------------------------------------------------------

PTX_INLINE bool in_range(const Range& r, u64 address, u32 size) {
    return address >= r.begin && address + size <= r.end;
}

PTX_INLINE bool allowed(Grid& grid, u64 address, u32 size) {
    if (in_range(grid.recent, address, size)) return true;
    auto after = std::upper_bound(grid.ranges.begin(), grid.ranges.end(), address, [](u64 a, const Range& r) {
        return a < r.begin;
    });
    if (after == grid.ranges.begin() || !in_range(after[-1], address, size)) return false;
    grid.recent = after[-1];
    return true;
}

PTX_INLINE const char* nearest(Grid& grid, u64 address, char (&text)[96]) {
    const Range* best = nullptr;
    s64 distance = INT64_MAX;
    for (const Range& r : grid.ranges) {
        const s64 d = address >= r.end ? s64(address - r.end) + 1 : address < r.begin ? s64(r.begin - address) : 0;
        if (d < distance) distance = d, best = &r;
    }
    if (!best) return "no memory is registered";
    std::snprintf(
        text, sizeof text, "nearest allocation has %llu bytes, this is at %+lld of its begin",
        static_cast<unsigned long long>(best->end - best->begin), static_cast<long long>(s64(address - best->begin))
    );
    return text;
}

PTX_INLINE u8* Thread::resolve(Space space, u64 address, u32 size, u32 line, Kind kind, const void* data) {
    static constexpr const char* kinds[] = {"read", "write", "atomic"};
    const char* what = kinds[static_cast<int>(kind)];
    const u64 window = reinterpret_cast<u64>(block->shared);
    if (space == Space::generic && address - window < block->shared_bytes) {
        space = Space::shared;
        address = address - window + kSharedBase;
    }
    if (__builtin_expect(address & (size - 1), 0)) {
        fail(line, "misaligned %s of %u bytes at address 0x%llx", what, size, static_cast<unsigned long long>(address));
    }
    if (space == Space::shared) {
        const u64 offset = address - kSharedBase;
        if (__builtin_expect(offset + size > block->shared_bytes || offset > block->shared_bytes, 0)) {
            fail(
                line, "%s of %u bytes outside shared memory: offset %lld, the block has %u bytes", what, size,
                static_cast<long long>(offset), block->shared_bytes
            );
        }
        if constexpr (kRaces) shared_access(*this, u32(offset), size, line, kind, data);
        if constexpr (kProfile) profile_access(*this, true, offset, size, line);
        return block->shared + offset;
    }
    const u64 on_stack = address - reinterpret_cast<u64>(stack);
    if (space != Space::global && on_stack < kStackBytes) return reinterpret_cast<u8*>(address);
    Grid& grid = *block->grid;
    if (__builtin_expect(grid.launch.check_bounds && !allowed(grid, address, size), 0)) {
        char text[96];
        fail(line, "%s of %u bytes outside every allocation: %s", what, size, nearest(grid, address, text));
    }
    if constexpr (kRaces) global_access(*this, address, size, line, kind, data);
    if constexpr (kProfile) profile_access(*this, false, address, size, line);
    return reinterpret_cast<u8*>(address);
}

template <class T, int N>
struct Vec {
    T x[N];
};

template <class T, int N = 1>
Vec<T, N> load(Thread& t, Space space, u64 address, u32 line) {
    Vec<T, N> v;
    std::memcpy(&v, t.resolve(space, address, sizeof v, line, Kind::read), sizeof v);
    return v;
}

template <class T, int N = 1>
void store(Thread& t, Space space, u64 address, u32 line, Vec<T, N> v) {
    std::memcpy(t.resolve(space, address, sizeof v, line, Kind::write, &v), &v, sizeof v);
}

// The value before, and `f` of it in its place. One fiber runs at a time, so every access is atomic.
template <class T, class F>
T atomic(Thread& t, Space space, u64 address, u32 line, F f) {
    u8* p = t.resolve(space, address, sizeof(T), line, Kind::atomic);
    T before, after;
    std::memcpy(&before, p, sizeof before);
    after = f(before);
    std::memcpy(p, &after, sizeof after);
    ++t.block->grid->events;
    return before;
}

PTX_INLINE u64 to_generic(Thread& t, u64 address) {
    return reinterpret_cast<u64>(t.block->shared) + (address - kSharedBase);
}
PTX_INLINE u64 from_generic(Thread& t, u64 address) {
    return address - reinterpret_cast<u64>(t.block->shared) + kSharedBase;
}

// ---- meeting points -----------------------------------------------------------------------------------------------

// Lanes of `mask` that meet at `what`; the last to come runs it for all. Aligned collectives need the whole warp at one
// instruction.
PTX_INLINE void meet(
    Thread& t, u32 mask, u32 line, const char* what, bool aligned, void* arg, void (*run)(Warp&, u32, void**)
) {
    Warp& w = *t.warp;
    if constexpr (kProfile) ++t.trace.syncs, t.trace.trips = 0;
    if (aligned) mask = w.lanes;
    mask &= w.lanes;
    if (!(mask >> t.lane & 1)) t.fail(line, "%s by lane %u, which its mask %08x lacks", what, t.lane, mask);
    if (aligned && w.live != ~0u) {
        t.fail(line, "%s needs 32 lanes, but only lanes %08x are there (others exited or never were)", what, w.live);
    }
    Meeting* m = nullptr;
    for (Meeting& other : w.meetings) {
        if (other.mask == mask && !std::strcmp(other.what, what) && (!aligned || other.line == line)) m = &other;
        if ((aligned && other.line != line) || (!m && (other.mask & mask) && other.mask != mask)) {
            t.fail(
                line, "divergent %s: lane %u is here with mask %08x, but lanes %08x wait at line %u in %s, mask %08x",
                what, t.lane, mask, other.arrived, other.line, other.what, other.mask
            );
        }
    }
    if (!m) m = &w.meetings.emplace_back(Meeting{mask, 0, line, what, run, {}});
    m->arrived |= 1u << t.lane;
    m->args[t.lane] = arg;
    t.line = line, t.waits = what;
    if (m->arrived != (mask & w.live)) return t.suspend();
    Meeting all = *m;
    w.meetings.erase(w.meetings.begin() + (m - w.meetings.data()));
    run(w, all.arrived, all.args);
    w.ready |= all.arrived & ~(1u << t.lane);
    ++t.block->grid->events;
}

PTX_INLINE void complete_without_exited(Warp& w) {
    for (size_t i = 0; i < w.meetings.size(); ++i) {
        Meeting m = w.meetings[i];
        if (m.arrived != (m.mask & w.live) || !m.arrived) continue;
        w.meetings.erase(w.meetings.begin() + i--);
        m.run(w, m.arrived, m.args);
        w.ready |= m.arrived;
    }
}

PTX_INLINE void sync_warp(Thread& t, u32 mask, u32 line) {
    meet(t, mask, line, "bar.warp.sync", false, nullptr, [](Warp& w, u32 lanes, void**) {
        if constexpr (kRaces) join_warp(w, lanes);
    });
}

enum class Reduce { none, popc, all, any };

PTX_INLINE void release(Barrier& b, Block& block, Thread* last) {
    const u32 count = b.count, expected = b.expected;
    auto waiting = std::move(b.waiting);
    Vision vision = std::move(b.vision);
    b = Barrier{};
    for (auto& [t, line] : waiting) {
        t->barrier_result = count | (count == expected ? 1u << 31 : 0);
        if constexpr (kRaces) t->trace.vision.join(vision);
        if (t != last) block.wake(*t);
    }
}

// bar.sync, bar.arrive and bar.red. A count of 0 means all threads of the block.
PTX_INLINE u32
barrier(Thread& t, u32 id, u32 count, u32 line, bool wait, Reduce reduce = Reduce::none, bool vote = false) {
    Block& block = *t.block;
    if constexpr (kProfile) ++t.trace.syncs, t.trace.trips = 0;
    if (id >= 16) t.fail(line, "barrier %u does not exist", id);
    Barrier& b = block.barriers[id];
    if (!count) count = static_cast<u32>(block.threads.size());
    if (count > block.threads.size())
        t.fail(line, "barrier %u for %u threads in a block of %zu", id, count, block.threads.size());
    if (b.arrived && b.expected != count)
        t.fail(line, "barrier %u: %u threads expected here, %u elsewhere", id, count, b.expected);
    for (auto& [other, at] : b.waiting) {
        if (other->warp == t.warp && at != line) {
            t.fail(
                line, "divergent barrier %u: lane %u is here, lane %u of the same warp at line %u", id, t.lane,
                other->lane, at
            );
        }
    }
    b.expected = count;
    ++b.arrived;
    b.count += vote;
    if constexpr (kRaces) release_to(t, b.vision);
    if (wait) b.waiting.push_back({&t, line});
    const bool last = b.arrived == count;
    if (last) release(b, block, &t);
    if (wait && !last) t.wait(line, "barrier");
    const u32 votes = t.barrier_result & ~(1u << 31);
    return reduce == Reduce::popc ? votes : reduce == Reduce::all ? t.barrier_result >> 31 : votes != 0;
}

// ---- registers ----------------------------------------------------------------------------------------------------

constexpr u32 kRegisters = 65536;

// Those of a thread where a block has a multiprocessor for itself, as __launch_bounds__(threads, 1) says: in eights.
PTX_INLINE u32 registers_of(u32 threads) { return std::min(255u, kRegisters / threads / 8 * 8); }

PTX_INLINE void setmaxnreg(Thread& t, u32 count, bool more, u32 line) {
    Block& b = *t.block;
    if (count < 24 || count > 256 || count % 8) t.fail(line, "setmaxnreg: %u registers", count);
    if (more ? count < t.registers : count > t.registers)
        t.fail(line, "setmaxnreg.%s: %u registers for a thread that has %u", more ? "inc" : "dec", count, t.registers);
    while (more && b.free_registers < count - t.registers) {
        t.line = line, t.waits = "registers";
        t.warp->yielded |= 1u << t.lane;
        t.suspend();
    }
    b.free_registers += t.registers - count;
    t.registers = count;
    ++b.grid->events;
}

// ---- clusters -----------------------------------------------------------------------------------------------------

// Addresses of shared::cluster: those of shared::cta name the thread's own block, mapa's have a rank above them.
constexpr u32 kRankBit = 24;

PTX_INLINE u32 mapa(Thread& t, u64 address, u32 rank, u32 line) {
    const size_t ctas = t.block->cluster->blocks.size();
    if (rank >= ctas) t.fail(line, "mapa: CTA %u of a cluster of %zu", rank, ctas);
    return u32(address & ((1u << kRankBit) - 1)) | (rank + 1) << kRankBit;
}

// The block that such an address lies in; the address becomes that in it.
PTX_INLINE Block& home(Thread& t, u64& address, u32 line) {
    const u32 rank = u32(address) >> kRankBit;
    if (!rank) return *t.block;
    address &= (1u << kRankBit) - 1;
    Block& b = *t.block->cluster->blocks.at(rank - 1);
    if (!b.live) t.fail(line, "CTA %u of the cluster has exited, its shared memory is gone", rank - 1);
    return b;
}

// Complete as soon as all threads that have not exited are there.
PTX_INLINE void advance_cluster(Cluster& c) {
    u32 live = 0;
    for (Block* b : c.blocks) live += b->live;
    if (!c.arrived || c.arrived < live) return;
    c.arrived = 0, ++c.phase;
    if constexpr (kRaces) c.trace.done.join(std::exchange(c.trace.vision, {}));
    for (Thread* t : std::exchange(c.waiting, {})) t->block->wake(*t);
}

PTX_INLINE void cluster_arrive(Thread& t, u32 line) {
    Cluster& c = *t.block->cluster;
    if (t.cluster_phase != ~0u) t.fail(line, "barrier.cluster.arrive twice, without a wait between them");
    t.cluster_phase = c.phase;
    ++c.arrived;
    if constexpr (kRaces) release_to(t, c.trace.vision);
    advance_cluster(c);
}

PTX_INLINE void cluster_wait(Thread& t, u32 line) {
    Cluster& c = *t.block->cluster;
    if (t.cluster_phase == ~0u) t.fail(line, "barrier.cluster.wait before barrier.cluster.arrive");
    if (t.cluster_phase == c.phase) {
        c.waiting.push_back(&t);
        t.wait(line, "barrier.cluster");
    }
    t.cluster_phase = ~0u;
    if constexpr (kRaces) t.trace.vision.join(c.trace.done);
}

// ---- cp.async -----------------------------------------------------------------------------------------------------

PTX_INLINE void copy_async(Thread& t, u64 to, Space space, u64 from, u32 size, u32 bytes, u32 line) {
    bytes = std::min(bytes, size);
    const u8* source = bytes ? t.resolve(space, from, bytes == size ? size : 1, line, Kind::read) : nullptr;
    if (bytes && bytes != size) t.resolve(space, from + bytes - 1, 1, line, Kind::read);
    if constexpr (kRaces) t.trace.as_async = async_agent(t);
    u8* target = t.resolve(Space::shared, to, size, line, Kind::write);
    if constexpr (kRaces) t.trace.as_async = 0;
    Copy copy{target, source, bytes, size - bytes};
    if (!t.block->grid->late()) {
        copy.land();
        copy.bytes = copy.zeros = 0;
    } else {
        std::memset(target, 0xff, size);
    }
    t.copies.push_back(copy);
}

PTX_INLINE void commit_copies(Thread& t) {
    t.groups.push_back(t.copies.size());
    ++t.committed;
}

// Lets all copies land but those of the `keep` youngest groups.
PTX_INLINE void wait_copies(Thread& t, u32 keep) {
    if (t.groups.size() <= keep) return;
    const size_t done = t.groups.size() - keep, landed = t.groups[done - 1];
    for (size_t i = 0; i < landed; ++i) t.copies[i].land();
    t.copies.erase(t.copies.begin(), t.copies.begin() + landed);
    t.groups.erase(t.groups.begin(), t.groups.begin() + done);
    for (size_t& end : t.groups) end -= landed;
    if constexpr (kRaces) t.trace.vision.see(async_agent(t), t.committed - keep);
}

// ---- scheduler ----------------------------------------------------------------------------------------------------

PTX_INLINE void fiber_main() {
    Thread& t = *grid_now->current;
    t.block->grid->entry(t);
    Warp& w = *t.warp;
    w.live &= ~(1u << t.lane);
    --t.block->live;
    ++t.block->grid->events;
    complete_without_exited(w);
    advance_cluster(*t.block->cluster);
    for (;;) t.suspend();
}

PTX_INLINE u8* stacks(size_t count) {
    static thread_local u8* base = nullptr;
    static thread_local size_t have = 0;
    if (count > have) {
        if (base) munmap(base, have * kStackBytes);
        base = static_cast<u8*>(mmap(
            nullptr, count * kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0
        ));
        have = count;
    }
    return base;
}

PTX_INLINE void start(Thread& t, u8* stack) {
    t.stack = stack;
    auto top = reinterpret_cast<u64*>(stack + kStackBytes - 64);  // 16-byte aligned
    *--top = 0;                                                   // a return address that fiber_main never uses
    *--top = reinterpret_cast<u64>(&fiber_main);
    for (int i = 0; i < 6; ++i) *--top = 0;
    t.stack_pointer = top;
}

struct Free {
    void operator()(u8* p) const { std::free(p); }
};

struct Scheduler {
    Grid& grid;
    u32 threads, static_shared;
    std::vector<std::unique_ptr<Block>> blocks;
    std::vector<std::unique_ptr<u8, Free>> shared;
    std::vector<Warp*> warps;
    u8* stack_base;

    // Blocks of a cluster come and go together.
    void enter_cluster(size_t slot, u32 index) {
        const u32 ctas = grid.launch.cluster;
        const auto cluster = std::make_shared<Cluster>();
        for (u32 rank = 0; rank < ctas; ++rank) {
            blocks[slot + rank] = std::make_unique<Block>();
            blocks[slot + rank]->cluster = cluster, blocks[slot + rank]->rank = rank;
            cluster->blocks.push_back(blocks[slot + rank].get());
        }
        for (u32 rank = 0; rank < ctas; ++rank) enter(slot + rank, index * ctas + rank);
    }

    bool leave_cluster(size_t slot) {
        const u32 ctas = grid.launch.cluster;
        for (u32 rank = 0; rank < ctas; ++rank) {
            if (!blocks[slot + rank] || blocks[slot + rank]->live) return false;
        }
        for (u32 rank = 0; rank < ctas; ++rank) finish(*blocks[slot + rank]);
        for (u32 rank = 0; rank < ctas; ++rank) {
            if constexpr (kProfile) finish_profile(*blocks[slot + rank]);
            blocks[slot + rank].reset();
        }
        return true;
    }

    void enter(size_t slot, u32 linear) {
        Launch& l = grid.launch;
        Block& b = *blocks[slot];
        b.grid = &grid, b.linear = linear;
        b.id[0] = linear % l.grid[0], b.id[1] = linear / l.grid[0] % l.grid[1],
        b.id[2] = linear / l.grid[0] / l.grid[1];
        b.shared = shared[slot].get();
        b.shared_bytes = static_shared + l.dynamic_shared;
        b.dynamic = kSharedBase + static_shared;
        std::memset(b.shared, 0xff, b.shared_bytes);
        b.threads.resize(threads);
        b.warps.resize((threads + 31) / 32);
        b.live = threads;
        b.free_registers = kRegisters - threads * registers_of(threads);
        for (u32 i = 0; i < b.warps.size(); ++i) {
            Warp& w = b.warps[i];
            w.block = &b, w.index = i;
            const u32 lanes = std::min(32u, threads - 32 * i);
            w.lanes = w.live = w.ready = lanes == 32 ? ~0u : (1u << lanes) - 1;
        }
        for (u32 i = 0; i < threads; ++i) {
            Thread& t = b.threads[i];
            t.block = &b, t.warp = &b.warps[i / 32], t.index = i, t.lane = i % 32;
            t.agent = b.rank * threads + i, t.registers = registers_of(threads);
            t.tid[0] = i % l.block[0], t.tid[1] = i / l.block[0] % l.block[1], t.tid[2] = i / l.block[0] / l.block[1];
            start(t, stack_base + (slot * threads + i) * kStackBytes);
        }
        if constexpr (kRaces) begin_races(b);
    }

    void step(Warp& w) {
        const u32 order = grid.launch.order;
        u32 lane = order == kBackward ? 31 - std::countl_zero(w.ready) : std::countr_zero(w.ready);
        if (order == kRandomOrder) {
            for (u32 skip = grid.random(std::popcount(w.ready)), m = w.ready;; m &= m - 1) {
                lane = std::countr_zero(m);
                if (!skip--) break;
            }
        }
        w.ready &= ~(1u << lane);
        Thread& t = w.thread(lane);
        grid.current = &t;
        ptx_switch(&grid.scheduler, t.stack_pointer);
    }

    // True if anything could run.
    bool pass() {
        bool ran = false;
        if (grid.launch.order == kRandomOrder) {
            std::vector<Warp*> ready;
            for (Warp* w : warps) {
                if (w->ready) ready.push_back(w);
            }
            if (ready.empty()) return false;
            step(*ready[grid.random(u32(ready.size()))]);
            return true;
        }
        for (Warp* w : warps) {
            while (w->ready && !grid.launch.failed) {
                step(*w);
                ran = true;
            }
        }
        return ran;
    }

    bool land_one() {
        for (auto& b : blocks) {
            if (!b || b->in_flight.empty()) continue;
            const size_t i = grid.launch.asynchrony == kRandomTime ? grid.random(u32(b->in_flight.size())) : 0;
            auto land = std::move(b->in_flight[i]);
            b->in_flight.erase(b->in_flight.begin() + i);
            land();
            ++grid.events;
            return true;
        }
        return false;
    }

    // What a block leaves in flight lands; on a device its shared memory may be another block's by then.
    void finish(Block& b) {
        bool late = !b.in_flight.empty();
        for (auto& land : std::exchange(b.in_flight, {})) land();
        for (Thread& t : b.threads) {
            late |= !t.bulk.empty();
            for (auto& land : t.bulk) land();
        }
        if (late) grid.warn(0, "a block ended with asynchronous copies in flight");
    }

    void stuck(const char* kind) {
        std::map<std::pair<u32, const char*>, std::vector<const Thread*>> where;
        const Thread* first = nullptr;
        u32 exited = 0;
        for (auto& b : blocks) {
            if (!b) continue;
            for (Thread& t : b->threads) {
                if (!(t.warp->live >> t.lane & 1)) {
                    ++exited;
                    continue;
                }
                where[{t.line, t.waits}].push_back(&t);
                if (!first) first = &t;
            }
        }
        std::string text = kind;
        for (auto& [at, who] : where) {
            text += "; " + std::to_string(who.size()) + " threads (first: " + std::to_string(who[0]->index) +
                    ") at line " + std::to_string(at.first) + " wait for " + at.second;
        }
        if (exited) text += "; " + std::to_string(exited) + " threads have exited";
        report(grid.launch, *first, first->line, text.c_str());
    }

    void run() {
        Launch& l = grid.launch;
        const u32 ctas = l.cluster = std::max(1u, l.cluster);
        // Of clusters, each by its place in the grid; one is taken whole where any of its blocks is asked for.
        std::vector<u32> queue;
        if (l.blocks) {
            for (u32 i = 0; i < l.block_count; ++i) {
                const u32 cluster = l.blocks[i] / ctas;
                if (std::find(queue.begin(), queue.end(), cluster) == queue.end()) queue.push_back(cluster);
            }
        } else {
            queue.resize(u64(l.grid[0]) * l.grid[1] * l.grid[2] / ctas);
            for (u32 i = 0; i < queue.size(); ++i) queue[i] = i;
        }
        if (l.order == kForward) std::reverse(queue.begin(), queue.end());  // taken from the back
        const u64 count = queue.size();
        if (l.order == kRandomOrder) {
            for (u32 i = u32(count); i > 1; --i) std::swap(queue[i - 1], queue[grid.random(i)]);
        }
        const size_t slots = std::min<u64>(count, std::max(1u, l.resident / ctas)) * ctas;
        blocks.resize(slots);
        for (size_t i = 0; i < slots; ++i) {
            const size_t bytes = (static_shared + l.dynamic_shared + 1024) / 1024 * 1024;
            shared.emplace_back(static_cast<u8*>(std::aligned_alloc(1024, bytes)));
        }
        stack_base = stacks(slots * threads);
        u32 idle = 0;
        for (bool filled = false; !l.failed;) {
            bool busy = false, changed = !filled;
            for (size_t i = 0; i < slots; i += ctas) {
                changed |= leave_cluster(i);
                if (!blocks[i] && !queue.empty()) {
                    enter_cluster(i, queue.back());
                    queue.pop_back();
                    changed = true;
                }
                busy |= blocks[i] != nullptr;
            }
            filled = true;
            if (!busy) return;
            if (changed) {
                warps.clear();
                for (auto& b : blocks) {
                    for (size_t i = 0; b && i < b->warps.size(); ++i) warps.push_back(&b->warps[i]);
                }
                if (l.order == kBackward) std::reverse(warps.begin(), warps.end());
            }
            const u32 before = grid.events;
            if (l.asynchrony == kRandomTime && !grid.random(4)) land_one();
            bool ran = pass();
            if (l.failed) return;
            for (Warp* w : warps) {
                ran |= w->yielded != 0;
                if (grid.launch.order != kRandomOrder || !w->ready) w->ready |= std::exchange(w->yielded, 0);
            }
            if (!ran && !land_one() &&
                std::any_of(blocks.begin(), blocks.end(), [](auto& b) { return b && b->live; })) {
                return stuck("deadlock");
            }
            idle = grid.events == before ? idle + 1 : 0;
            if (idle > u64(l.spin_limit) * (l.order == kRandomOrder ? threads : 1)) {
                if (!land_one()) return stuck("endless loop");
                idle = 0;
            }
        }
    }
};

PTX_INLINE void run_grid(Launch& launch, Entry entry, u32 static_shared, const std::vector<Range>& own) {
    Grid grid{launch, entry, own, Random{launch.seed * 2 + 1}};
    grid.ranges.insert(grid.ranges.end(), launch.ranges, launch.ranges + launch.range_count);
    const u64 params = reinterpret_cast<u64>(launch.params);
    grid.ranges.push_back({params, params + launch.param_bytes});
    const u64 workspace = reinterpret_cast<u64>(grid.workspace);
    grid.ranges.push_back({workspace, workspace + sizeof grid.workspace});
    std::sort(grid.ranges.begin(), grid.ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
    Grid* before = std::exchange(grid_now, &grid);
    const u32 threads = launch.block[0] * launch.block[1] * launch.block[2];
    Scheduler{grid, threads, static_shared, {}, {}, {}, nullptr}.run();
    grid_now = before;
}

}  // namespace ptx
