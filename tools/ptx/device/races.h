// Who may touch a byte when: vector clocks over agents. An agent is a thread, the asynchronous copies of a thread, a
// TMA target (an mbarrier), the wgmmas of a warp; for global memory, a block. Included by simt.h.
#pragma once

namespace ptx {

// What an agent knows to have happened: for every agent, up to which of its clocks. `fenced` is the part of it that
// fence.proxy.async has made visible to the asynchronous proxy.
struct Vision {
    std::vector<u32> seen, fenced;

    static bool has(const std::vector<u32>& v, u32 agent, u32 clock) { return agent < v.size() && v[agent] >= clock; }
    static void join(std::vector<u32>& to, const std::vector<u32>& from) {
        if (to.size() < from.size()) to.resize(from.size());
        for (size_t i = 0; i < from.size(); ++i) to[i] = std::max(to[i], from[i]);
    }
    void join(const Vision& other) {
        join(seen, other.seen);
        join(fenced, other.fenced);
    }
    void see(u32 agent, u32 clock) {
        if (seen.size() <= agent) seen.resize(agent + 1);
        seen[agent] = std::max(seen[agent], clock);
    }
    void fence() { join(fenced, seen); }
};

struct Conflict {
    enum { none, race, same_value, unfenced } kind = none;
    bool other_wrote = false;
    u32 agent = 0, line = 0;
};

class Shadow {
    struct Access {
        u32 agent, clock = 0, line;
    };
    struct Cell {
        Access write{};
        bool write_atomic = false, write_generic = true;
        std::vector<Access> reads;
    };
    static constexpr u64 kPage = 1024;
    std::unordered_map<u64, std::unique_ptr<Cell[]>> pages_;
    size_t max_reads_;

    Conflict read_after_write(const Cell& c, u32 agent, const Vision& v, bool async) const {
        if (!c.write.clock || c.write.agent == agent) return {};
        if (!Vision::has(v.seen, c.write.agent, c.write.clock))
            return {Conflict::race, true, c.write.agent, c.write.line};
        if (async && c.write_generic && !Vision::has(v.fenced, c.write.agent, c.write.clock)) {
            return {Conflict::unfenced, true, c.write.agent, c.write.line};
        }
        return {};
    }

  public:
    explicit Shadow(size_t max_reads) : max_reads_(max_reads) {}

    // One access by `agent`, at its `clock`, that knows `v`. `async`: through the asynchronous proxy.
    Conflict access(
        u32 agent, u32 clock, const Vision& v, u64 at, u32 size, u32 line, Kind kind, bool async, bool same_value
    ) {
        for (u64 a = at; a < at + size; ++a) {
            auto& page = pages_[a / kPage];
            if (!page) page = std::make_unique<Cell[]>(kPage);
            Cell& c = page[a % kPage];
            if (kind == Kind::atomic && c.write_atomic) {
                c.write = {agent, clock, line};
                continue;
            }
            Conflict found = read_after_write(c, agent, v, async);
            if (kind == Kind::read) {
                if (found.kind) return found;
                size_t kept = 0;
                for (const Access& r : c.reads) {
                    if (r.agent != agent && !Vision::has(v.seen, r.agent, r.clock)) c.reads[kept++] = r;
                }
                c.reads.resize(kept);
                if (kept < max_reads_) c.reads.push_back({agent, clock, line});
                continue;
            }
            if (found.kind == Conflict::race && same_value) found.kind = Conflict::same_value;
            for (const Access& r : c.reads) {
                if (r.agent != agent && !Vision::has(v.seen, r.agent, r.clock))
                    found = {Conflict::race, false, r.agent, r.line};
            }
            if (found.kind) return found;
            c.write = {agent, clock, line};
            c.write_atomic = kind == Kind::atomic, c.write_generic = !async;
            c.reads.clear();
        }
        return {};
    }
};

struct ThreadTrace {
    Vision vision;
    u32 async_agent = 0;  // of its cp.async; 0: none yet
    u32 bulk_agent = 0;
    u32 as_async = 0;  // the agent in whose name the next access is made
    u32 trips = 0, syncs = 0;
};

struct WarpTrace {
    u32 wgmma_agent = 0;
    Requests requests;
};

struct BlockTrace {
    std::unique_ptr<Shadow> shadow;
    std::map<u64, Vision> released;
    Vision vision;
    u32 clock = 1;
};

struct ClusterTrace {
    std::vector<std::string> agents;  // names of those that are no threads
    Vision vision, done;              // of its barrier
};

struct GridTrace {
    Shadow shadow{4};
    std::map<u64, Vision> released;
};

}  // namespace ptx
