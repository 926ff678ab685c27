// Instructions that a warp executes together: shuffles, votes, matrices.
#pragma once

#include "ops.h"

namespace ptx {

enum class Shfl { up, down, bfly, idx };

struct ShflArg {
    u32 value, lane, clamp, result;
    bool valid;
    u32 line;
};

template <Shfl Mode>
u32 shfl(Thread& t, u32 value, u32 lane, u32 clamp, u32 mask, bool& valid, u32 line) {
    static constexpr const char* names[] = {"shfl.sync.up", "shfl.sync.down", "shfl.sync.bfly", "shfl.sync.idx"};
    ShflArg arg{value, lane & 31, clamp, 0, false, line};
    meet(t, mask, line, names[static_cast<int>(Mode)], false, &arg, [](Warp& w, u32 mask, void** args) {
        for (u32 m = mask; m; m &= m - 1) {
            const s32 lane = std::countr_zero(m);
            auto& a = *static_cast<ShflArg*>(args[lane]);
            const s32 segment = a.clamp >> 8 & 31, limit = a.clamp & 31;
            const s32 first = lane & segment, last = first | (limit & ~segment), by = static_cast<s32>(a.lane);
            s32 from = Mode == Shfl::up     ? lane - by
                       : Mode == Shfl::down ? lane + by
                       : Mode == Shfl::bfly ? lane ^ by
                                            : first | (by & ~segment);
            a.valid = Mode == Shfl::up ? from >= last : from <= last;
            if (!a.valid) from = lane;
            if (!(mask >> from & 1))
                w.thread(lane).fail(a.line, "shfl.sync reads lane %d, which is not in its mask %08x", from, mask);
            a.result = static_cast<ShflArg*>(args[from])->value;
        }
    });
    valid = arg.valid;
    return arg.result;
}

struct VoteArg {
    u64 value;
    u64 result;
};

// A collective whose result is one number for all lanes that meet.
template <class F>
u64 vote(Thread& t, u32 mask, u32 line, const char* what, u64 value, F) {
    VoteArg arg{value, 0};
    meet(t, mask, line, what, false, &arg, [](Warp&, u32 mask, void** args) {
        for (u32 m = mask; m; m &= m - 1) {
            static_cast<VoteArg*>(args[std::countr_zero(m)])->result = F{}(mask, std::countr_zero(m), args);
        }
    });
    return arg.result;
}
PTX_INLINE u64 voted(void** args, u32 lane) { return static_cast<VoteArg*>(args[lane])->value; }

PTX_INLINE u32 ballot(Thread& t, u32 mask, u32 line, bool p) {
    return u32(vote(t, mask, line, "vote.sync", p, [](u32 mask, u32, void** args) {
        u64 r = 0;
        for (u32 m = mask; m; m &= m - 1) r |= voted(args, std::countr_zero(m)) << std::countr_zero(m);
        return r;
    }));
}
PTX_INLINE u32 match_any(Thread& t, u32 mask, u32 line, u64 v) {
    return u32(vote(t, mask, line, "match.any.sync", v, [](u32 mask, u32 lane, void** args) {
        u64 r = 0;
        for (u32 m = mask; m; m &= m - 1) {
            if (voted(args, std::countr_zero(m)) == voted(args, lane)) r |= 1u << std::countr_zero(m);
        }
        return r;
    }));
}
PTX_INLINE u32 match_all(Thread& t, u32 mask, u32 line, u64 v, bool& p) {
    const u32 r = u32(vote(t, mask, line, "match.all.sync", v, [](u32 mask, u32 lane, void** args) {
        for (u32 m = mask; m; m &= m - 1) {
            if (voted(args, std::countr_zero(m)) != voted(args, lane)) return u64(0);
        }
        return u64(mask);
    }));
    p = r != 0;
    return r;
}
PTX_INLINE bool elect(Thread& t, u32 mask, u32 line, u32& leader) {
    leader =
        u32(vote(t, mask, line, "elect.sync", 0, [](u32 mask, u32, void**) { return u64(std::countr_zero(mask)); }));
    return leader == t.lane;
}
template <class T, class F>
T redux(Thread& t, u32 mask, u32 line, T v, F) {
    return as<T>(
        vote(t, mask, line, "redux.sync", Unsigned<T>(std::bit_cast<Unsigned<T>>(v)), [](u32 mask, u32, void** args) {
            T r = as<T>(voted(args, std::countr_zero(mask)));
            for (u32 m = mask & (mask - 1); m; m &= m - 1) r = F{}(r, as<T>(voted(args, std::countr_zero(m))));
            return u64(std::bit_cast<Unsigned<T>>(r));
        })
    );
}

// ---- mma ------------------------------------------------------------------------------------------------------------
// Lane l holds rows g = l / 4 (and g + 8) and columns of q = l % 4: a register holds `per` neighbouring elements of k.

template <class T>
constexpr int kPer = 4 / sizeof(T);

template <class T>
f32 element(u32 r, int e) {
    if constexpr (sizeof(T) == 4)
        return wide(std::bit_cast<T>(r));
    else
        return wide(T{static_cast<u16>(r >> 16 * e)});
}

template <class T, class C, int K>
struct MmaArg {
    static constexpr int A = K / (4 * kPer<T>)*2, B = A / 2, D = sizeof(C) == 4 ? 4 : 2;
    u32 a[A], b[B], c[D];
};

// c is m16 x n8, either four f32 or two f16x2.
template <class C>
f32 accumulator(const u32* c, int i) {
    if constexpr (sizeof(C) == 4)
        return std::bit_cast<f32>(c[i]);
    else
        return wide(f16{static_cast<u16>(c[i / 2] >> 16 * (i % 2))});
}
template <class C>
void accumulate(u32* c, int i, f32 v) {
    if constexpr (sizeof(C) == 4)
        c[i] = std::bit_cast<u32>(v);
    else
        c[i / 2] = (c[i / 2] & (i % 2 ? 0xffff : 0xffff0000)) | u32(to_f16<Round::nearest>(v).bits) << 16 * (i % 2);
}

template <class T, class C, int K>
void mma(Thread& t, u32 line, MmaArg<T, C, K>& arg) {
    using Arg = MmaArg<T, C, K>;
    meet(t, ~0u, line, "mma.sync", true, &arg, [](Warp&, u32, void** args) {
        constexpr int per = kPer<T>;
        f32 a[16][K], b[K][8], c[16][8];
        for (int lane = 0; lane < 32; ++lane) {
            const auto& x = *static_cast<Arg*>(args[lane]);
            const int g = lane / 4, q = lane % 4;
            for (int r = 0; r < Arg::A; ++r) {
                for (int e = 0; e < per; ++e) a[g + 8 * (r & 1)][per * (q + 4 * (r >> 1)) + e] = element<T>(x.a[r], e);
            }
            for (int r = 0; r < Arg::B; ++r) {
                for (int e = 0; e < per; ++e) b[per * (q + 4 * r) + e][g] = element<T>(x.b[r], e);
            }
            for (int i = 0; i < 4; ++i) c[g + i / 2 * 8][2 * q + i % 2] = accumulator<C>(x.c, i);
        }
        for (int i = 0; i < 16; ++i) {
            for (int k = 0; k < K; ++k) {
                for (int j = 0; j < 8; ++j) c[i][j] += a[i][k] * b[k][j];
            }
        }
        for (int lane = 0; lane < 32; ++lane) {
            auto& x = *static_cast<Arg*>(args[lane]);
            for (int i = 0; i < 4; ++i) accumulate<C>(x.c, i, c[lane / 4 + i / 2 * 8][2 * (lane % 4) + i % 2]);
        }
    });
}

struct DmmaArg {
    f64 a, b, c[2];
};

PTX_INLINE void dmma(Thread& t, u32 line, DmmaArg& arg) {
    meet(t, ~0u, line, "mma.sync.f64", true, &arg, [](Warp&, u32, void** args) {
        auto at = [&](int lane) -> DmmaArg& { return *static_cast<DmmaArg*>(args[lane]); };
        for (int lane = 0; lane < 32; ++lane) {
            for (int i = 0; i < 2; ++i) {
                for (int k = 0; k < 4; ++k) at(lane).c[i] += at(lane / 4 * 4 + k).a * at((lane % 4 * 2 + i) * 4 + k).b;
            }
        }
    });
}

// ---- ldmatrix, stmatrix, movmatrix ----------------------------------------------------------------------------------
// As all collectives but bar.warp.sync, they bring lanes together and do not order their memory.

struct MatrixArg {
    u64 address;
    Space space;
    u32 line;
    u32 r[4];
};

template <int N, bool Trans, bool Store>
void matrix_access(Thread& t, u32 line, MatrixArg& arg) {
    meet(t, ~0u, line, Store ? "stmatrix" : "ldmatrix", true, &arg, [](Warp& w, u32, void** args) {
        for (int i = 0; i < N; ++i) {
            u16 rows[8][8];
            if constexpr (Store) {
                for (int lane = 0; lane < 32; ++lane) {
                    for (int e = 0; e < 2; ++e) {
                        const u16 v = static_cast<MatrixArg*>(args[lane])->r[i] >> 16 * e;
                        (Trans ? rows[2 * (lane % 4) + e][lane / 4] : rows[lane / 4][2 * (lane % 4) + e]) = v;
                    }
                }
            }
            for (int row = 0; row < 8; ++row) {
                auto& from = *static_cast<MatrixArg*>(args[8 * i + row]);
                Thread& t = w.thread(8 * i + row);
                u8* p = t.resolve(
                    from.space, from.address, 16, from.line, Store ? Kind::write : Kind::read,
                    Store ? rows[row] : nullptr
                );
                if constexpr (Store)
                    std::memcpy(p, rows[row], 16);
                else
                    std::memcpy(rows[row], p, 16);
            }
            if constexpr (!Store) {
                for (int lane = 0; lane < 32; ++lane) {
                    const int g = lane / 4, q = 2 * (lane % 4);
                    const u32 lo = Trans ? rows[q][g] : rows[g][q], hi = Trans ? rows[q + 1][g] : rows[g][q + 1];
                    static_cast<MatrixArg*>(args[lane])->r[i] = lo | hi << 16;
                }
            }
        }
    });
}

PTX_INLINE u32 movmatrix(Thread& t, u32 line, u32 value) {
    VoteArg arg{value, 0};
    meet(t, ~0u, line, "movmatrix", true, &arg, [](Warp&, u32, void** args) {
        for (u32 lane = 0; lane < 32; ++lane) {
            u32 r = 0;
            for (u32 e = 0; e < 2; ++e) {
                const u32 row = 2 * (lane % 4) + e, col = lane / 4;
                r |= (u32(voted(args, row * 4 + col / 2)) >> 16 * (col % 2) & 0xffff) << 16 * e;
            }
            static_cast<VoteArg*>(args[lane])->result = r;
        }
    });
    return u32(arg.result);
}

}  // namespace ptx
