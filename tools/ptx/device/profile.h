// Counts what the hardware would do for the 32 addresses of a warp's memory access. Included by simt.h.
#pragma once

namespace ptx {

struct Request {
    u32 mask = 0, size = 0, line = 0;
    bool shared = false;
    u64 address[32];
};

// 32 banks of 4 bytes; lanes go in phases of 128 bytes, and a phase costs as many wavefronts as its worst bank has
// words.
PTX_INLINE u32 wavefronts(const Request& r, u32 lanes_per_phase, u32& phases) {
    u32 total = 0;
    phases = 0;
    for (u32 first = 0; first < 32; first += lanes_per_phase) {
        std::vector<u64> words;
        for (u32 lane = first; lane < first + lanes_per_phase; ++lane) {
            if (!(r.mask >> lane & 1)) continue;
            for (u32 b = 0; b < std::max(r.size, 4u); b += 4) words.push_back((r.address[lane] + b) / 4);
        }
        if (words.empty()) continue;
        std::sort(words.begin(), words.end());
        words.erase(std::unique(words.begin(), words.end()), words.end());
        u32 load[32] = {}, worst = 0;
        for (u64 w : words) worst = std::max(worst, ++load[w % 32]);
        total += worst;
        ++phases;
    }
    return total;
}

PTX_INLINE void account(LineProfile& p, const Request& r) {
    const u32 lanes = std::popcount(r.mask);
    ++p.requests;
    (r.shared ? p.shared_bytes : p.bytes) += u64(lanes) * r.size;
    if (r.shared) {
        u32 phases;
        p.wavefronts += wavefronts(r, r.size <= 4 ? 32 : 128 / r.size, phases);
        p.ideal_wavefronts += phases;
        return;
    }
    std::vector<u64> sectors;
    std::vector<std::pair<u64, u64>> bytes;
    for (u32 lane = 0; lane < 32; ++lane) {
        if (!(r.mask >> lane & 1)) continue;
        for (u64 s = r.address[lane] / 32; s <= (r.address[lane] + r.size - 1) / 32; ++s) sectors.push_back(s);
        bytes.push_back({r.address[lane], r.address[lane] + r.size});
    }
    std::sort(sectors.begin(), sectors.end());
    p.sectors += std::unique(sectors.begin(), sectors.end()) - sectors.begin();
    std::sort(bytes.begin(), bytes.end());
    u64 distinct = 0, end = 0;
    for (auto [a, b] : bytes) {
        if (b > end) distinct += b - std::max(a, end);
        end = std::max(end, b);
    }
    p.ideal_sectors += (distinct + 31) / 32;
}

// Lanes run one after another: an access joins those that other lanes of its warp made at the same line in the same
// trip.
class Requests {
    std::unordered_map<u64, Request> open_;

  public:
    void add(LineProfile* lines, u32 lane, u32 lanes, u32 line, u64 when, bool shared, u64 address, u32 size) {
        const u64 key = (when * 2 + shared) * 1000003 + line;
        Request& r = open_[key];
        if (r.mask >> lane & 1) {
            account(lines[r.line], r);
            r.mask = 0;
        }
        r.mask |= 1u << lane, r.size = size, r.line = line, r.shared = shared;
        r.address[lane] = address;
        if (r.mask == lanes) {
            account(lines[line], r);
            open_.erase(key);
        }
    }
    void finish(LineProfile* lines) {
        for (auto& [key, r] : open_) {
            if (r.mask) account(lines[r.line], r);
        }
        open_.clear();
    }
};

}  // namespace ptx
