// The asynchronous machinery of sm_90: mbarriers, bulk and tensor copies, wgmma.
#pragma once

#include "tensor_map.h"
#include "warp.h"

namespace ptx {

// ---- mbarriers ------------------------------------------------------------------------------------------------------
// Their state lies beside shared memory, found by address; the 8 bytes in it stay poison.

PTX_INLINE MBarrier& mbarrier_in(Thread& t, Block& b, u64 address, u32 line) {
    auto found = b.mbarriers.find(u32(address));
    if (found == b.mbarriers.end())
        t.fail(line, "no mbarrier was initialised at shared address 0x%llx", (unsigned long long)address);
    if (&b == t.block) {
        t.resolve(Space::shared, address, 8, line, Kind::read);
    } else if constexpr (kRaces) {
        const u32 clock = t.trace.vision.seen[t.agent];
        shared_access_as(t, b, t.agent, clock, false, u32(address) - kSharedBase, 8, line, Kind::read, nullptr);
    }
    return found->second;
}

PTX_INLINE MBarrier& mbarrier_at(Thread& t, u64 address, u32 line) { return mbarrier_in(t, *t.block, address, line); }

PTX_INLINE void mbarrier_init(Thread& t, Space space, u64 address, u32 count, u32 line) {
    if (space == Space::generic) address = from_generic(t, address);
    t.resolve(Space::shared, address, 8, line, Kind::write);
    MBarrier& b = t.block->mbarriers[u32(address)];
    if (!b.waiting.empty()) t.fail(line, "mbarrier initialised while threads wait for it");
    const u32 agent = b.agent  ? b.agent
                      : kRaces ? new_agent(*t.block, "copies to mbarrier " + std::to_string(address))
                               : 0;
    b = MBarrier{};
    b.count = b.pending = count;
    b.agent = agent;
}

PTX_INLINE void mbarrier_inval(Thread& t, u64 address, u32 line) {
    MBarrier& b = mbarrier_at(t, address, line);
    t.resolve(Space::shared, address, 8, line, Kind::write);
    if (!b.waiting.empty()) t.fail(line, "mbarrier invalidated while threads wait for it");
    t.block->mbarriers.erase(u32(address));
}

PTX_INLINE void mbarrier_advance(Block& block, MBarrier& b) {
    if (b.pending || b.bytes) return;
    if constexpr (kRaces) {
        b.vision.see(b.agent, b.phase + 1);
        b.done.join(b.vision);
        b.vision = {};
    }
    ++b.phase;
    b.pending = b.count;
    for (Thread* t : std::exchange(b.waiting, {})) block.wake(*t);
}

// Of shared::cta, or of shared::cluster.
PTX_INLINE u64 mbarrier_arrive(Thread& t, u64 address, u32 count, s64 bytes, u32 line) {
    Block& block = home(t, address, line);
    MBarrier& b = mbarrier_in(t, block, address, line);
    const u64 token = b.phase;
    b.bytes += bytes;
    if (count > b.pending)
        t.fail(line, "mbarrier: %u arrive, but only %u are still expected in this phase", count, b.pending);
    b.pending -= count;
    if constexpr (kRaces) {
        if (count) release_to(t, b.vision);
    }
    mbarrier_advance(block, b);
    return token;
}

// Both kinds of wait name a phase: by its parity, or by the token of an arrival.
PTX_INLINE bool mbarrier_wait(Thread& t, u64 address, bool by_parity, u64 which, bool may_block, u32 line) {
    for (;;) {
        MBarrier& b = mbarrier_at(t, address, line);
        if (by_parity ? (b.phase & 1) != (which & 1) : b.phase != which) {
            if constexpr (kRaces) t.trace.vision.join(b.done);
            return true;
        }
        // A try_wait may give up: where copies are not early it does every other time, which finds kernels that do not
        // try again.
        if (!may_block || (t.block->grid->launch.asynchrony != kEarly && ++t.tries % 2)) {
            t.spin(line);
            return false;
        }
        b.waiting.push_back(&t);
        t.wait(line, "mbarrier");
    }
}

PTX_INLINE void arrive_after_copies(Thread& t, u64 address, bool counted, u32 line) {
    MBarrier& b = mbarrier_at(t, address, line);
    if (!counted) ++b.pending;
    std::vector<Copy> copies = t.copies;
    Vision vision = t.trace.vision;
    if constexpr (kRaces) vision.see(async_agent(t), t.committed + 1), ++t.committed;
    auto arrive = [&t, address, copies, vision, line] {
        for (const Copy& c : copies) c.land();
        MBarrier& b = mbarrier_at(t, address, line);
        if (!b.pending) t.fail(line, "mbarrier: a cp.async arrives that its phase does not expect");
        --b.pending;
        if constexpr (kRaces) b.vision.join(vision);
        mbarrier_advance(*t.block, b);
    };
    if (t.block->grid->late())
        t.block->in_flight.push_back(arrive);
    else
        arrive();
}

// ---- bulk copies ----------------------------------------------------------------------------------------------------

PTX_INLINE u32 swizzled(u32 address, u32 bits) { return address ^ ((address >> 7 & ((1u << bits) - 1)) << 4); }

// One run of bytes of a bulk copy; `global` is null where the tensor ends and zeros (or NaN) come instead.
struct Piece {
    u8* global;
    u32 shared, bytes;
};

// Of a copy to or from the shared memory of `b`.
PTX_INLINE void check_pieces(
    Thread& t, Block& b, const std::vector<Piece>& pieces, bool load, u32 agent, u32 clock, u32 line
) {
    for (const Piece& p : pieces) {
        if (p.shared < kSharedBase || p.shared - kSharedBase + p.bytes > t.block->shared_bytes) {
            t.fail(
                line, "bulk copy outside shared memory: address %u, the block has %u bytes", p.shared,
                t.block->shared_bytes
            );
        }
        const u64 global = reinterpret_cast<u64>(p.global);
        if (global && t.block->grid->launch.check_bounds && !allowed(*t.block->grid, global, p.bytes)) {
            char text[96];
            t.fail(
                line, "bulk copy of %u bytes outside every allocation: %s", p.bytes,
                nearest(*t.block->grid, global, text)
            );
        }
        if constexpr (kRaces) {
            if (global) global_access(t, global, p.bytes, line, load ? Kind::read : Kind::write, nullptr);
            shared_access_as(
                t, b, agent, clock, true, p.shared - kSharedBase, p.bytes, line, load ? Kind::write : Kind::read,
                nullptr
            );
        }
    }
}

PTX_INLINE u8* shared_at(Block& b, u32 address) { return b.shared + (address - kSharedBase); }

// The blocks that a multicast writes to, by the bits of its mask; without one it is the thread's own.
PTX_INLINE std::vector<Block*> targets(Thread& t, const u32* mask, u32 line) {
    if (!mask) return {t.block};
    const std::vector<Block*>& ctas = t.block->cluster->blocks;
    if (!*mask || *mask >> ctas.size()) t.fail(line, "multicast: mask 0x%x for a cluster of %zu", *mask, ctas.size());
    std::vector<Block*> found;
    for (u32 rank = 0; rank < ctas.size(); ++rank) {
        if (!(*mask >> rank & 1)) continue;
        if (!ctas[rank]->live) t.fail(line, "multicast: CTA %u of the cluster has exited", rank);
        found.push_back(ctas[rank]);
    }
    return found;
}

// The bytes of global memory, once for all targets, and those of shared memory.
PTX_INLINE void profile_bulk(Thread& t, const std::vector<Piece>& pieces, size_t copies, u32 line) {
    LineProfile& profile = t.block->grid->launch.profile[line];
    u64 bytes = 0, all = 0;
    for (const Piece& p : pieces) bytes += p.global ? p.bytes : 0, all += p.bytes;
    ++profile.requests;
    profile.bytes += bytes, profile.shared_bytes += copies * all;
    profile.sectors += (bytes + 31) / 32, profile.ideal_sectors += (bytes + 31) / 32;
}

// The bytes go to the same place in the shared memory of every target, and count at the mbarrier in the same place
// there.
PTX_INLINE void load_bulk(Thread& t, std::vector<Piece> pieces, u32 fill, u64 barrier, const u32* mask, u32 line) {
    const std::vector<Block*> to = targets(t, mask, line);
    if constexpr (kProfile) profile_bulk(t, pieces, to.size(), line);
    for (Block* block : to) {
        MBarrier& b = mbarrier_in(t, *block, barrier, line);
        check_pieces(t, *block, pieces, true, b.agent, b.phase + 1, line);
    }
    const bool late = t.block->grid->late();
    for (const Piece& p : pieces) {
        for (Block* block : to) {
            if (late) std::memset(shared_at(*block, p.shared), 0xff, p.bytes);
        }
    }
    auto land = [&t, pieces = std::move(pieces), to, fill, barrier, line] {
        for (Block* block : to) {
            s64 bytes = 0;
            for (const Piece& p : pieces) {
                if (p.global)
                    std::memcpy(shared_at(*block, p.shared), p.global, p.bytes);
                else
                    std::memset(shared_at(*block, p.shared), int(fill), p.bytes);
                bytes += p.bytes;
            }
            if (!block->live) t.block->grid->warn(line, "a copy lands in a block that has exited");
            MBarrier& b = mbarrier_in(t, *block, barrier, line);
            b.bytes -= bytes;
            mbarrier_advance(*block, b);
        }
    };
    if (!late) return land();
    t.block->in_flight.push_back(land);
}

PTX_INLINE void store_bulk(Thread& t, std::vector<Piece> pieces, u32 line) {
    u32& agent = t.trace.bulk_agent;
    if (kRaces && !agent) agent = new_agent(*t.block, "bulk copies of thread " + std::to_string(t.index));
    if constexpr (kProfile) profile_bulk(t, pieces, 1, line);
    check_pieces(t, *t.block, pieces, false, agent, t.bulk_committed + 1, line);
    auto land = [&t, pieces = std::move(pieces)] {
        for (const Piece& p : pieces) {
            if (p.global) std::memcpy(p.global, shared_at(*t.block, p.shared), p.bytes);
        }
    };
    if (t.block->grid->late())
        t.bulk.push_back(land);
    else
        land();
}

PTX_INLINE void commit_bulk(Thread& t) {
    t.bulk_groups.push_back(t.bulk.size());
    ++t.bulk_committed;
}

PTX_INLINE void wait_bulk(Thread& t, u32 keep) {
    if (t.bulk_groups.size() <= keep) return;
    const size_t done = t.bulk_groups.size() - keep, landed = t.bulk_groups[done - 1];
    for (size_t i = 0; i < landed; ++i) t.bulk[i]();
    t.bulk.erase(t.bulk.begin(), t.bulk.begin() + landed);
    t.bulk_groups.erase(t.bulk_groups.begin(), t.bulk_groups.begin() + done);
    for (size_t& end : t.bulk_groups) end -= landed;
    if constexpr (kRaces) {
        if (t.trace.bulk_agent) t.trace.vision.see(t.trace.bulk_agent, t.bulk_committed - keep);
    }
}

PTX_INLINE std::vector<Piece> linear(Thread& t, u64 shared, u64 global, u32 bytes, u32 line) {
    if ((shared | global | bytes) % 16) t.fail(line, "bulk copy: addresses and size must be multiples of 16");
    std::vector<Piece> pieces;
    for (u32 at = 0; at < bytes; at += 16) pieces.push_back({reinterpret_cast<u8*>(global + at), u32(shared) + at, 16});
    return pieces;
}

// The box of a tensor map at `at`, in runs of 16 bytes or less where the tensor ends.
PTX_INLINE std::vector<Piece> box(
    Thread& t, u64 shared, u64 map_address, std::initializer_list<s32> at, u32& fill, u32 line
) {
    if (map_address % 64) t.fail(line, "a tensor map must lie at a multiple of 64");
    TensorMap m;
    // A profile counts what a map leads to, and not the map.
    const u8* map = kProfile ? reinterpret_cast<const u8*>(map_address)
                             : t.resolve(Space::generic, map_address, 1, line, Kind::read);
    std::memcpy(&m, map, sizeof m);
    if (m.magic != kTensorMapMagic) t.fail(line, "this is no tensor map");
    if (m.rank != at.size()) t.fail(line, "tensor map of %u dimensions used with %zu coordinates", m.rank, at.size());
    if (shared % 128)
        t.fail(
            line, "a tensor copy's shared address must be a multiple of 128, this is 0x%llx", (unsigned long long)shared
        );
    fill = m.nan_fill ? 0xff : 0;
    const u32 inner = m.box[0] * m.element;
    if (m.swizzle && inner != 16u << m.swizzle)
        t.fail(line, "inner box of %u bytes with a swizzle of %u: not supported", inner, 16u << m.swizzle);
    u32 rows = 1;
    for (u32 d = 1; d < m.rank; ++d) rows *= m.box[d];
    std::vector<Piece> pieces;
    for (u32 row = 0; row < rows; ++row) {
        u64 base = m.address;
        bool inside = true;
        u32 rest = row;
        for (u32 d = 1; d < m.rank; ++d) {
            const s64 c = at.begin()[d] + s64(rest % m.box[d]) * m.step[d];
            rest /= m.box[d];
            inside &= c >= 0 && c < s64(m.dim[d]);
            base += u64(c) * m.stride[d];
        }
        for (u32 b = 0; b < inner; b += 16) {
            const u32 to = swizzled(u32(shared) + row * inner + b, m.swizzle);
            const s64 first = at.begin()[0] * s64(m.element) + b, limit = s64(m.dim[0]) * m.element;
            // Where a tensor begins or ends inside a run, it is cut at elements.
            if (inside && first >= 0 && first + 16 <= limit) {
                pieces.push_back({reinterpret_cast<u8*>(base + u64(first)), to, 16});
                continue;
            }
            for (u32 e = 0; e < 16; e += m.element) {
                const bool valid = inside && first + e >= 0 && first + e < limit;
                pieces.push_back({valid ? reinterpret_cast<u8*>(base + u64(first) + e) : nullptr, to + e, m.element});
            }
        }
    }
    return pieces;
}

// ---- wgmma ----------------------------------------------------------------------------------------------------------
// Each warp of a warpgroup computes its 16 rows; the four need not meet.

struct MatrixDescriptor {
    u32 start, leading, stride, swizzle;

