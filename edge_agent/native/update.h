/* An update: all perturbations of a record applied to a chunk of weights while it is in registers. */
#ifndef SCALARFED_UPDATE_H
#define SCALARFED_UPDATE_H

#include "sweep.h"

#define ROUNDING_KEY (1ull << 32) /* in place of a perturbation's number */
#define LARGEST_DESCENT 1e15f
#define LARGEST_CURVATURE 1e30f

static const uint32_t MULTIPLIERS[PLANES] = {
    0x9E3779B1u, 0x85EBCA77u, 0xC2B2AE3Du, 0x27D4EB2Fu, 0x165667B1u, 0xD3A2646Du, 0xFD7046C5u, 0xB55A4F09u,
};

struct update_state {
    const struct update_job *job;
    const struct keys *keys; /* per step: the perturbations', then the rounding key */
    const weight *weights;   /* per step: the perturbations' */
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

INLINE void update_chunk(float *weights, uint16_t *curvature, uint32_t first_word, const void *given, float step)
{
    const struct update_state *state = given;
    const struct update_job *job = state->job;
    const int64_t count = job->perturbations;
    const float limit = job->largest_weight * step, unit = job->direction * step;
    for (int lane = 0; lane < CHUNK_WORDS; lane += LANES) {
        const vu lanes = lanes_from(first_word + (uint32_t)lane);
        const uint32_t *low = state->keys->low, *high = state->keys->high;
        const weight *weight_of = state->weights;
        for (int64_t k = 0; k < job->steps; k++, low += count + 1, high += count + 1, weight_of += count) {
            vi sum[PLANES] = {0};
            vu word = prepare(hash(lanes, low[0], high[0]));
            for (int64_t p = 0; p < count - 1; p++) {
                /* The next word is hashed while this one is looked up: the two do not wait for each other. */
                vu next = prepare(hash(lanes, low[p + 1], high[p + 1]));
#pragma GCC unroll 8
                for (int plane = 0; plane < PLANES; plane++)
                    sum[plane] += weighed(weight_of[p], word, plane);
                word = next;
            }
            vu random = hash(lanes, low[count], high[count]);
            const float amount = job->amounts[k] * (1.0f / step);
            const int learn = job->learn && k == job->steps - 1;
#pragma GCC unroll 8
            for (int plane = 0; plane < PLANES; plane++) {
                vf total = to_float(sum[plane] + weighed(weight_of[count - 1], word, plane));
                vu own = random * MULTIPLIERS[plane];
                float *w = weights + 16 * plane + lane;
                vf steps = total * amount;
                if (curvature) {
                    uint16_t *h = curvature + 16 * plane + lane;
                    vu bits = load_half(h);
                    vf root = inverse_root(float_of(bits << 16));
                    steps *= root;
                    if (learn)
                        store_half(h, learned(root, bits, total, own, job));
                }
                steps = nearest(clamp(steps, job->largest_move) + dither(own));
                store(w, clamp(load(w) - steps * unit, limit));
            }
        }
    }
}

static void update_plain(float *weights, uint16_t *curvature, uint32_t first_word, const void *given, float step)
{
    (void)curvature;
    update_chunk(weights, 0, first_word, given, step);
}

static void update_curved(float *weights, uint16_t *curvature, uint32_t first_word, const void *given, float step)
{
    update_chunk(weights, curvature, first_word, given, step);
}

static int update(const struct update_job *job)
{
    const int64_t count = job->perturbations;
    struct keys keys;
    weight *weights;
    if (open_keys(&keys, job->steps * (count + 1)))
        return -1;
    void *room = malloc((size_t)(job->steps * count) * sizeof(weight) + 64);
    if (!room) {
        free(keys.states);
        return -1;
    }
    weights = (weight *)(((uintptr_t)room + 63) & ~(uintptr_t)63);
    for (int64_t k = 0; k < job->steps; k++) {
        const uint64_t *fields = job->keys + 4 * count * k;
        uint64_t rounding[4] = {fields[0], fields[1], fields[2], ROUNDING_KEY};
        for (int64_t p = 0; p < count; p++) {
            keys.states[k * (count + 1) + p] = key_state(fields + 4 * p);
            weights[k * count + p] = weighing(job->wholes[k * count + p]);
        }
        keys.states[k * (count + 1) + count] = key_state(rounding);
    }
    struct update_state state = {job, &keys, weights};
    if (job->span.curvature)
        sweep(&job->span, &keys, update_curved, &state);
    else
        sweep(&job->span, &keys, update_plain, &state);
    free(room);
    free(keys.states);
    return 0;
}

#endif
