// The arithmetic of PTX: one template per operation, on values of PTX's types.
#pragma once

#include <immintrin.h>

#include <limits>

#include "simt.h"

namespace ptx {

struct f16 {
    u16 bits;
};
struct bf16 {
    u16 bits;
};
struct tf32 {
    u32 bits;
};
template <class T>
struct Pair {
    T lo, hi;
};
using f16x2 = Pair<f16>;
using bf16x2 = Pair<bf16>;

enum class Round { nearest, zero, down, up };

template <class T>
constexpr bool is_half = std::is_same_v<T, f16> || std::is_same_v<T, bf16>;
template <class T>
constexpr bool is_pair = std::is_same_v<T, f16x2> || std::is_same_v<T, bf16x2>;
template <class T>
constexpr bool is_real = std::is_floating_point_v<T> || is_half<T>;

template <size_t N>
struct UnsignedOf;
template <>
struct UnsignedOf<1> {
    using type = u8;
};
template <>
struct UnsignedOf<2> {
    using type = u16;
};
template <>
struct UnsignedOf<4> {
    using type = u32;
};
template <>
struct UnsignedOf<8> {
    using type = u64;
};
template <>
struct UnsignedOf<16> {
    using type = u128;
};
template <class T>
using Unsigned = typename UnsignedOf<sizeof(T)>::type;

// A register holds bits; an instruction's type says what they mean.
template <class T, class U>
T as(U x) {
    if constexpr (std::is_same_v<T, U>)
        return x;
    else if constexpr (std::is_integral_v<T> || std::is_same_v<T, u128>)
        return static_cast<T>(x);
    else
        return std::bit_cast<T>(static_cast<Unsigned<T>>(x));
}

template <class R, class T>
void set(R& r, T v) {
    if constexpr (std::is_integral_v<T> || std::is_same_v<T, u128>)
        r = static_cast<R>(v);
    else
        r = static_cast<R>(std::bit_cast<Unsigned<T>>(v));
}

// ---- rounding -------------------------------------------------------------------------------------------------------

// Runs `f` with the processor's rounding mode set; the barriers keep the compiler from moving the operation out.
template <Round R, class F, class... A>
auto rounded(F f, A... a) {
    if constexpr (R == Round::nearest) return f(a...);
    constexpr u32 modes[] = {_MM_ROUND_NEAREST, _MM_ROUND_TOWARD_ZERO, _MM_ROUND_DOWN, _MM_ROUND_UP};
    const u32 before = _mm_getcsr();
    _mm_setcsr((before & ~_MM_ROUND_MASK) | modes[static_cast<int>(R)]);
    (..., [&] { asm volatile("" : "+m"(a)); }());
    auto result = f(a...);
    asm volatile("" : "+m"(result));
    _mm_setcsr(before);
    return result;
}

// Rounds to odd: a second rounding, to a narrower type, is then as good as one.
PTX_INLINE f32 to_odd(f64 x) {
    const f32 y = static_cast<f32>(x);
    if (f64(y) == x || std::isnan(x) || std::isinf(y)) return y;
    u32 bits = std::bit_cast<u32>(y);
    if (bits & 1) return y;
    return std::bit_cast<f32>((std::fabs(f64(y)) > std::fabs(x)) ? bits - 1 : bits + 1);
}

template <Round R>
bf16 to_bf16(f32 x) {
    const u32 bits = std::bit_cast<u32>(x), low = bits & 0xffff;
    if (std::isnan(x)) return {0x7fff};
    const bool negative = bits >> 31;
    const u32 up = R == Round::nearest ? (low > 0x8000 || (low == 0x8000 && (bits >> 16 & 1)))
                   : R == Round::zero  ? 0
                   : R == Round::up    ? low && !negative
                                       : low && negative;
    return {static_cast<u16>((bits >> 16) + up)};
}

template <Round R>
f16 to_f16(f32 x) {
    if (std::isnan(x)) return {0x7fff};
    constexpr int modes[] = {0, 3, 1, 2};
    return {static_cast<u16>(_cvtss_sh(x, modes[static_cast<int>(R)]))};
}

PTX_INLINE f32 wide(f16 x) { return _cvtsh_ss(x.bits); }
PTX_INLINE f32 wide(bf16 x) { return std::bit_cast<f32>(u32(x.bits) << 16); }
PTX_INLINE f32 wide(tf32 x) { return std::bit_cast<f32>(x.bits & ~0x1fffu); }
PTX_INLINE f32 wide(f32 x) { return x; }
PTX_INLINE f64 wide(f64 x) { return x; }

template <class T, Round R = Round::nearest>
T narrow(f64 x) {
    if constexpr (std::is_same_v<T, f64>)
        return x;
    else if constexpr (std::is_same_v<T, f32>)
        return rounded<R>([](f64 v) { return static_cast<f32>(v); }, x);
    else if constexpr (std::is_same_v<T, f16>)
        return to_f16<R>(to_odd(x));
    else
        return to_bf16<R>(to_odd(x));
}

PTX_INLINE f32 ftz(f32 x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
template <class T>
T ftz(T x) {
    return x;
}

template <class T>
T sat(T x) {
    if constexpr (is_pair<T>)
        return {sat(x.lo), sat(x.hi)};
    else if constexpr (is_real<T>)
        return wide(x) > 0 ? wide(x) < 1 ? x : narrow<T>(1.0) : narrow<T>(0.0);
    else
        return x;
}
template <class T>
T relu(T x) {
    if constexpr (is_pair<T>)
        return {relu(x.lo), relu(x.hi)};
    else
        return std::isnan(wide(x)) || wide(x) > 0 ? x : narrow<T>(0.0);
}

// ---- arithmetic -----------------------------------------------------------------------------------------------------

// `f` on the values of any real type; halves are computed in double, where it is exact before the one rounding.
template <Round R, class T, class F, class... A>
T real(F f, T a, A... rest) {
    if constexpr (is_pair<T>)
        return {real<R>(f, a.lo, rest.lo...), real<R>(f, a.hi, rest.hi...)};
    else if constexpr (is_half<T>)
        return narrow<T, R>(f(f64(wide(a)), f64(wide(rest))...));
    else
        return rounded<R>(f, a, rest...);
}

template <Round R, class T>
T add(T a, T b) {
    if constexpr (std::is_integral_v<T>)
        return a + b;
    else
        return real<R>([](auto x, auto y) { return x + y; }, a, b);
}
template <Round R, class T>
T sub(T a, T b) {
    if constexpr (std::is_integral_v<T>)
        return a - b;
    else
        return real<R>([](auto x, auto y) { return x - y; }, a, b);
}
template <Round R, class T>
T mul(T a, T b) {
    return real<R>([](auto x, auto y) { return x * y; }, a, b);
}
template <Round R, class T>
T fma(T a, T b, T c) {
    return real<R>([](auto x, auto y, auto z) { return std::fma(x, y, z); }, a, b, c);
}
template <class T>
T add_sat(T a, T b) {
    return static_cast<T>(std::clamp<s64>(s64(a) + b, INT32_MIN, INT32_MAX));
}
template <class T>
T sub_sat(T a, T b) {
    return static_cast<T>(std::clamp<s64>(s64(a) - b, INT32_MIN, INT32_MAX));
}

template <Round R, class T>
T div(T a, T b) {
    if constexpr (std::is_integral_v<T>)
        return b == 0 ? T(-1) : std::is_signed_v<T> && b == T(-1) ? T(0) - a : a / b;
    else
        return real<R>([](auto x, auto y) { return x / y; }, a, b);
}
template <class T>
T rem(T a, T b) {
    return b == 0 ? a : std::is_signed_v<T> && b == T(-1) ? 0 : a % b;
}

template <class T>
struct WiderOf;
template <>
struct WiderOf<u16> {
    using type = u32;
};
template <>
struct WiderOf<s16> {
    using type = s32;
};
template <>
struct WiderOf<u32> {
    using type = u64;
};
template <>
struct WiderOf<s32> {
    using type = s64;
};
template <>
struct WiderOf<u64> {
    using type = u128;
};
template <>
struct WiderOf<s64> {
    using type = __int128;
};
template <class T>
using Wider = typename WiderOf<T>::type;

template <class T>
T mul_lo(T a, T b) {
    return static_cast<T>(Wider<T>(a) * b);
}
template <class T>
T mul_hi(T a, T b) {
    return static_cast<T>(Wider<T>(a) * b >> 8 * sizeof(T));
}
template <class T>
Wider<T> mul_wide(T a, T b) {
    return Wider<T>(a) * b;
}
template <class T>
T mul24(T a, T b) {
    constexpr int shift = 8;
    return (static_cast<T>(a << shift) >> shift) * (static_cast<T>(b << shift) >> shift);
}
template <class T>
T sad(T a, T b, T c) {
    return c + (a > b ? a - b : b - a);
}

template <class T>
bool is_nan(T x) {
    if constexpr (is_real<T>)
        return std::isnan(wide(x));
    else
        return false;
}
template <class T>
bool less(T a, T b) {
    if constexpr (is_half<T>)
        return wide(a) < wide(b);
    else
        return a < b;
}
template <bool KeepNan = false, class T>
T min(T a, T b) {
    if constexpr (is_pair<T>)
        return {min<KeepNan>(a.lo, b.lo), min<KeepNan>(a.hi, b.hi)};
    else if constexpr (is_real<T>) {
        if (is_nan(a) || is_nan(b)) return KeepNan || is_nan(a) == is_nan(b) ? narrow<T>(NAN) : is_nan(a) ? b : a;
        if (wide(a) == wide(b)) return std::signbit(wide(a)) ? a : b;
        return less(a, b) ? a : b;
    } else
        return a < b ? a : b;
}
template <bool KeepNan = false, class T>
T max(T a, T b) {
    if constexpr (is_pair<T>)
        return {max<KeepNan>(a.lo, b.lo), max<KeepNan>(a.hi, b.hi)};
    else if constexpr (is_real<T>) {
        if (is_nan(a) || is_nan(b)) return KeepNan || is_nan(a) == is_nan(b) ? narrow<T>(NAN) : is_nan(a) ? b : a;
        if (wide(a) == wide(b)) return std::signbit(wide(a)) ? b : a;
        return less(a, b) ? b : a;
    } else
        return a < b ? b : a;
}
template <class T>
T neg(T x) {
    if constexpr (is_pair<T>)
        return {neg(x.lo), neg(x.hi)};
    else if constexpr (is_half<T>)
        return {static_cast<u16>(x.bits ^ 0x8000)};
    else
        return -x;
}
template <class T>
T abs(T x) {
    if constexpr (is_pair<T>)
        return {abs(x.lo), abs(x.hi)};
    else if constexpr (is_half<T>)
        return {static_cast<u16>(x.bits & 0x7fff)};
    else if constexpr (std::is_floating_point_v<T>)
        return std::fabs(x);
    else
        return x < 0 ? -x : x;
}
template <class T>
T copysign(T sign, T x) {
    return std::copysign(x, sign);
}

template <Round R, class T>
T sqrt(T x) {
    return real<R>([](auto v) { return std::sqrt(v); }, x);
}
template <Round R, class T>
T rcp(T x) {
    return real<R>([](auto v) { return decltype(v)(1) / v; }, x);
}
template <class T>
T rsqrt(T x) {
    return static_cast<T>(1 / std::sqrt(f64(x)));
}
template <class T>
T ex2(T x) {
    return real<Round::nearest>([](auto v) { return std::exp2(v); }, x);
}
template <class T>
T lg2(T x) {
    return std::log2(x);
}
template <class T>
T sin(T x) {
    return std::sin(x);
}
template <class T>
T cos(T x) {
    return std::cos(x);
}
template <class T>
T tanh(T x) {
    return real<Round::nearest>([](auto v) { return std::tanh(v); }, x);
}
PTX_INLINE bool testp_infinite(f64 x) { return std::isinf(x); }
PTX_INLINE bool testp_finite(f64 x) { return std::isfinite(x); }
PTX_INLINE bool testp_notanumber(f64 x) { return std::isnan(x); }
PTX_INLINE bool testp_number(f64 x) { return !std::isnan(x); }

// ---- comparison -----------------------------------------------------------------------------------------------------

enum class Cmp { eq, ne, lt, le, gt, ge, equ, neu, ltu, leu, gtu, geu, num, nan };

template <Cmp C, class T>
bool compare(T x, T y) {
    const auto a = [&] {
        if constexpr (is_half<T>)
            return wide(x);
        else
            return x;
    }();
    const auto b = [&] {
        if constexpr (is_half<T>)
            return wide(y);
        else
            return y;
    }();
    const bool nan = is_nan(x) || is_nan(y);
    switch (C) {
        case Cmp::eq: return a == b;
        case Cmp::ne: return a != b && !nan;
        case Cmp::lt: return a < b;
        case Cmp::le: return a <= b;
        case Cmp::gt: return a > b;
        case Cmp::ge: return a >= b;
        case Cmp::equ: return a == b || nan;
        case Cmp::neu: return a != b;
        case Cmp::ltu: return !(a >= b);
        case Cmp::leu: return !(a > b);
        case Cmp::gtu: return !(a <= b);
        case Cmp::geu: return !(a < b);
        case Cmp::num: return !nan;
        default: return nan;
    }
}

// What `set` writes for true: 1.0 in a real destination, all ones in an integer one.
template <class D>
D truth(bool x) {
    if constexpr (is_pair<D>)
        return {truth<decltype(D{}.lo)>(x), truth<decltype(D{}.lo)>(x)};
    else if constexpr (is_real<D>)
        return narrow<D>(x ? 1.0 : 0.0);
    else
        return x ? D(-1) : D(0);
}
template <class D, Cmp C, class T>
D compare_set(T a, T b) {
    if constexpr (is_pair<T>) {
        const bool lo = compare<C>(a.lo, b.lo), hi = compare<C>(a.hi, b.hi);
        if constexpr (is_pair<D>)
            return {truth<decltype(D{}.lo)>(lo), truth<decltype(D{}.lo)>(hi)};
        else
            return D(lo ? 0xffff : 0) | D(hi ? 0xffff0000 : 0);
    } else
        return truth<D>(compare<C>(a, b));
}

// ---- bits -----------------------------------------------------------------------------------------------------------

template <class T>
T shl(T a, u32 n) {
    return n >= 8 * sizeof(T) ? 0 : T(a << n);
}
template <class T>
T shr(T a, u32 n) {
    return a >> std::min<u32>(n, 8 * sizeof(T) - 1) >> (n >= 8 * sizeof(T));
}
template <bool Wrap>
u32 shf_l(u32 lo, u32 hi, u32 n) {
    n = Wrap ? n & 31 : std::min(n, 32u);
    return static_cast<u32>((u64(hi) << 32 | lo) << n >> 32);
}
template <bool Wrap>
u32 shf_r(u32 lo, u32 hi, u32 n) {
    n = Wrap ? n & 31 : std::min(n, 32u);
    return static_cast<u32>((u64(hi) << 32 | lo) >> n);
}
PTX_INLINE u32 lop3(u32 a, u32 b, u32 c, u32 table) {
    u32 r = 0;
    for (u32 i = 0; i < 8; ++i) {
        if (table >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    }
    return r;
}
template <class T>
T bfe(T x, u32 at, u32 length) {
    constexpr u32 bits = 8 * sizeof(T);
    at &= 255, length &= 255;
    if (!length) return 0;
    const u32 top = std::min(at + length - 1, bits - 1);
    const bool sign = std::is_signed_v<T> && (x >> top & 1);
    const Unsigned<T> field = at >= bits ? 0 : Unsigned<T>(x) >> at;
    if (length >= bits) return at >= bits ? (sign ? T(-1) : T(0)) : T(x >> at);
    const Unsigned<T> mask = (Unsigned<T>(1) << length) - 1;
    const u32 have = at >= bits ? 0 : std::min(length, bits - at);
    const Unsigned<T> valid = have >= bits ? ~Unsigned<T>(0) : (Unsigned<T>(1) << have) - 1;
    return static_cast<T>(sign ? (field & valid) | ~valid : field & mask);
}
template <class T>
T bfi(T field, T into, u32 at, u32 length) {
    at &= 255, length &= 255;
    if (at >= 8 * sizeof(T) || !length) return into;
    const T mask = (length >= 8 * sizeof(T) ? ~T(0) : (T(1) << length) - 1) << at;
    return (into & ~mask) | ((field << at) & mask);
}
template <class T>
u32 bfind(T x) {
    const auto v = static_cast<Unsigned<T>>(std::is_signed_v<T> && x < 0 ? ~x : x);
    return v ? 8 * sizeof(T) - 1 - std::countl_zero(v) : ~0u;
}
template <class T>
u32 popc(T x) {
    return std::popcount(x);
}
template <class T>
u32 clz(T x) {
    return std::countl_zero(x);
}
template <class T>
T brev(T x) {
    T r = 0;
    for (u32 i = 0; i < 8 * sizeof(T); ++i) r |= (x >> i & 1) << (8 * sizeof(T) - 1 - i);
    return r;
}
PTX_INLINE u32 prmt(u32 a, u32 b, u32 selector) {
    const u64 bytes = u64(b) << 32 | a;
    u32 r = 0;
    for (u32 i = 0; i < 4; ++i) {
        const u32 s = selector >> 4 * i & 15;
        u32 byte = bytes >> 8 * (s & 7) & 255;
        if (s & 8) byte = byte & 128 ? 255 : 0;
        r |= byte << 8 * i;
    }
    return r;
}
PTX_INLINE s32 dp4a(s32 a, s32 b, s32 c) {
    for (int i = 0; i < 4; ++i) c += s8(a >> 8 * i) * s8(b >> 8 * i);
    return c;
}

template <class T>
T add_carry(T a, T b, u32& carry, bool in, bool out) {
    const u128 sum = u128(Unsigned<T>(a)) + Unsigned<T>(b) + (in ? carry : 0);
    if (out) carry = u32(sum >> 8 * sizeof(T)) & 1;
    return static_cast<T>(sum);
}
template <class T>
T sub_carry(T a, T b, u32& carry, bool in, bool out) {
    const u128 sum = u128(Unsigned<T>(a)) - Unsigned<T>(b) - (in ? carry : 0);
    if (out) carry = u32(sum >> 8 * sizeof(T)) & 1;
    return static_cast<T>(sum);
}

// ---- conversion -----------------------------------------------------------------------------------------------------

template <Round R, class T>
T to_integral(T x) {
    if constexpr (R == Round::nearest)
        return std::nearbyint(x);
    else if constexpr (R == Round::zero)
        return std::trunc(x);
    else if constexpr (R == Round::down)
        return std::floor(x);
    else
        return std::ceil(x);
}

// `Integral`: rounds to an integer (.rni and its kin), also where the destination is real.
template <class D, Round R, bool Integral, bool Sat, class S>
D cvt(S x) {
    if constexpr (std::is_integral_v<S> && std::is_integral_v<D>) {
        if constexpr (Sat)
            return static_cast<D>(
                std::clamp<__int128>(x, std::numeric_limits<D>::min(), std::numeric_limits<D>::max())
            );
        return static_cast<D>(x);
    } else if constexpr (std::is_integral_v<S>) {
        if constexpr (is_half<D>)
            return narrow<D, R>(f64(x));
        else
            return rounded<R>([](S v) { return static_cast<D>(v); }, x);
    } else if constexpr (std::is_integral_v<D>) {
        const f64 v = to_integral<R>(f64(wide(x)));
        if (std::isnan(v)) return 0;
        if (v <= f64(std::numeric_limits<D>::min())) return std::numeric_limits<D>::min();
        if (v >= f64(std::numeric_limits<D>::max())) return std::numeric_limits<D>::max();
        return static_cast<D>(v);
    } else if constexpr (std::is_same_v<D, tf32>) {
        const u32 bits = std::bit_cast<u32>(x);
        if (std::isnan(x)) return {0x7fffffff};
        const u32 up = R == Round::zero ? 0
                       : R == Round::up ? 0x1000
                                        : 0xfff + (bits >> 13 & 1);  // up: .rna, ties away
        return {(bits + up) & ~0x1fffu};
    } else {
        const auto v = [&] {
            if constexpr (Integral)
                return to_integral<R>(wide(x));
            else
                return wide(x);
        }();
        if constexpr (std::is_same_v<D, f16> && std::is_same_v<decltype(v), const f32>)
            return to_f16<R>(v);
        else if constexpr (std::is_same_v<D, bf16> && std::is_same_v<decltype(v), const f32>)
            return to_bf16<R>(v);
        else
            return narrow<D, R>(v);
    }
}

// ---- special registers ----------------------------------------------------------------------------------------------

struct Special {
    static u32 laneid(Thread& t) { return t.lane; }
    static u32 warpid(Thread& t) { return t.warp->index; }
    static u32 lanemask(Thread& t, const char* which) {
        const u32 eq = 1u << t.lane, lt = eq - 1;
        switch (which[0] * 256 + which[1]) {
            case 'e' * 256 + 'q': return eq;
            case 'l' * 256 + 't': return lt;
            case 'l' * 256 + 'e': return lt | eq;
            case 'g' * 256 + 't': return ~(lt | eq);
            default: return ~lt;
        }
    }
    // Clusters are blocks side by side.
    static u32 clusterid(Thread& t, int axis) { return axis ? t.block->id[axis] : t.block->id[0] / ctas(t); }
    static u32 nclusterid(Thread& t, int axis) {
        const u32 blocks = t.block->grid->launch.grid[axis];
        return axis ? blocks : blocks / ctas(t);
    }
    static u32 cluster_ctaid(Thread& t, int axis) { return axis ? 0 : t.block->rank; }
    static u32 cluster_nctaid(Thread& t, int axis) { return axis ? 1 : ctas(t); }
    static u32 ctas(Thread& t) { return t.block->grid->launch.cluster; }
    // A clock that never repeats a value.
    static u64 clock(Thread& t) { return t.block->grid->ticks += 16; }
};

[[noreturn]] inline void assert_failed(
    Thread& t, u32 line, const u8* message, const u8* file, const u8* at, const u8* function
) {
    u64 text[3];
    u32 source_line;
    std::memcpy(&text[0], message, 8);
    std::memcpy(&text[1], file, 8);
    std::memcpy(&source_line, at, 4);
    std::memcpy(&text[2], function, 8);
    auto str = [&](int i) { return reinterpret_cast<const char*>(text[i]); };
    t.fail(line, "assertion failed: %s (%s:%u, %s)", str(0), str(1), source_line, str(2));
}

}  // namespace ptx
