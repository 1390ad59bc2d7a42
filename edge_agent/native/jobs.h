/* What the caller hands over: a job with its lists right behind it, packed field by field in kernel.py. */
#ifndef SCALARFED_JOBS_H
#define SCALARFED_JOBS_H

#include <stdint.h>

/* A replica's memory, of which elements start to stop are to be worked on. */
struct span {
    float *weights;
    uint16_t *curvature;     /* bfloat16 bits, or NULL for ones */
    const int64_t *segments; /* count rows of start, stop, exponent */
    int64_t segment_count;
    int64_t start, stop;
};

/* w += times * round(epsilon * z) of one key, and following times that of the next. */
struct perturb_job {
    struct span span;
    float epsilon;
    int32_t count; /* of keys: rows of four fields, behind the job */
};

/* w -= round(amount * sum of wholes * z) for each step; then, if asked, learn the curvature. */
struct update_job {
    struct span span;
    int64_t steps, perturbations; /* as many rows of keys lie behind the job, then wholes, then amounts */
    float largest_move;     /* in grid steps */
    float largest_weight;   /* in grid steps; beyond any reach where a move must be taken back */
    float direction;        /* 1, or -1 to take a move back */
    int32_t learn;
    float descent, keep, nu, floor;
};

enum { MOST_CHANNELS = 4096 };

/* act(GroupNorm(x) + residual), samples of channels * area values. */
struct norm_job {
    float *out;
    const float *x, *residual; /* residual may be NULL */
    const float *scale, *bias; /* channels */
    int64_t channels, groups, area;
    int64_t block; /* channels side by side; 0 where each is apart */
    float epsilon;
    int32_t activation; /* Hardswish, or none */
};

/* A convolution's filter into the blocked layout. */
struct filter_job {
    float *out;
    const float *filter;
    int64_t outputs, inputs, cells, block;
    int32_t narrow; /* only the output channels are blocked */
};

/* One compiled path. `perturb` returns -1 where there is no such key, `update` where memory ran out; else 0. */
struct path {
    const char *name;
    int (*supported)(void);
    int (*perturb)(const struct perturb_job *, int32_t number, int32_t times, int32_t following);
    int (*update)(const struct update_job *);
    uint64_t (*fold)(const uint32_t *words, int64_t size, int64_t first_block);
    int lanes;
    void (*norm_plain)(const struct norm_job *, int64_t sample, int64_t group);
    void (*norm_blocked)(const struct norm_job *, int64_t sample);
    void (*block_filter)(const struct filter_job *, int64_t outer);
};

#endif
