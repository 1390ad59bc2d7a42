/* Perturbations from a key: the same integers as edge_agent/noise.py, by SIMD.
 *
 * One mixed key serves 1024 hash words, one word serves eight elements of four bits each, and 16
 * consecutive words serve a chunk of 128 consecutive elements: plane k of a chunk is its elements
 * 16 k to 16 k + 15, from bits 4 k to 4 k + 3 of the 16 words.
 */
#ifndef SCALARFED_NOISE_H
#define SCALARFED_NOISE_H

#include "vector.h"

enum { CHUNK = 128, PLANES = 8, CHUNK_WORDS = 16, BLOCK_WORDS = 1024, BLOCK = BLOCK_WORDS * PLANES };

#define GAMMA64 0x9E3779B97F4A7C15ull
#define GAMMA32 0x9E3779B1u

INLINE uint64_t mix64(uint64_t word)
{
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9ull;
    word = (word ^ (word >> 27)) * 0x94D049BB133111EBull;
    return word ^ (word >> 31);
}

/* The four fields of a NoiseKey as one word. */
INLINE uint64_t key_state(const uint64_t fields[4])
{
    uint64_t state = 0;
    for (int i = 0; i < 4; i++)
        state = mix64((state ^ fields[i]) + GAMMA64);
    return state;
}

INLINE uint64_t block_key(uint64_t state, uint64_t block) { return mix64((block ^ state) + GAMMA64); }

/* Words of LANES neighbours in a block, the first of them number `first`. */
INLINE vu lanes_from(uint32_t first)
{
#if LANES == 1
    return first * GAMMA32;
#elif LANES == 4
    return (((vu){0, 1, 2, 3}) + first) * GAMMA32;
#elif LANES == 8
    return (((vu){0, 1, 2, 3, 4, 5, 6, 7}) + first) * GAMMA32;
#else
    return (((vu){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}) + first) * GAMMA32;
#endif
}

/* Three stages; a block's key comes in by halves: the lower is in the lanes, the upper follows in the middle. */
INLINE vu hash_start(vu lanes) { return (lanes ^ (lanes >> 16)) * 0x7FEB352Du; }
INLINE vu hash_middle(vu x, vu high) { return ((x ^ (x >> 15)) + high) * 0x846CA68Bu; }
INLINE vu hash_end(vu x) { return x ^ (x >> 16); }
INLINE vu hash(vu lanes, uint32_t low, uint32_t high)
{
    return hash_end(hash_middle(hash_start(lanes + low), all(high)));
}

INLINE vu ones_in_fours(vu x)
{
    x -= (x >> 1) & 0x55555555u;
    return (x & 0x33333333u) + ((x >> 2) & 0x33333333u);
}

/* How a path reads a value out of a prepared word.
 *
 * A table holds, for every outcome of four bits, what that outcome stands for: any 32 bits. AVX-512
 * looks it up by the bits themselves, AVX2 by their number of ones; the others compute value * factor.
 */
#if LANES == 16

#define HAS_TABLES 1
typedef vi table;
INLINE vu prepare(vu word) { return word; }
INLINE int outcome(int index) { return __builtin_popcount((unsigned)index) - 2; }
INLINE vi look_up(table t, vu word, int plane)
{
    return (vi)_mm512_permutexvar_epi32((__m512i)(word >> (4 * plane)), (__m512i)t);
}

#elif LANES == 8

#define HAS_TABLES 1
typedef vi table;
INLINE vu prepare(vu word) { return ones_in_fours(word); }
INLINE int outcome(int index) { return index - 2; }
INLINE vi look_up(table t, vu word, int plane)
{
    return (vi)_mm256_permutevar8x32_epi32((__m256i)t, (__m256i)(word >> (4 * plane)));
}

#else

#define HAS_TABLES 0
INLINE vu prepare(vu word) { return (ones_in_fours(word) + 0x66666666u) ^ 0x88888888u; }
INLINE vi signed_value(vu word, int plane) { return (vi)(word << (28 - 4 * plane)) >> 28; }

#endif

#endif
