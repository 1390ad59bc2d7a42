/* The weighted sum of a step's perturbations over one chunk: sum_p whole_p * z_p, in int32, exact.
 *
 * Two ways to the same integers: one perturbation at a time; or four at a time where the processor
 * has a product of four bytes with four bytes (DOT: AVX-512 VNNI, ARM dotprod).
 */
#ifndef SCALARFED_WEIGH_H
#define SCALARFED_WEIGH_H

#include "noise.h"

#if DOT

#if defined(__x86_64__)
INLINE vi dot(vi sum, vu counts, uint32_t bytes)
{
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)counts, _mm512_set1_epi32((int)bytes));
}
INLINE vu count_bytes(vu x) { return (vu)_mm512_popcnt_epi8((__m512i)x); } /* ones in each byte */
#else
INLINE vi dot(vi sum, vu counts, uint32_t bytes)
{
    return (vi)vdotq_s32((int32x4_t)sum, (int8x16_t)counts, vreinterpretq_s8_u32(vdupq_n_u32(bytes)));
}
INLINE vu count_bytes(vu x) { return (vu)vcntq_u8((uint8x16_t)x); }
#endif

/* A whole number is 128 * upper + lower; the bytes of four perturbations lie side by side. */
typedef struct {
    uint32_t upper, lower;
    int32_t bias; /* of the step, in its first factor: what counting from 0 instead of -2 adds */
} factor;

INLINE int64_t factors_for(int64_t count) { return (count + 3) / 4; }

INLINE void make_factors(factor *factors, const int32_t *wholes, int64_t count)
{
    uint32_t bias = 0;
    memset(factors, 0, (size_t)factors_for(count) * sizeof *factors);
    for (int64_t p = 0; p < count; p++) {
        int32_t upper = (wholes[p] + 64) >> 7, lower = wholes[p] - upper * 128;
        factors[p / 4].upper |= (uint32_t)(uint8_t)upper << (8 * (p % 4));
        factors[p / 4].lower |= (uint32_t)(uint8_t)lower << (8 * (p % 4));
        bias += 2u * (uint32_t)wholes[p];
    }
    factors[0].bias = (int32_t)bias;
}

/* Byte b of words 0 to 3 becomes word b: the bytes of four perturbations side by side. */
#if defined(__x86_64__)
INLINE void transpose(vu y[4], vu x0, vu x1, vu x2, vu x3)
{
#define PER_LANE(first)                                                                                              \
    (__m512i)((((vu){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}) * 0x04040404u) + (first))
    const __m512i lower_bytes = PER_LANE(0x41014000u), upper_bytes = PER_LANE(0x43034202u);
    const __m512i lower_pairs = PER_LANE(0x41400100u), upper_pairs = PER_LANE(0x43420302u);
    __m512i a = _mm512_permutex2var_epi8((__m512i)x0, lower_bytes, (__m512i)x1);
    __m512i b = _mm512_permutex2var_epi8((__m512i)x0, upper_bytes, (__m512i)x1);
    __m512i c = _mm512_permutex2var_epi8((__m512i)x2, lower_bytes, (__m512i)x3);
    __m512i d = _mm512_permutex2var_epi8((__m512i)x2, upper_bytes, (__m512i)x3);
    y[0] = (vu)_mm512_permutex2var_epi8(a, lower_pairs, c);
    y[1] = (vu)_mm512_permutex2var_epi8(a, upper_pairs, c);
    y[2] = (vu)_mm512_permutex2var_epi8(b, lower_pairs, d);
    y[3] = (vu)_mm512_permutex2var_epi8(b, upper_pairs, d);
#undef PER_LANE
}
#else
INLINE void transpose(vu y[4], vu x0, vu x1, vu x2, vu x3)
{
    uint16x8_t a = (uint16x8_t)vtrn1q_u8((uint8x16_t)x0, (uint8x16_t)x1);
    uint16x8_t b = (uint16x8_t)vtrn2q_u8((uint8x16_t)x0, (uint8x16_t)x1);
    uint16x8_t c = (uint16x8_t)vtrn1q_u8((uint8x16_t)x2, (uint8x16_t)x3);
    uint16x8_t d = (uint16x8_t)vtrn2q_u8((uint8x16_t)x2, (uint8x16_t)x3);
    y[0] = (vu)vtrn1q_u16(a, c);
    y[1] = (vu)vtrn1q_u16(b, d);
    y[2] = (vu)vtrn2q_u16(a, c);
    y[3] = (vu)vtrn2q_u16(b, d);
}
#endif

