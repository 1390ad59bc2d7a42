/* An update: all perturbations of a record applied to a chunk of weights while it is in registers. */
#ifndef SCALARFED_UPDATE_H
#define SCALARFED_UPDATE_H

#include "sweep.h"
#include "weigh.h"

#define ROUNDING_KEY (1ull << 32) /* in place of a perturbation's number */
#define LARGEST_DESCENT 1e15f
#define LARGEST_CURVATURE 1e30f

static const uint32_t MULTIPLIERS[PLANES] = {
    0x9E3779B1u, 0x85EBCA77u, 0xC2B2AE3Du, 0x27D4EB2Fu, 0x165667B1u, 0xD3A2646Du, 0xFD7046C5u, 0xB55A4F09u,
};

struct update_state {
    const struct update_job *job;
    const struct keys *keys;  /* per step: the perturbations', then the rounding key */
    const factor *factors;    /* per step: `factors_of` its perturbations */
};

/* A random number in [-1/2, 1/2) from the upper 23 bits. */
INLINE vf dither(vu random) { return float_of((random >> 9) | 0x3F800000u) - 1.5f; }

INLINE vu learned(vf root, vu bits, vf descent, vu random, const struct update_job *job)
{
    descent = clamp((descent * job->descent) * root, LARGEST_DESCENT);
    vf h = float_of(bits << 16) * job->keep + (descent * descent) * job->nu;
    h = least(most(h, every(job->floor)), every(LARGEST_CURVATURE));
    return (bits_of(h) + (random & 0xFFFFu)) >> 16;
}

INLINE void update_chunks(float *weights, uint16_t *curvature, uint32_t first_word, int64_t chunks,
                          const struct update_state *state, float step)
{
    const struct update_job job = *state->job; /* a copy, which no store to a weight can change */
    const int64_t count = job.perturbations;
    const float limit = job.largest_weight * step, unit = job.direction * step, scale = 1.0f / step;
    for (; chunks; chunks--, weights += CHUNK, first_word += CHUNK_WORDS) {
        for (int i = 0; i < CHUNK; i += 16)
            __builtin_prefetch(weights + AHEAD + i, 1);
        for (int lane = 0; lane < CHUNK_WORDS; lane += LANES) {
            const vu lanes = lanes_from(first_word + (uint32_t)lane);
            const uint32_t *low = state->keys->low, *high = state->keys->high;
            const factor *factors = state->factors;
            for (int64_t k = 0; k < job.steps; k++) {
                vi sum[PLANES];
                weigh(sum, lanes, low, high, factors, count);
                vu random = hash(lanes, low[count], high[count]);
                const float amount = job.amounts[k] * scale;
                const int learn = job.learn && k == job.steps - 1;
#pragma GCC unroll 8
                for (int plane = 0; plane < PLANES; plane++) {
                    vf total = to_float(sum[plane]);
                    vu own = random * MULTIPLIERS[plane];
                    float *w = weights + 16 * plane + lane;
                    vf steps = total * amount;
                    if (curvature) {
                        uint16_t *h = curvature + 16 * plane + lane;
                        vu bits = load_half(h);
                        vf root = inverse_root(float_of(bits << 16));
                        steps *= root;
                        if (learn)
                            store_half(h, learned(root, bits, total, own, &job));
                    }
                    steps = nearest(clamp(steps, job.largest_move) + dither(own));
                    store(w, clamp(load(w) - steps * unit, limit));
                }
                low += count + 1;
                high += count + 1;
                factors += factors_for(count);
            }
        }
        if (curvature)
            curvature += CHUNK;
    }
}

static void update_plain(float *weights, uint16_t *curvature, uint32_t first_word, int64_t chunks, void *state, float step)
{
    (void)curvature;
    update_chunks(weights, 0, first_word, chunks, state, step);
}

static void update_curved(float *weights, uint16_t *curvature, uint32_t first_word, int64_t chunks, void *state, float step)
{
    update_chunks(weights, curvature, first_word, chunks, state, step);
}

static int update(const struct update_job *job)
{
    const int64_t count = job->perturbations;
    struct keys keys;
    if (open_keys(&keys, job->steps * (count + 1)))
        return -1;
    void *room = malloc((size_t)(job->steps * factors_for(count)) * sizeof(factor) + 64);
    if (!room) {
        free(keys.states);
        return -1;
    }
    factor *factors = (factor *)(((uintptr_t)room + 63) & ~(uintptr_t)63);
    for (int64_t k = 0; k < job->steps; k++) {
        const uint64_t *fields = job->keys + 4 * count * k;
        const uint64_t rounding[4] = {fields[0], fields[1], fields[2], ROUNDING_KEY};
        uint64_t *states = keys.states + k * (count + 1);
        for (int64_t p = 0; p < count; p++)
            states[p] = key_state(fields + 4 * p);
        states[count] = key_state(rounding);
        make_factors(factors + k * factors_for(count), job->wholes + k * count, count);
    }
    struct update_state state = {job, &keys, factors};
    if (job->span.curvature)
        sweep(&job->span, &keys, update_curved, &state);
    else
        sweep(&job->span, &keys, update_plain, &state);
    free(room);
    free(keys.states);
    return 0;
}

#endif
