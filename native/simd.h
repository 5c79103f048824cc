// Vectors of the width that the instruction set has: GCC's vector extensions, intrinsics only where those have no word.
// Every operation gives a lane the same bits at any width; only `fma` rounds once or twice, by instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512BW__)
#define KVIK_LANES 16
#elif defined(__AVX2__)
#define KVIK_LANES 8
#else
#define KVIK_LANES 4
#endif

namespace kvik {
namespace {

constexpr int VL = KVIK_LANES;
typedef float vf __attribute__((vector_size(4 * VL)));
typedef int32_t vi __attribute__((vector_size(4 * VL)));
typedef uint32_t vu __attribute__((vector_size(4 * VL)));
typedef uint16_t vh __attribute__((vector_size(2 * VL)));

#define KVIK_INLINE inline __attribute__((always_inline))

template <class V> KVIK_INLINE V load(const void *from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}
template <class V> KVIK_INLINE void store(void *to, V v) { std::memcpy(to, &v, sizeof v); }
KVIK_INLINE vf splat(float x) { return x - vf{}; }
KVIK_INLINE vi splat(int32_t x) { return x - vi{}; }
KVIK_INLINE vi word(const void *from) { // one 32-bit word in every lane
    int32_t x;
    std::memcpy(&x, from, 4);
    return splat(x);
}
KVIK_INLINE vi counted() { // 0, 1, 2, …
    vi x;
    for (int i = 0; i < VL; ++i)
        x[i] = i;
    return x;
}
KVIK_INLINE vf as_float(vi x) { return (vf)x; }
KVIK_INLINE vi as_int(vf x) { return (vi)x; }
KVIK_INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }
KVIK_INLINE vf select(vi mask, vf yes, vf no) { return mask ? yes : no; }

// Rounds to the nearest integer, ties to even; |x| < 2^22.
#if KVIK_LANES == 16
KVIK_INLINE vi round_int(vf x) { return (vi)_mm512_cvtps_epi32((__m512)x); }
#else
KVIK_INLINE vi round_int(vf x) { return as_int(x + 12582912.0f) - 0x4B400000; }
#endif

#if KVIK_LANES == 16
KVIK_INLINE vf fma(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
KVIK_INLINE vf max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); } // b where one is NaN
KVIK_INLINE vf half_low(vi x) {
    return (vf)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)x));
}
#elif KVIK_LANES == 8
KVIK_INLINE vf fma(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
KVIK_INLINE vf max(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
#else
KVIK_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }
KVIK_INLINE vf max(vf a, vf b) { return a > b ? a : b; }
#endif

#if KVIK_LANES != 16
// f16 in the low half of each lane: shifts the exponent and scales, which serves subnormals too.
KVIK_INLINE vf half_low(vi x) {
    const vf size = as_float((x & 0x7fff) << 13) * 0x1p112f;
    const vi whole = (x & 0x7c00) == 0x7c00 ? as_int(size) | 0x7f800000 : as_int(size);
    return as_float(whole | (x & 0x8000) << 16);
}
#endif
KVIK_INLINE vf half_high(vi x) { return half_low((x >> 16) & 0xffff); }
KVIK_INLINE vf bf16_low(vi x) { return as_float(x << 16); }
KVIK_INLINE vf bf16_high(vi x) { return as_float(x & (int32_t)0xffff0000); }

// acc + a.low * b.low + a.high * b.high, over signed 16-bit halves: exact while it fits 32 bits.
KVIK_INLINE vi madd16(vi acc, vi a, vi b) {
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
#elif KVIK_LANES == 16
    return acc + (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif KVIK_LANES == 8
    return acc + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return acc + (vi)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    return acc + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

// Products of four bytes of codes with four 16-bit integers, exact in 32 bits. Where the machine multiplies bytes the
// integers are split into (high, low) bytes with sums of their own; else codes are widened to bytes (0, 2) and (1, 3).
#if defined(__AVX512VNNI__)
constexpr bool BYTES = true;
KVIK_INLINE vi madd8(vi acc, vi codes, vi x) { // unsigned codes, signed x
    return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)codes, (__m512i)x);
}
#else
constexpr bool BYTES = false;
KVIK_INLINE vi madd8(vi acc, vi, vi) { return acc; }
#endif

#if defined(__AVX512BF16__)
constexpr bool DOT_BF16 = true;
KVIK_INLINE vf dot_bf16(vf acc, vi a, vi b) { return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b); }
#else
constexpr bool DOT_BF16 = false;
KVIK_INLINE vf dot_bf16(vf acc, vi, vi) { return acc; }
#endif

// All lanes as one: halves are joined until one is left, a fixed order.
template <class V, class Join> KVIK_INLINE auto reduce(V x, Join join) {
    const auto quarter = [&](auto y) __attribute__((always_inline)) {
        const auto z = join(__builtin_shufflevector(y, y, 0, 1), __builtin_shufflevector(y, y, 2, 3));
        return join(__builtin_shufflevector(z, z, 0, 0), __builtin_shufflevector(z, z, 1, 1))[0];
    };
#if KVIK_LANES == 4
    return quarter(x);
#else
    const auto half = [&](auto y) __attribute__((always_inline)) {
        return quarter(join(__builtin_shufflevector(y, y, 0, 1, 2, 3), __builtin_shufflevector(y, y, 4, 5, 6, 7)));
    };
#if KVIK_LANES == 8
    return half(x);
#else
    return half(join(__builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7),
                     __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15)));
#endif
#endif
}
KVIK_INLINE float sum(vf x) {
    return reduce(x, [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
}
KVIK_INLINE int32_t sum(vi x) {
    return reduce(x, [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
}
KVIK_INLINE uint32_t sum(vu x) {
    return reduce(x, [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
}
KVIK_INLINE float max_of(vf x) {
    return reduce(x, [](auto a, auto b) __attribute__((always_inline)) { return a > b ? a : b; });
}

// From here down exp2_ is 0: of 16 lanes because 2^-200 is, of fewer because it says so.
constexpr float LOWEST = VL == 16 ? -200.0f : -126.0f;

// 2^x for x <= 0, off by 1e-07 of itself at most; 0 far below -126, NaN for NaN.
KVIK_INLINE vf exp2_(vf x) {
    const vf y = max(splat(LOWEST), x);
#if KVIK_LANES == 16
    const vf n = (vf)_mm512_roundscale_ps((__m512)y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = y - n;
#else
    const vf n = y + 12582912.0f;
    const vf r = y - (n - 12582912.0f); // within half a unit of 0
#endif
    vf p = splat(1.326472721e-03f);
    p = fma(p, r, splat(9.671512812e-03f));
    p = fma(p, r, splat(5.550733745e-02f));
    p = fma(p, r, splat(2.402224208e-01f));
    p = fma(p, r, splat(6.931469776e-01f));
    p = fma(p, r, splat(1.0f));
#if KVIK_LANES == 16
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    const vf result = p * as_float((as_int(n) + 127) << 23);
    return select(x < LOWEST, vf{}, result);
#endif
}

// Bits of a float rounded to bf16, ties to even, in the high half.
KVIK_INLINE vi round_bf16(vf x) { return (as_int(x) + 0x7fff + ((as_int(x) >> 16) & 1)) & (int32_t)0xffff0000; }
// VL bf16 in memory as floats.
KVIK_INLINE vf load_bf16(const void *from) {
    return as_float(__builtin_convertvector(load<vh>(from), vi) << 16);
}

} // namespace
} // namespace kvik
