/* The weighted sum of a step's perturbations over one chunk: sum_p whole_p * z_p, in int32, exact.
 *
 * Two ways to the same integers: one perturbation at a time; or four at a time where the processor
 * has a product of four bytes with four bytes (DOT: AVX-512 VNNI, ARM dotprod).
 */
#ifndef SCALARFED_WEIGH_H
#define SCALARFED_WEIGH_H

#include "noise.h"

#if DOT

/* A group of four lanes holds four perturbations of one word. In vector v of four, group g is word 4 g + v. */
#if defined(__x86_64__)
INLINE vu four_keys(const uint32_t *keys)
{
    return (vu)_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)keys));
}
INLINE vu group_lanes(uint32_t first)
{
    return (((vu){0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12}) + first) * GAMMA32;
}
/* In every group, byte b of lane n becomes byte n of lane b. */
INLINE vu turn_bytes(vu x)
{
    const __m128i places = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return (vu)_mm512_shuffle_epi8((__m512i)x, _mm512_broadcast_i32x4(places));
}
/* Lane n of group g in vector v becomes lane v of that group in vector n. */
INLINE void turn_lanes(vu x[4])
{
    __m512i a = _mm512_unpacklo_epi32((__m512i)x[0], (__m512i)x[1]);
    __m512i b = _mm512_unpackhi_epi32((__m512i)x[0], (__m512i)x[1]);
    __m512i c = _mm512_unpacklo_epi32((__m512i)x[2], (__m512i)x[3]);
    __m512i d = _mm512_unpackhi_epi32((__m512i)x[2], (__m512i)x[3]);
    x[0] = (vu)_mm512_unpacklo_epi64(a, c);
    x[1] = (vu)_mm512_unpackhi_epi64(a, c);
    x[2] = (vu)_mm512_unpacklo_epi64(b, d);
    x[3] = (vu)_mm512_unpackhi_epi64(b, d);
}
INLINE vi dot(vi sum, vu counts, uint32_t bytes)
{
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)counts, _mm512_set1_epi32((int)bytes));
}
/* Ones in each byte; ones in its lower four bits, by a table that looks at six. */
INLINE vu ones_in_bytes(vu x) { return (vu)_mm512_popcnt_epi8((__m512i)x); }
INLINE vu ones_in_halves(vu x)
{
    const __m128i table = _mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
    return (vu)_mm512_permutexvar_epi8((__m512i)x, _mm512_broadcast_i32x4(table));
}
#else
INLINE vu four_keys(const uint32_t *keys) { return (vu)vld1q_u32(keys); }
INLINE vu group_lanes(uint32_t first) { return (vu)vdupq_n_u32(first * GAMMA32); }
INLINE vu turn_bytes(vu x)
{
    static const uint8_t places[] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
    return (vu)vqtbl1q_u8((uint8x16_t)x, vld1q_u8(places));
}
INLINE void turn_lanes(vu x[4])
{
    uint64x2_t a = (uint64x2_t)vzip1q_u32((uint32x4_t)x[0], (uint32x4_t)x[1]);
    uint64x2_t b = (uint64x2_t)vzip2q_u32((uint32x4_t)x[0], (uint32x4_t)x[1]);
    uint64x2_t c = (uint64x2_t)vzip1q_u32((uint32x4_t)x[2], (uint32x4_t)x[3]);
    uint64x2_t d = (uint64x2_t)vzip2q_u32((uint32x4_t)x[2], (uint32x4_t)x[3]);
    x[0] = (vu)vzip1q_u64(a, c);
    x[1] = (vu)vzip2q_u64(a, c);
    x[2] = (vu)vzip1q_u64(b, d);
    x[3] = (vu)vzip2q_u64(b, d);
}
INLINE vi dot(vi sum, vu counts, uint32_t bytes)
{
    return (vi)vdotq_s32((int32x4_t)sum, (int8x16_t)counts, vreinterpretq_s8_u32(vdupq_n_u32(bytes)));
}
INLINE vu ones_in_bytes(vu x) { return (vu)vcntq_u8((uint8x16_t)x); }
INLINE vu ones_in_halves(vu x) { return ones_in_bytes(x & 0x0F0F0F0Fu); }
#endif

/* A whole number is 128 * upper + lower; the bytes of four perturbations lie side by side. */
typedef struct {
    uint32_t upper, lower;
    uint32_t bias; /* of the step, in its first factor: what counting from 0 instead of -2 adds */
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
    factors[0].bias = bias;
}

/* Counts the ones of a byte's lower half and of all of it; those of the upper half are the difference.
 *
 * Keys beyond the last, up to three, are read and meet zeros.
 */
INLINE void weigh(vi sum[PLANES], uint32_t first_word, const uint32_t *low, const uint32_t *high,
                  const factor *factors, int64_t count)
{
    const uint32_t bias = factors->bias;
    vi upper_half[4], upper_all[4], lower_half[4], lower_all[4];
    for (int v = 0; v < 4; v++) {
        upper_half[v] = upper_all[v] = (vi){0};
        lower_half[v] = (vi)(((vu){0}) - bias);
        lower_all[v] = (vi)(((vu){0}) - 2 * bias);
    }
    const vu lanes = group_lanes(first_word);
    for (int64_t p = 0; p < count; p += 4, factors++) {
        const vu keys = lanes + four_keys(low + p), later = four_keys(high + p);
        vu words[4];
        /* Stage by stage: a processor that sees four words in turn waits less than with one at a time. */
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++)
            words[v] = hash_start(keys + (uint32_t)v * GAMMA32);
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++)
            words[v] = hash_middle(words[v], later);
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++)
            words[v] = turn_bytes(hash_end(words[v]));
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) {
            vu half = ones_in_halves(words[v]), all = ones_in_bytes(words[v]);
            upper_half[v] = dot(upper_half[v], half, factors->upper);
            lower_half[v] = dot(lower_half[v], half, factors->lower);
            upper_all[v] = dot(upper_all[v], all, factors->upper);
            lower_all[v] = dot(lower_all[v], all, factors->lower);
        }
    }
    vu half[4], rest[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) {
        half[v] = ((vu)upper_half[v] << 7) + (vu)lower_half[v];
        rest[v] = ((vu)upper_all[v] << 7) + (vu)lower_all[v] - half[v];
    }
    turn_lanes(half);
    turn_lanes(rest);
#pragma GCC unroll 4
    for (int n = 0; n < 4; n++) {
        sum[2 * n] = (vi)half[n];
        sum[2 * n + 1] = (vi)rest[n];
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

INLINE void weigh(vi sum[PLANES], uint32_t first_word, const uint32_t *low, const uint32_t *high,
                  const factor *factors, int64_t count)
{
    const vu lanes = lanes_from(first_word);
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
