/* A perturbation, or the change from one to the next, in one pass over the weights. */
#ifndef SCALARFED_PERTURB_H
#define SCALARFED_PERTURB_H

#include "sweep.h"

#define LARGEST_PERTURBATION 2097152.0f /* grid steps: RESERVE_STEPS */

/* The displacement of one plane by one term, in grid steps times `times`. */
#if HAS_TABLES
INLINE table products(float amount)
{
    vf t;
    for (int i = 0; i < LANES; i++)
        t[i] = (float)outcome(i) * amount;
    return (table)t;
}
INLINE vf product(table t, float amount, vu word, int plane)
{
    (void)amount;
    return (vf)look_up(t, word, plane);
}
#else
typedef int table;
INLINE table products(float amount) { (void)amount; return 0; }
INLINE vf product(table t, float amount, vu word, int plane)
{
    (void)t;
    return to_float(signed_value(word, plane)) * amount;
}
#endif

INLINE vf whole_steps(vf product) { return nearest(clamp(product, LARGEST_PERTURBATION)); }

enum { MOST_TERMS = 2 };

struct perturb_state {
    const struct keys *keys;
    int32_t times[MOST_TERMS];
    float epsilon;
    float step;             /* of the segment for which the following was made */
    float amount;           /* grid steps of a value of 1 */
    float unit[MOST_TERMS]; /* what a grid step of each term adds */
    table scaled;
#if HAS_TABLES
    table ready[MOST_TERMS]; /* what a value of each term adds, where there is no curvature */
#endif
};

static void begin_segment(struct perturb_state *state, float step)
{
    state->step = step;
    state->amount = state->epsilon * (1.0f / step);
    state->scaled = products(state->amount);
    for (int64_t t = 0; t < state->keys->count; t++) {
        state->unit[t] = (float)state->times[t] * step;
#if HAS_TABLES
        state->ready[t] = (table)(whole_steps((vf)state->scaled) * state->unit[t]);
#endif
    }
}

INLINE void hash_terms(vu words[MOST_TERMS], uint32_t first, const struct keys *keys, int64_t terms)
{
    for (int64_t t = 0; t < terms; t++)
        words[t] = prepare(hash(lanes_from(first), keys->low[t], keys->high[t]));
}

INLINE void perturb_chunks(float *weights, uint16_t *curvature, uint32_t first_word, int64_t chunks,
                           struct perturb_state *state, float step, int64_t terms)
{
    const struct keys *keys = state->keys;
    vu words[MOST_TERMS], next[MOST_TERMS];
    hash_terms(words, first_word, keys, terms);
    if (state->step != step)
        begin_segment(state, step);
    const float amount = state->amount;
    const table scaled = state->scaled;
    for (; chunks; chunks--, weights += CHUNK, first_word += CHUNK_WORDS) {
        for (int i = 0; i < CHUNK; i += 16)
            __builtin_prefetch(weights + AHEAD + i, 1);
        for (int lane = 0; lane < CHUNK_WORDS; lane += LANES) {
            vf sum[PLANES] = {0}, root[PLANES];
            /* The last time words that nobody wants. */
            hash_terms(next, first_word + (uint32_t)(lane + LANES), keys, terms);
            if (curvature) {
#pragma GCC unroll 8
                for (int plane = 0; plane < PLANES; plane++)
                    root[plane] = inverse_root(curvature_at(curvature + 16 * plane + lane));
            }
            for (int64_t t = 0; t < terms; t++) {
                const vu word = words[t];
                words[t] = next[t];
#pragma GCC unroll 8
                for (int plane = 0; plane < PLANES; plane++) {
                    if (curvature)
                        sum[plane] +=
                            whole_steps(product(scaled, amount, word, plane) * root[plane]) * state->unit[t];
#if HAS_TABLES
                    else
                        sum[plane] += (vf)look_up(state->ready[t], word, plane);
#else
                    else
                        sum[plane] += whole_steps(product(scaled, amount, word, plane)) * state->unit[t];
#endif
                }
            }
#pragma GCC unroll 8
            for (int plane = 0; plane < PLANES; plane++) {
                float *w = weights + 16 * plane + lane;
                store(w, load(w) + sum[plane]);
            }
        }
        if (curvature)
            curvature += CHUNK;
    }
}

/* There, or back and there again: both loops are unrolled. */
INLINE void perturb_terms(float *weights, uint16_t *curvature, uint32_t first_word, int64_t chunks,
                          struct perturb_state *state, float step)
{
    if (state->keys->count == 1)
        perturb_chunks(weights, curvature, first_word, chunks, state, step, 1);
    else
        perturb_chunks(weights, curvature, first_word, chunks, state, step, 2);
}

static void perturb_plain(float *weights, uint16_t *curvature, uint32_t first_word, int64_t chunks, void *state, float step)
{
    (void)curvature;
    perturb_terms(weights, 0, first_word, chunks, state, step);
}

static void perturb_curved(float *weights, uint16_t *curvature, uint32_t first_word, int64_t chunks, void *state, float step)
{
    perturb_terms(weights, curvature, first_word, chunks, state, step);
}

static int perturb(const struct perturb_job *job, int32_t number, int32_t times, int32_t following)
{
    const int64_t terms = following ? 2 : 1;
    if (number < 0 || number > job->count - terms)
        return -1;
    const uint64_t *fields = (const uint64_t *)(job + 1) + 4 * number;
    uint64_t room[(MOST_TERMS * ROOM_PER_KEY + ROOM_BEYOND) / 8];
    struct keys keys;
    open_keys(&keys, terms, room);
    for (int64_t t = 0; t < terms; t++)
        keys.states[t] = key_state(fields + 4 * t);
    struct perturb_state state = {.keys = &keys, .times = {times, following}, .epsilon = job->epsilon, .step = 0};
    if (job->span.curvature)
        sweep(&job->span, &keys, perturb_curved, &state);
    else
        sweep(&job->span, &keys, perturb_plain, &state);
    return 0;
}

#endif
