/* The digest's sum over blocks, see edge_agent/digest.py. */
#ifndef SCALARFED_FOLD_H
#define SCALARFED_FOLD_H

#include "noise.h"

/* sum over pairs of (block[i] + keys[i]) * (block[i + 1] + keys[i + 1]), modulo 2**64 */
INLINE uint64_t sum_of_products(const uint32_t *block, const uint32_t *keys)
{
#if LANES == 1
    uint64_t sum = 0;
    for (int i = 0; i < BLOCK_WORDS; i += 2)
        sum += (uint64_t)(block[i] + keys[i]) * (uint64_t)(block[i + 1] + keys[i + 1]);
    return sum;
#else
    typedef uint64_t vq __attribute__((vector_size(4 * LANES)));
    vq sums[4] = {0};
    for (int i = 0; i < BLOCK_WORDS; i += 4 * LANES)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            vu x, k;
            memcpy(&x, block + i + j * LANES, sizeof x);
            memcpy(&k, keys + i + j * LANES, sizeof k);
            x += k;
#if LANES == 16
            sums[j] += (vq)_mm512_mul_epu32((__m512i)x, _mm512_srli_epi64((__m512i)x, 32));
#elif LANES == 8
            sums[j] += (vq)_mm256_mul_epu32((__m256i)x, _mm256_srli_epi64((__m256i)x, 32));
#elif defined(__x86_64__)
            sums[j] += (vq)_mm_mul_epu32((__m128i)x, _mm_srli_epi64((__m128i)x, 32));
#elif defined(__ARM_NEON)
            sums[j] = (vq)vmlal_u32((uint64x2_t)sums[j], vmovn_u64((uint64x2_t)x), vshrn_n_u64((uint64x2_t)x, 32));
#else
            sums[j] += ((vq)x & 0xFFFFFFFFu) * ((vq)x >> 32);
#endif
        }
    vq all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    uint64_t sum = 0;
    for (int i = 0; i < LANES / 2; i++)
        sum += all[i];
    return sum;
#endif
}

static uint64_t fold(const uint32_t *words, int64_t size, int64_t first_block)
{
    const uint64_t fields[4] = {0x6E68, 0, 0, 0};
    const uint64_t mixed = block_key(key_state(fields), 0);
    uint32_t keys[BLOCK_WORDS] __attribute__((aligned(64))), part[BLOCK_WORDS] __attribute__((aligned(64)));
    uint64_t total = 0;
    for (int i = 0; i < BLOCK_WORDS; i += LANES) {
        vu x = hash(lanes_from((uint32_t)i), (uint32_t)mixed, (uint32_t)(mixed >> 32));
        memcpy(keys + i, &x, sizeof x);
    }
    for (int64_t start = 0; start < size; start += BLOCK_WORDS) {
        const uint32_t *block = words + start;
        if (size - start < BLOCK_WORDS) {
            memset(part, 0, sizeof part);
            memcpy(part, block, (size_t)(size - start) * 4);
            block = part;
        }
        uint64_t sum = sum_of_products(block, keys);
        total += mix64(sum ^ mix64((uint64_t)(first_block + start / BLOCK_WORDS + 1)));
    }
    return total;
}

#endif
