/* Goes through a span chunk by chunk, with the block keys of a job's perturbations at hand. */
#ifndef SCALARFED_SWEEP_H
#define SCALARFED_SWEEP_H

#include <stdlib.h>

#include "jobs.h"
#include "noise.h"

enum { AHEAD = 8 * CHUNK }; /* elements; a page's end stops a processor's own looking ahead */

/* Keys of the block that is worked on: `low` is added to a lane, `high` between the multiplications. */
struct keys {
    int64_t count;
    int64_t block;
    uint64_t *states;
    uint32_t *low, *high;
};

enum { ROOM_PER_KEY = 16, ROOM_BEYOND = 16 }; /* bytes; four keys are read at a time */

INLINE void open_keys(struct keys *keys, int64_t count, void *room)
{
    keys->count = count;
    keys->block = -1;
    keys->states = room;
    keys->low = (uint32_t *)(keys->states + count);
    keys->high = keys->low + count;
}

INLINE void turn_to_block(struct keys *keys, int64_t block)
{
    if (keys->block == block)
        return;
    keys->block = block;
    for (int64_t i = 0; i < keys->count; i++) {
        uint64_t mixed = block_key(keys->states[i], (uint64_t)block);
        keys->low[i] = (uint32_t)mixed;
        keys->high[i] = (uint32_t)(mixed >> 32);
    }
}

/* 1 / sqrt(h) to 0.066 %, see inverse_root in grid.py. */
INLINE vf inverse_root(vf h)
{
    vf y = float_of(0x5F1FFFF9u - (bits_of(h) >> 1));
    return ((2.38924456f - (h * y) * y) * 0.703952253f) * y;
}

INLINE vf curvature_at(const uint16_t *p) { return float_of(load_half(p) << 16); }

/* Calls work(weights, curvature, first word in the block, chunks, state, grid step) for runs of chunks in a block.
 *
 * A chunk that the span or a segment covers in part is worked on in a copy, so that `work` always
 * sees whole chunks: 128 weights, 128 curvatures (or NULL) each.
 */
typedef void chunk_work(float *weights, uint16_t *curvature, uint32_t first_word, int64_t chunks, void *state, float step);

INLINE void sweep(const struct span *span, struct keys *keys, chunk_work work, void *state)
{
    for (int64_t s = 0; s < span->segment_count; s++) {
        const int64_t *segment = span->segments + 3 * s;
        int64_t start = segment[0] > span->start ? segment[0] : span->start;
        int64_t stop = segment[1] < span->stop ? segment[1] : span->stop;
        uint32_t step_bits = (uint32_t)(segment[2] - 24 + 127) << 23;
        float step;
        memcpy(&step, &step_bits, 4);
        for (int64_t i = start; i < stop;) {
            int64_t chunk = i / CHUNK, base = chunk * CHUNK;
            int64_t border = (base / BLOCK + 1) * BLOCK, end = base + CHUNK < stop ? base + CHUNK : stop;
            uint32_t first_word = (uint32_t)((chunk * CHUNK_WORDS) % BLOCK_WORDS);
            turn_to_block(keys, base / BLOCK);
            if (end - i == CHUNK) {
                int64_t chunks = ((border < stop ? border : stop) - i) / CHUNK;
                work(span->weights + i, span->curvature ? span->curvature + i : 0, first_word, chunks, state, step);
                end = i + chunks * CHUNK;
            } else {
                float weights[CHUNK] = {0};
                uint16_t curvature[CHUNK];
                size_t lead = (size_t)(i - base), size = (size_t)(end - i);
                memcpy(weights + lead, span->weights + i, size * sizeof(float));
                if (span->curvature) {
                    for (int j = 0; j < CHUNK; j++)
                        curvature[j] = 0x3F80;
                    memcpy(curvature + lead, span->curvature + i, size * sizeof(uint16_t));
                }
                work(weights, span->curvature ? curvature : 0, first_word, 1, state, step);
                memcpy(span->weights + i, weights + lead, size * sizeof(float));
                if (span->curvature)
                    memcpy(span->curvature + i, curvature + lead, size * sizeof(uint16_t));
            }
            i = end;
        }
    }
}

#endif
