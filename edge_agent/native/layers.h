/* Layers that ONNX Runtime has not in one piece: GroupNorm with residual and Hardswish, blocked filters.
 *
 * A blocked tensor holds `block` channels side by side: (n, C / block, H, W, block), C padded with
 * zeros to a multiple of the block. It is the layout of ONNX Runtime's fast convolutions on x86-64.
 * Unlike the passes over weights, these need not agree bit for bit between machines.
 */
#ifndef SCALARFED_LAYERS_H
#define SCALARFED_LAYERS_H

#include "jobs.h"
#include "vector.h"

INLINE float total(vf x)
{
#if LANES == 1
    return x;
#else
    float sum = 0;
    for (int i = 0; i < LANES; i++)
        sum += x[i];
    return sum;
#endif
}

INLINE vf hardswish(vf y) { return y * least(most(y * (1.0f / 6.0f) + 0.5f, every(0)), every(1)); }

INLINE float hardswish_of(float y)
{
    float gate = y * (1.0f / 6.0f) + 0.5f;
    return y * (gate < 0 ? 0 : gate > 1 ? 1 : gate);
}

/* Sum of (x - centre)**power over `size` neighbours, power 1 or 2. */
INLINE float moment(const float *x, int64_t size, float centre, int power)
{
    vf sums[4] = {0};
    int64_t i = 0;
    for (; i + 4 * LANES <= size; i += 4 * LANES)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            vf d = load(x + i + j * LANES) - centre;
            sums[j] += power == 2 ? d * d : d;
        }
    float sum = total((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; i < size; i++)
        sum += power == 2 ? (x[i] - centre) * (x[i] - centre) : x[i] - centre;
    return sum;
}

INLINE void norm_channel(float *out, const float *x, const float *residual, int64_t area, float a, float b, int act)
{
    int64_t i = 0;
    for (; i + LANES <= area; i += LANES) {
        vf y = load(x + i) * a + b;
        if (residual)
            y += load(residual + i);
        store(out + i, act ? hardswish(y) : y);
    }
    for (; i < area; i++) {
        float y = x[i] * a + b;
        if (residual)
            y += residual[i];
        out[i] = act ? hardswish_of(y) : y;
    }
}

/* One group of one sample, channel after channel. */
static void norm_plain(const struct norm_job *job, int64_t sample, int64_t group)
{
    const int64_t channels = job->channels / job->groups, size = channels * job->area;
    const int64_t first = sample * job->channels * job->area + group * size;
    const float *x = job->x + first;
    const float mean = moment(x, size, 0, 1) / (float)size;
    const float scale = 1 / __builtin_sqrtf(moment(x, size, mean, 2) / (float)size + job->epsilon);
    for (int64_t c = 0; c < channels; c++) {
        const float a = job->scale[group * channels + c] * scale, b = job->bias[group * channels + c] - mean * a;
        const float *residual = job->residual ? job->residual + first + c * job->area : 0;
        float *out = job->out + first + c * job->area;
        if (job->activation)
            norm_channel(out, x + c * job->area, residual, job->area, a, b, 1);
        else
            norm_channel(out, x + c * job->area, residual, job->area, a, b, 0);
    }
}

/* Per-lane sums of (x - centre)**power over the area of one block of channels. */
INLINE void block_moment(float *sums, const float *x, int64_t area, int64_t block, const float *centre, int power)
{
    for (int64_t lane = 0; lane < block; lane += LANES) {
        const vf middle = load(centre + lane);
        vf part[4] = {0};
        int64_t i = 0;
        for (; i + 4 <= area; i += 4)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                vf d = load(x + (i + j) * block + lane) - middle;
                part[j] += power == 2 ? d * d : d;
            }
        for (; i < area; i++) {
            vf d = load(x + i * block + lane) - middle;
            part[0] += power == 2 ? d * d : d;
        }
        store(sums + lane, (part[0] + part[1]) + (part[2] + part[3]));
    }
}

