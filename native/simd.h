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
KVIK_INLINE vf as_float(vi x) { return (vf)x; }
KVIK_INLINE vi as_int(vf x) { return (vi)x; }
KVIK_INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }
KVIK_INLINE vf select(vi mask, vf yes, vf no) { return mask ? yes : no; }

// Rounds to the nearest integer, ties to even; |x| < 2^22.
KVIK_INLINE vi round_int(vf x) { return as_int(x + 12582912.0f) - 0x4B400000; }

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

// Lanes of a vector, one after another by halves: a fixed order.
KVIK_INLINE float sum(vf x) {
    float lane[VL];
    store(lane, x);
    for (int n = VL / 2; n; n /= 2)
        for (int i = 0; i < n; ++i)
            lane[i] += lane[i + n];
    return lane[0];
}
KVIK_INLINE float max_of(vf x) {
    float lane[VL];
    store(lane, x);
    for (int n = VL / 2; n; n /= 2)
        for (int i = 0; i < n; ++i)
            lane[i] = lane[i] > lane[i + n] ? lane[i] : lane[i + n];
    return lane[0];
}
KVIK_INLINE int32_t sum(vi x) {
    int32_t total = 0;
    for (int i = 0; i < VL; ++i)
        total += x[i];
    return total;
}

// 2^x for x <= 0, off by 1e-07 of itself at most; exactly 0 below -126, NaN for NaN.
KVIK_INLINE vf exp2_(vf x) {
    const vf y = max(splat(-126.0f), x);
    const vf n = y + 12582912.0f;
    const vf r = y - (n - 12582912.0f); // within half a unit of 0
    vf p = splat(1.326472721e-03f);
    p = fma(p, r, splat(9.671512812e-03f));
    p = fma(p, r, splat(5.550733745e-02f));
    p = fma(p, r, splat(2.402224208e-01f));
    p = fma(p, r, splat(6.931469776e-01f));
    p = fma(p, r, splat(1.0f));
    const vf result = p * as_float((as_int(n) + 127) << 23);
    return select(x < -126.0f, vf{}, result);
}

// Bits of a float rounded to bf16, ties to even, in the high half.
KVIK_INLINE vi round_bf16(vf x) { return (as_int(x) + 0x7fff + ((as_int(x) >> 16) & 1)) & (int32_t)0xffff0000; }
// VL bf16 in memory as floats.
KVIK_INLINE vf load_bf16(const void *from) {
    return as_float(__builtin_convertvector(load<vh>(from), vi) << 16);
}

} // namespace
} // namespace kvik