/* The words of perturbations p to p + 3, none beyond the last, transposed. */
INLINE void hash_four(vu y[4], vu lanes, const uint32_t *low, const uint32_t *high, int64_t p, int64_t last)
{
    int64_t q = p + 1 < last ? p + 1 : last, r = p + 2 < last ? p + 2 : last, s = p + 3 < last ? p + 3 : last;
    transpose(y, hash(lanes, low[p], high[p]), hash(lanes, low[q], high[q]), hash(lanes, low[r], high[r]),
              hash(lanes, low[s], high[s]));
}

/* The lower four bits of a byte are counted, and all eight: the upper four are the difference. */
INLINE void weigh(vi sum[PLANES], vu lanes, const uint32_t *low, const uint32_t *high, const factor *factors, int64_t count)
{
    const uint32_t bias = (uint32_t)factors->bias;
    vi upper[PLANES] = {0}, lower[PLANES] = {0};
    const int64_t last = count - 1; /* words beyond it meet zeros */
    for (int64_t p = 0; p < count; p += 4, factors++) {
        vu y[4];
        hash_four(y, lanes, low, high, p, last);
#pragma GCC unroll 4
        for (int byte = 0; byte < 4; byte++) {
            vu four = count_bytes(y[byte] & 0x0F0F0F0Fu), eight = count_bytes(y[byte]);
            upper[2 * byte] = dot(upper[2 * byte], four, factors->upper);
            lower[2 * byte] = dot(lower[2 * byte], four, factors->lower);
            upper[2 * byte + 1] = dot(upper[2 * byte + 1], eight, factors->upper);
            lower[2 * byte + 1] = dot(lower[2 * byte + 1], eight, factors->lower);
        }
    }
#pragma GCC unroll 4
    for (int plane = 0; plane < PLANES; plane += 2) {
        vu four = ((vu)upper[plane] << 7) + (vu)lower[plane];
        vu eight = ((vu)upper[plane + 1] << 7) + (vu)lower[plane + 1];
        sum[plane] = (vi)(four - bias);
        sum[plane + 1] = (vi)(eight - four - bias);
    }
}

#else

#if HAS_TABLES
typedef table factor;
INLINE factor factor_of(int32_t whole)
{
    table t;
    for (int i = 0; i < LANES; i++)
        t[i] = outcome(i) * whole;
    return t;
}
INLINE vi weighed(factor f, vu word, int plane) { return look_up(f, word, plane); }
#elif LANES == 4 && defined(__x86_64__)
typedef int32_t factor;
INLINE factor factor_of(int32_t whole) { return (int32_t)(uint16_t)whole; }
INLINE vi weighed(factor f, vu word, int plane)
{
    /* SSE2 has no product of 32-bit lanes: the upper half of the value meets a zero. */
    return (vi)_mm_madd_epi16((__m128i)signed_value(word, plane), _mm_set1_epi32(f));
}
#else
typedef int32_t factor;
INLINE factor factor_of(int32_t whole) { return whole; }
INLINE vi weighed(factor f, vu word, int plane) { return signed_value(word, plane) * f; }
#endif

INLINE int64_t factors_for(int64_t count) { return count; }

INLINE void make_factors(factor *factors, const int32_t *wholes, int64_t count)
{
    for (int64_t p = 0; p < count; p++)
        factors[p] = factor_of(wholes[p]);
}

INLINE void weigh(vi sum[PLANES], vu lanes, const uint32_t *low, const uint32_t *high, const factor *factors, int64_t count)
{
    for (int plane = 0; plane < PLANES; plane++)
        sum[plane] = (vi){0};
    vu word = prepare(hash(lanes, low[0], high[0]));
    for (int64_t p = 0; p < count; p++) {
        /* The next word (the last time, one that nobody wants) is hashed while this one is looked up. */
        vu next = prepare(hash(lanes, low[p + 1], high[p + 1]));
#pragma GCC unroll 8
        for (int plane = 0; plane < PLANES; plane++)
            sum[plane] += weighed(factors[p], word, plane);
        word = next;
    }
}

#endif

#endif
