/* The digest's sum over blocks, see edge_agent/digest.py. */
#ifndef SCALARFED_FOLD_H
#define SCALARFED_FOLD_H

#include "noise.h"

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
        uint64_t sum = 0;
        if (size - start < BLOCK_WORDS) {
            memset(part, 0, sizeof part);
            memcpy(part, block, (size_t)(size - start) * 4);
            block = part;
        }
        for (int i = 0; i < BLOCK_WORDS; i += 2)
            sum += (uint64_t)(block[i] + keys[i]) * (uint64_t)(block[i + 1] + keys[i + 1]);
        total += mix64(sum ^ mix64((uint64_t)(first_block + start / BLOCK_WORDS + 1)));
    }
    return total;
}

#endif