    explicit MatrixDescriptor(u64 bits)
        : start((bits & 0x3fff) << 4),
          leading((bits >> 16 & 0x3fff) << 4),
          stride((bits >> 32 & 0x3fff) << 4),
          swizzle((4 - (bits >> 62)) & 3) {}

    // The address of the 16 bytes with element (mn, k), of `size` bytes; of `major` the bytes are neighbours.
    u32 chunk(u32 mn, u32 k, u32 size, bool mn_major) const {
        const u32 span = 16u << swizzle;
        u32 at = start;
        if (!mn_major) {
            const u32 byte = k * size;
            at += mn / 8 * stride + mn % 8 * span + (swizzle ? byte : byte / 16 * leading);
        } else {
            const u32 byte = mn * size;
            at += swizzle ? byte / span * leading + k / 8 * stride + k % 8 * span + byte % span
                          : byte / 16 * stride + k / 8 * leading + k % 8 * 16;
        }
        return swizzled(at, swizzle);
    }
};

struct WgmmaArg {
    u64 a, b;
    bool a_in_registers, scale_d;
    s32 scale_a, scale_b, trans_a, trans_b;
    u32 line;
    u32 registers[4];
    u32 d[128];
};

template <class T>
const T* wgmma_chunk(Thread& t, u32 agent, u32 clock, u32 address, u32 line) {
    if (address < kSharedBase || address - kSharedBase + 16 > t.block->shared_bytes) {
        t.fail(
            line, "wgmma reads outside shared memory: address %u, the block has %u bytes", address,
            t.block->shared_bytes
        );
    }
    if constexpr (kRaces)
        shared_access_as(t, *t.block, agent, clock, true, address - kSharedBase, 16, line, Kind::read, nullptr);
    return reinterpret_cast<const T*>(shared_at(*t.block, address));
}

template <class T, class C, int N>
void wgmma(Thread& t, u32 line, WgmmaArg& arg) {
    meet(t, ~0u, line, "wgmma", true, &arg, [](Warp& w, u32 lanes, void** args) {
        constexpr int K = 32 / sizeof(T), per = kPer<T>, run = 16 / sizeof(T);
        Thread& t = w.thread(0);
        u32& agent = w.trace.wgmma_agent;
        if constexpr (kRaces) {
            if (!agent) agent = new_agent(*w.block, "wgmma of warp " + std::to_string(w.index));
            join_warp(w, lanes);
        }
        auto at = [&](int lane) -> WgmmaArg& { return *static_cast<WgmmaArg*>(args[lane]); };
        const WgmmaArg& first = at(0);
        const u32 clock = w.wgmma_committed + 1, row0 = w.index % 4 * 16;
        static thread_local f32 a[16][K], b[K][N], c[16][N];
        auto fetch = [&](const MatrixDescriptor& m, u32 mn0, u32 count, bool mn_major, auto put) {
            for (u32 i = 0; i < count; i += mn_major ? run : 1) {
                for (u32 k = 0; k < K; k += mn_major ? 1 : run) {
                    const T* x = wgmma_chunk<T>(t, agent, clock, m.chunk(mn0 + i, k, sizeof(T), mn_major), first.line);
                    for (u32 e = 0; e < run; ++e) mn_major ? put(i + e, k, wide(x[e])) : put(i, k + e, wide(x[e]));
                }
            }
        };
        if (first.a_in_registers) {
            for (int lane = 0; lane < 32; ++lane) {
                for (int r = 0; r < 4; ++r) {
                    for (int e = 0; e < per; ++e) {
                        a[lane / 4 + 8 * (r & 1)][per * (lane % 4 + 4 * (r >> 1)) + e] =
                            element<T>(at(lane).registers[r], e);
                    }
                }
            }
        } else {
            fetch(MatrixDescriptor(first.a), row0, 16, first.trans_a, [&](u32 i, u32 k, f32 x) { a[i][k] = x; });
        }
        fetch(MatrixDescriptor(first.b), 0, N, first.trans_b, [&](u32 j, u32 k, f32 x) { b[k][j] = x; });
        for (int lane = 0; lane < 32; ++lane) {
            for (int i = 0; i < N / 2; ++i) {
                c[lane / 4 + i / 2 % 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2] =
                    first.scale_d ? accumulator<C>(at(lane).d, i) : 0;
            }
        }
        const f32 sign = f32(first.scale_a * first.scale_b);
        for (int i = 0; i < 16; ++i) {
            for (int k = 0; k < K; ++k) {
                const f32 x = sign * a[i][k];
                for (int j = 0; j < N; ++j) c[i][j] += x * b[k][j];
            }
        }
        for (int lane = 0; lane < 32; ++lane) {
            for (int i = 0; i < N / 2; ++i) {
                accumulate<C>(at(lane).d, i, c[lane / 4 + i / 2 % 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2]);
            }
        }
    });
}

// Before an instruction that touches accumulators which the wgmmas of `group` write. ptxas waits by itself before a mov
// that the compiler made, and loses the asynchrony.
PTX_INLINE void accumulators_ready(Thread& t, u32 group, bool moved, u32 line) {
    if (group <= t.warp->wgmma_waited) return;
    constexpr const char* text = "accumulators of a wgmma are touched before wgmma.wait_group";
    moved ? t.block->grid->warn(line, text) : t.fail(line, "%s", text);
}

PTX_INLINE void commit_wgmma(Thread& t, u32 line) {
    meet(t, ~0u, line, "wgmma.commit_group", true, nullptr, [](Warp& w, u32, void**) { ++w.wgmma_committed; });
}

PTX_INLINE void wait_wgmma(Thread& t, u32 keep, u32 line) {
    meet(t, ~0u, line, "wgmma.wait_group", true, &keep, [](Warp& w, u32 lanes, void** args) {
        const u32 keep = *static_cast<u32*>(args[0]);
        w.wgmma_waited = w.wgmma_committed - std::min(keep, w.wgmma_committed);
        if constexpr (kRaces) {
            join_warp(w, lanes);
            if (!w.trace.wgmma_agent || w.wgmma_committed <= keep) return;
            for (u32 lane = 0; lane < 32; ++lane)
                w.thread(lane).trace.vision.see(w.trace.wgmma_agent, w.wgmma_committed - keep);
        }
    });
}

}  // namespace ptx

#pragma GCC reset_options