/* Means of the groups that channels belong to, spread back over the channels. */
INLINE void spread_means(float *values, int64_t channels, int64_t groups, int64_t area)
{
    const int64_t size = channels / groups;
    for (int64_t g = 0; g < groups; g++) {
        float sum = 0;
        for (int64_t c = 0; c < size; c++)
            sum += values[g * size + c];
        for (int64_t c = 0; c < size; c++)
            values[g * size + c] = sum / (float)(size * area);
    }
}

INLINE void norm_block(float *out, const float *x, const float *residual, int64_t area, int64_t block, const float *a,
                       const float *b, int act)
{
    for (int64_t lane = 0; lane < block; lane += LANES) {
        const vf factor_a = load(a + lane), term_b = load(b + lane);
        for (int64_t i = lane; i < area * block; i += block) {
            vf y = load(x + i) * factor_a + term_b;
            if (residual)
                y += load(residual + i);
            store(out + i, act ? hardswish(y) : y);
        }
    }
}

/* All groups of one sample in blocked layout; padding channels stay zero. */
static void norm_blocked(const struct norm_job *job, int64_t sample)
{
    const int64_t block = job->block, padded = (job->channels + block - 1) / block * block, area = job->area;
    const float *x = job->x + sample * padded * area;
    float mean[MOST_CHANNELS], square[MOST_CHANNELS], a[MOST_CHANNELS], b[MOST_CHANNELS];
    memset(mean, 0, (size_t)padded * sizeof(float));
    for (int64_t c = 0; c < padded; c += block)
        block_moment(square + c, x + c * area, area, block, mean + c, 1);
    memcpy(mean, square, (size_t)padded * sizeof(float));
    spread_means(mean, job->channels, job->groups, area);
    for (int64_t c = 0; c < padded; c += block)
        block_moment(square + c, x + c * area, area, block, mean + c, 2);
    spread_means(square, job->channels, job->groups, area);
    for (int64_t c = 0; c < padded; c++) {
        a[c] = c < job->channels ? job->scale[c] / __builtin_sqrtf(square[c] + job->epsilon) : 0;
        b[c] = c < job->channels ? job->bias[c] - mean[c] * a[c] : 0;
    }
    for (int64_t c = 0; c < padded; c += block) {
        float *out = job->out + (sample * padded + c) * area;
        const float *residual = job->residual ? job->residual + (sample * padded + c) * area : 0;
        if (job->activation)
            norm_block(out, x + c * area, residual, area, block, a + c, b + c, 1);
        else
            norm_block(out, x + c * area, residual, area, block, a + c, b + c, 0);
    }
}

/* A filter (O, I, H, W) as (O / block, I / block, H, W, block of I, block of O), or with `narrow` as
 * (O / block, I, H, W, block of O); one block of output channels. */
static void block_filter(const struct filter_job *job, int64_t outer)
{
    const int64_t block = job->block, cells = job->cells, inner = job->narrow ? 1 : block;
    const int64_t inputs = (job->inputs + inner - 1) / inner * inner;
    const int64_t rows = job->outputs - outer * block < block ? job->outputs - outer * block : block;
    const float *in = job->filter + outer * block * job->inputs * cells;
    float *out = job->out + outer * block * inputs * cells;
    for (int64_t i = 0; i < inputs; i++)
        for (int64_t cell = 0; cell < cells; cell++) {
            float *to = out + (((i / inner) * cells + cell) * inner + i % inner) * block;
            const float *from = in + i * cells + cell;
            const int64_t filled = i < job->inputs ? rows : 0;
            if (filled == 16) {
#pragma GCC unroll 16
                for (int o = 0; o < 16; o++)
                    to[o] = from[o * job->inputs * cells];
                continue;
            }
            for (int64_t o = 0; o < block; o++)
                to[o] = o < filled ? from[o * job->inputs * cells] : 0;
        }
}

#endif
