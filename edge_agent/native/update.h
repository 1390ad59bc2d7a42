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
    const float *amounts;     /* per step */
};

/* A random number in [-1/2, 1/2) from the upper 23 bits: as the fraction of one in [1, 2). */
#if DOT && defined(__x86_64__)
INLINE vu one_to_two(vu random) { return (vu)_mm512_shldi_epi32((__m512i)all(0x7F), (__m512i)random, 23); }
#else
INLINE vu one_to_two(vu random) { return (random >> 9) | 0x3F800000u; }
#endif
INLINE vf dither(vu random) { return float_of(one_to_two(random)) - 1.5f; }

INLINE vu learned(vf root, vu bits, vf descent, vu random, const struct update_job *job)
{
    descent = clamp((descent * job->descent) * root, LARGEST_DESCENT);
    vf h = float_of(bits << 16) * job->keep + (descent * descent) * job->nu;
    h = least(most(h, every(job->floor)), every(LARGEST_CURVATURE));
    return (bits_of(h) + (random & 0xFFFFu)) >> 16;
}

/* Sums first and moves afterwards, a few chunks at a time: either alone keeps a processor busier than both by turns. */
enum { AT_A_TIME = 8, PIECES = CHUNK_WORDS / LANES };

struct asked {
    vi sum[PLANES];
    vu random;
};

INLINE void move_piece(float *weights, uint16_t *curvature, const struct asked *asked, const struct update_job *job,
                       float amount, float step, int learn)
{
    const float limit = job->largest_weight * step, unit = job->direction * step;
#pragma GCC unroll 8
    for (int plane = 0; plane < PLANES; plane++) {
        vf total = to_float(asked->sum[plane]);
        vu own = asked->random * MULTIPLIERS[plane];
        float *w = weights + 16 * plane;
        vf steps = total * amount;
        if (curvature) {
            uint16_t *h = curvature + 16 * plane;
            vu bits = load_half(h);
            vf root = inverse_root(float_of(bits << 16));
            steps *= root;
            if (learn)
                store_half(h, learned(root, bits, total, own, job));
        }
        steps = nearest(clamp(steps, job->largest_move) + dither(own));
        store(w, clamp(less(load(w), steps, unit), limit));
    }
}

INLINE void update_chunks(float *weights, uint16_t *curvature, uint32_t first_word, int64_t chunks,
                          const struct update_state *state, float step)
{
    const struct update_job job = *state->job; /* a copy, which no store to a weight can change */
    const int64_t count = job.perturbations;
    struct asked asked[AT_A_TIME * PIECES];
    while (chunks) {
        const int pieces = (int)(chunks < AT_A_TIME ? chunks : AT_A_TIME) * PIECES;
        const uint32_t *low = state->keys->low, *high = state->keys->high;
        const factor *factors = state->factors;
        for (int64_t k = 0; k < job.steps; k++) {
            for (int i = 0; i < pieces; i++) {
                const uint32_t first = first_word + (uint32_t)(i * LANES);
                for (int j = 0; j < PLANES; j++)
                    __builtin_prefetch(weights + (i * PLANES + j) * LANES, 1);
                weigh(asked[i].sum, first, low, high, factors, count);
                asked[i].random = hash(lanes_from(first), low[count], high[count]);
            }
            const float amount = state->amounts[k] * (1.0f / step);
            const int learn = job.learn && k == job.steps - 1;
            for (int i = 0; i < pieces; i++) {
                const int place = i / PIECES * CHUNK + i % PIECES * LANES;
                move_piece(weights + place, curvature ? curvature + place : 0, asked + i, &job, amount, step, learn);
            }
            low += count + 1;
            high += count + 1;
            factors += factors_for(count);
        }
        const int done = pieces / PIECES;
        chunks -= done;
        weights += done * CHUNK;
        first_word += (uint32_t)(done * CHUNK_WORDS);
        if (curvature)
            curvature += done * CHUNK;
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
    const int64_t count = job->perturbations, all = job->steps * (count + 1);
    const uint64_t *own = (const uint64_t *)(job + 1);
    const int32_t *wholes = (const int32_t *)(own + 4 * job->steps * count);
    struct keys keys;
    void *mixed = malloc((size_t)all * ROOM_PER_KEY + ROOM_BEYOND);
    void *room = malloc((size_t)(job->steps * factors_for(count)) * sizeof(factor) + 64);
    if (!mixed || !room) {
        free(room);
        free(mixed);
        return -1;
    }
    open_keys(&keys, all, mixed);
    factor *factors = (factor *)(((uintptr_t)room + 63) & ~(uintptr_t)63);
    for (int64_t k = 0; k < job->steps; k++) {
        const uint64_t *fields = own + 4 * count * k;
        const uint64_t rounding[4] = {fields[0], fields[1], fields[2], ROUNDING_KEY};
        uint64_t *states = keys.states + k * (count + 1);
        for (int64_t p = 0; p < count; p++)
            states[p] = key_state(fields + 4 * p);
        states[count] = key_state(rounding);
        make_factors(factors + k * factors_for(count), wholes + k * count, count);
    }
    struct update_state state = {job, &keys, factors, (const float *)(wholes + job->steps * count)};
    if (job->span.curvature)
        sweep(&job->span, &keys, update_curved, &state);
    else
        sweep(&job->span, &keys, update_plain, &state);
    free(room);
    free(mixed);
    return 0;
}

#endif
